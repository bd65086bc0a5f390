"""The tables as SQLAlchemy sees them. `migrations/` makes them; a test keeps the two equal.

Names of constraints and indexes are API: errors are mapped by them, and operators read them.
"""

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, TIMESTAMP

SCHEMA = "chat"

metadata = MetaData(schema=SCHEMA)

_timestamptz = TIMESTAMP(timezone=True, precision=3)

chat_sessions = Table(
    "chat_sessions",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("created_at", _timestamptz, nullable=False),
    Column("last_activity", _timestamptz, nullable=False),
    Column("message_count", Integer, nullable=False, server_default=text("0")),
    Column("chain", LargeBinary, nullable=False, server_default=text(r"'\x0000000000000000'::bytea")),
    Column("owner", Text, nullable=False, server_default=text("'postgres'::text")),
    Column("metadata", JSON, nullable=False, server_default=text("'{}'::json")),
    PrimaryKeyConstraint("session_id", name="chat_sessions_pkey"),
    CheckConstraint("message_count >= 0", name="chat_sessions_message_count_check"),
    CheckConstraint("octet_length(chain) = 8", name="chat_sessions_chain_check"),
    CheckConstraint("owner IN ('postgres', 'redis')", name="chat_sessions_owner_check"),
    postgresql_with={"fillfactor": 80},
)
Index(
    "chat_sessions_user_idx",
    chat_sessions.c.user_id,
    chat_sessions.c.created_at.desc(),
    chat_sessions.c.session_id.desc(),
)
# On PostgreSQL 16 and later only: there it leaves an update of `last_activity` HOT.
Index(
    "chat_sessions_last_activity_idx",
    chat_sessions.c.last_activity,
    postgresql_using="brin",
    postgresql_with={"autosummarize": "on"},
)

chat_messages = Table(
    "chat_messages",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("session_month", Date, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("message_id", Uuid, nullable=False),
    Column("role", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("created_at", _timestamptz, nullable=False),
    Column("processing_time_ms", Integer),
    Column("source_count", SmallInteger),
    Column("metadata", JSON, nullable=False, server_default=text("'{}'::json")),
    Column("request_digest", LargeBinary),
    Column("request_size", SmallInteger),
    PrimaryKeyConstraint("session_id", "session_month", "seq", name="chat_messages_pkey"),
    UniqueConstraint("session_id", "session_month", "message_id", name="chat_messages_message_id_key"),
    CheckConstraint("seq > 0", name="chat_messages_seq_check"),
    CheckConstraint(
        "role IN ('user', 'assistant', 'system', 'tool')",
        name="chat_messages_role_check",
    ),
    CheckConstraint(
        "session_month = chat.session_month(session_id)", name="chat_messages_session_month_check"
    ),
    postgresql_partition_by="RANGE (session_month)",
)
Index(
    "chat_messages_created_at_idx",
    chat_messages.c.created_at,
    postgresql_using="brin",
    postgresql_with={"pages_per_range": 32, "autosummarize": "on"},
)

cache_state = Table(
    "cache_state",
    metadata,
    Column("id", SmallInteger, nullable=False, server_default=text("1")),
    Column("protocol", Integer, nullable=False),
    Column("epoch", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("cache", Text, nullable=False),
    Column("redis_identity", Text),
    Column("settled", Boolean, nullable=False, server_default=text("true")),
    PrimaryKeyConstraint("id", name="cache_state_pkey"),
    CheckConstraint("id = 1", name="cache_state_id_check"),
    CheckConstraint("epoch ~ '^[0-9a-f]{16}$'", name="cache_state_epoch_check"),
    CheckConstraint("mode IN ('hybrid', 'draining', 'redis-only')", name="cache_state_mode_check"),
    CheckConstraint("cache IN ('on', 'off')", name="cache_state_cache_check"),
)

chat_turns = Table(
    "chat_turns",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("message_id", Uuid, nullable=False),
    Column("token", Uuid, nullable=False),
    Column("leased_until", _timestamptz, nullable=False),
    PrimaryKeyConstraint("session_id", "message_id", name="chat_turns_pkey"),
)

instances = Table(
    "instances",
    metadata,
    Column("instance_id", Uuid, nullable=False),
    Column("version", Text, nullable=False),
    Column("protocol", Integer, nullable=False),
    Column("started_at", _timestamptz, nullable=False),
    Column("last_seen", _timestamptz, nullable=False),
    PrimaryKeyConstraint("instance_id", name="instances_pkey"),
)

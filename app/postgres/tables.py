"""The tables as SQLAlchemy sees them. `migrations/` makes them; a test keeps the two equal.

Names of constraints and indexes are API: errors are mapped by them, and operators read them.
"""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Identity,
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
Index(
    "chat_sessions_created_at_idx",
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

# The roll-ups (docs/decisions/0009-roll-ups.md): only `app.analytics` reads and writes them, in SQL.

_HOT = {"fillfactor": 70}


def _counts(*names: str, server_default: bool = False) -> list[Column[int]]:
    default = text("0") if server_default else None
    return [Column(name, BigInteger, nullable=False, server_default=default) for name in names]


rollup_dirty = Table(
    "rollup_dirty",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("session_id", Uuid, nullable=False),
    Column("marked_at", TIMESTAMP(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    PrimaryKeyConstraint("id", name="rollup_dirty_pkey"),
)

rollup_gone = Table(
    "rollup_gone",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("session_id", Uuid, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("role", Text, nullable=False),
    Column("created_at", _timestamptz, nullable=False),
    Column("processing_time_ms", Integer),
    Column("source_count", SmallInteger),
    Column("metadata", JSON, nullable=False),
    PrimaryKeyConstraint("id", name="rollup_gone_pkey"),
    Index("rollup_gone_session_idx", "session_id", "seq", "id"),
)

rollup_set_aside = Table(
    "rollup_set_aside",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("error", Text, nullable=False),
    Column("failures", Integer, nullable=False, server_default=text("1")),
    Column("since", TIMESTAMP(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Column("retry_at", TIMESTAMP(timezone=True), nullable=False),
    PrimaryKeyConstraint("session_id", name="rollup_set_aside_pkey"),
)

rollup_state = Table(
    "rollup_state",
    metadata,
    Column("id", SmallInteger, nullable=False, server_default=text("1")),
    Column("timezone", Text),
    Column("complete", Boolean, nullable=False, server_default=text("false")),
    Column("backfilled_from", Uuid),
    *_counts("backfilled", "rounds", server_default=True),
    Column("counted_at", TIMESTAMP(timezone=True)),
    PrimaryKeyConstraint("id", name="rollup_state_pkey"),
    CheckConstraint("id = 1", name="rollup_state_id_check"),
)

rollup_sessions = Table(
    "rollup_sessions",
    metadata,
    Column("session_id", Uuid, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("started_at", _timestamptz, nullable=False),
    Column("first_message_at", _timestamptz),
    Column("last_message_at", _timestamptz),
    Column("first_question_at", _timestamptz),
    Column("processing_ms", BigInteger, nullable=False),
    Column("day", Date, nullable=False),
    Column("messages", Integer, nullable=False),
    Column("user_messages", Integer, nullable=False),
    Column("answers", Integer, nullable=False),
    Column("answered_turns", Integer, nullable=False),
    Column("timed_answers", Integer, nullable=False),
    Column("slowest_ms", Integer),
    Column("first_response_ms", BigInteger),
    Column("last_role", Text),
    Column("repeated", Boolean, nullable=False),
    Column("cited", ARRAY(Uuid), nullable=False),
    Column("cited_days", ARRAY(Date), nullable=False),
    PrimaryKeyConstraint("session_id", name="rollup_sessions_pkey"),
    Index("rollup_sessions_user_idx", "user_id", "started_at", "session_id"),
)
Index("rollup_sessions_messages_idx", rollup_sessions.c.day, rollup_sessions.c.messages.desc())
Index(
    "rollup_sessions_slowest_idx",
    rollup_sessions.c.day,
    rollup_sessions.c.slowest_ms.desc().nulls_last(),
)

rollup_times = Table(
    "rollup_times",
    metadata,
    Column("grain", Text, nullable=False),
    Column("at", TIMESTAMP(timezone=True), nullable=False),
    *_counts("sessions", "user_messages", "answers", "other_messages", "answered_turns", "timed_answers"),
    *_counts("processing_ms", "listed_answers", "unsourced_answers", "fallback_answers", "citations"),
    PrimaryKeyConstraint("grain", "at", name="rollup_times_pkey"),
    CheckConstraint("grain IN ('5 minutes', 'hour', 'day')", name="rollup_times_grain_check"),
    postgresql_with=_HOT,
)

rollup_latencies = Table(
    "rollup_latencies",
    metadata,
    Column("hour", TIMESTAMP(timezone=True), nullable=False),
    Column("bucket", SmallInteger, nullable=False),
    *_counts("answers"),
    PrimaryKeyConstraint("hour", "bucket", name="rollup_latencies_pkey"),
    postgresql_with=_HOT,
)

rollup_latency_days = Table(
    "rollup_latency_days",
    metadata,
    Column("day", Date, nullable=False),
    Column("bucket", SmallInteger, nullable=False),
    *_counts("answers"),
    PrimaryKeyConstraint("day", "bucket", name="rollup_latency_days_pkey"),
    postgresql_with=_HOT,
)

rollup_session_days = Table(
    "rollup_session_days",
    metadata,
    Column("day", Date, nullable=False),
    *_counts("sessions", "engaged", "bounced", "abandoned", "repeated", "messages", server_default=True),
    *_counts("turns", "answered_turns", "timed", "duration_ms", "responded", server_default=True),
    *_counts("first_response_ms", server_default=True),
    PrimaryKeyConstraint("day", name="rollup_session_days_pkey"),
    postgresql_with=_HOT,
)

rollup_session_histograms = Table(
    "rollup_session_histograms",
    metadata,
    Column("day", Date, nullable=False),
    Column("measure", Text, nullable=False),
    Column("bucket", Integer, nullable=False),
    *_counts("sessions"),
    PrimaryKeyConstraint("measure", "day", "bucket", name="rollup_session_histograms_pkey"),
    CheckConstraint(
        "measure IN ('turns', 'abandoned_turns', 'messages', 'duration', 'first_response')",
        name="rollup_session_histograms_measure_check",
    ),
    postgresql_with=_HOT,
)

rollup_user_days = Table(
    "rollup_user_days",
    metadata,
    Column("user_id", Text, nullable=False),
    Column("day", Date, nullable=False),
    Column("messages", Integer, nullable=False),
    PrimaryKeyConstraint("user_id", "day", name="rollup_user_days_pkey"),
)

rollup_users = Table(
    "rollup_users",
    metadata,
    Column("day", Date, nullable=False),
    *_counts("active", "new", "wau", "mau"),
    PrimaryKeyConstraint("day", name="rollup_users_pkey"),
    postgresql_with=_HOT,
)

rollup_lifecycles = Table(
    "rollup_lifecycles",
    metadata,
    Column("grain", Text, nullable=False),
    Column("period", Date, nullable=False),
    *_counts("active", "new", "kept"),
    PrimaryKeyConstraint("grain", "period", name="rollup_lifecycles_pkey"),
    CheckConstraint("grain IN ('day', 'week', 'month')", name="rollup_lifecycles_grain_check"),
    postgresql_with=_HOT,
)

rollup_visits = Table(
    "rollup_visits",
    metadata,
    Column("grain", Text, nullable=False),
    Column("period", Date, nullable=False),
    Column("gap", Integer, nullable=False),
    *_counts("users"),
    PrimaryKeyConstraint("grain", "period", "gap", name="rollup_visits_pkey"),
    CheckConstraint("grain IN ('day', 'week', 'month')", name="rollup_visits_grain_check"),
    postgresql_with=_HOT,
)

rollup_retention = Table(
    "rollup_retention",
    metadata,
    Column("cohort", Date, nullable=False),
    Column("week", Date, nullable=False),
    *_counts("users"),
    PrimaryKeyConstraint("cohort", "week", name="rollup_retention_pkey"),
    postgresql_with=_HOT,
)

rollup_sources = Table(
    "rollup_sources",
    metadata,
    Column("source_key", Uuid, nullable=False),
    Column("source", Text, nullable=False),
    PrimaryKeyConstraint("source_key", name="rollup_sources_pkey"),
)

rollup_source_days = Table(
    "rollup_source_days",
    metadata,
    Column("day", Date, nullable=False),
    Column("source_key", Uuid, nullable=False),
    *_counts("citations", "sessions"),
    PrimaryKeyConstraint("day", "source_key", name="rollup_source_days_pkey"),
    postgresql_with=_HOT,
)

rollup_source_again = Table(
    "rollup_source_again",
    metadata,
    Column("day", Date, nullable=False),
    Column("previous_day", Date, nullable=False),
    Column("source_key", Uuid, nullable=False),
    *_counts("sessions"),
    PrimaryKeyConstraint("day", "previous_day", "source_key", name="rollup_source_again_pkey"),
    postgresql_with=_HOT,
)

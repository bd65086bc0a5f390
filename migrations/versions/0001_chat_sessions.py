"""Sessions, messages partitioned by month, the state of the cache, turns, and the first analytics views.

Revision: 0001
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

FUNCTIONS = """
-- The UTC month in which a UUIDv7 was made; 0001-01-01 for every other id. The twin of
-- app.chat.session_month: both must give the same month for every id, for ever.
CREATE FUNCTION chat.session_month(id uuid) RETURNS date
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN CASE
    WHEN substr(id::text, 15, 1) = '7' AND substr(id::text, 20, 1) IN ('8', '9', 'a', 'b')
         AND ('x' || lpad(left(id::text, 8) || substr(id::text, 10, 4), 16, '0'))::bit(64)::bigint
             < 253402300800000  -- the end of the year 9999, the last that Python's calendar has
    THEN date_trunc('month', timestamp '1970-01-01' + interval '1 millisecond'
         * ('x' || lpad(left(id::text, 8) || substr(id::text, 10, 4), 16, '0'))::bit(64)::bigint)::date
    ELSE date '0001-01-01'
END;
"""

TABLES = r"""
CREATE TABLE chat.chat_sessions (
    session_id    uuid           NOT NULL CONSTRAINT chat_sessions_pkey PRIMARY KEY,
    user_id       text           NOT NULL,
    created_at    timestamptz(3) NOT NULL,
    last_activity timestamptz(3) NOT NULL,
    -- the seq of the last message
    message_count integer        NOT NULL DEFAULT 0
        CONSTRAINT chat_sessions_message_count_check CHECK (message_count >= 0),
    -- BLAKE2b-64 over the ids of all messages in order: tells histories of equal length apart
    chain         bytea          NOT NULL DEFAULT '\x0000000000000000'
        CONSTRAINT chat_sessions_chain_check CHECK (octet_length(chain) = 8),
    -- who holds the messages: 'redis' only for what was written in Redis-only mode and not yet adopted
    owner         text           NOT NULL DEFAULT 'postgres'
        CONSTRAINT chat_sessions_owner_check CHECK (owner IN ('postgres', 'redis')),
    -- json, not jsonb: text and numbers stay as they were sent
    metadata      json           NOT NULL DEFAULT '{}'
)
-- room on the page, so that the counter's update stays HOT
WITH (fillfactor = 80);

-- Serves list_sessions: a user's sessions, newest first, and its cursor.
CREATE INDEX chat_sessions_user_idx ON chat.chat_sessions (user_id, created_at DESC, session_id DESC);

-- session_month is chat.session_month(session_id): one transcript stands in one partition, every
-- statement names it and is pruned to it, and a month is detached in one statement.
-- No foreign key to chat_sessions: one transaction writes and deletes both.
CREATE TABLE chat.chat_messages (
    session_id         uuid           NOT NULL,
    session_month      date           NOT NULL
        CONSTRAINT chat_messages_session_month_check CHECK (session_month = chat.session_month(session_id)),
    seq                integer        NOT NULL CONSTRAINT chat_messages_seq_check CHECK (seq > 0),
    message_id         uuid           NOT NULL,
    role               text           NOT NULL
        CONSTRAINT chat_messages_role_check CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    content            text           NOT NULL,
    created_at         timestamptz(3) NOT NULL,
    -- taken from an assistant's metadata, for analytics
    processing_time_ms integer,
    source_count       smallint,
    metadata           json           NOT NULL DEFAULT '{}',
    -- on the first message of a request with an idempotency key
    request_digest     bytea,
    request_size       smallint,
    CONSTRAINT chat_messages_pkey PRIMARY KEY (session_id, session_month, seq),
    -- Serves idempotent replays.
    CONSTRAINT chat_messages_message_id_key UNIQUE (session_id, session_month, message_id)
) PARTITION BY RANGE (session_month);

-- Serves reports over a range of time. Pages that are not summarised yet are read whole: autosummarize.
CREATE INDEX chat_messages_created_at_idx ON chat.chat_messages USING brin (created_at)
    WITH (pages_per_range = 32, autosummarize = on);

-- Ids without a time. There is no default partition: random ids in it would block the making of new months.
CREATE TABLE chat.chat_messages_legacy PARTITION OF chat.chat_messages
    FOR VALUES FROM ('0001-01-01') TO ('0001-02-01');

-- One row: who owns the data, and which era of the cache this is. Seeded by the first start.
CREATE TABLE chat.cache_state (
    id             smallint NOT NULL DEFAULT 1 CONSTRAINT cache_state_pkey PRIMARY KEY
        CONSTRAINT cache_state_id_check CHECK (id = 1),
    -- 0: every cached read is compared with its row. Processes of two protocols never serve side by side.
    protocol       integer  NOT NULL,
    epoch          text     NOT NULL CONSTRAINT cache_state_epoch_check CHECK (epoch ~ '^[0-9a-f]{16}$'),
    mode           text     NOT NULL
        CONSTRAINT cache_state_mode_check CHECK (mode IN ('hybrid', 'draining', 'redis-only')),
    cache          text     NOT NULL CONSTRAINT cache_state_cache_check CHECK (cache IN ('on', 'off')),
    redis_identity text
);

-- Turns of requests with an idempotency key that wait for their answer: a lease, not a held connection.
CREATE TABLE chat.chat_turns (
    session_id   uuid           NOT NULL,
    message_id   uuid           NOT NULL,
    token        uuid           NOT NULL,
    leased_until timestamptz(3) NOT NULL,
    CONSTRAINT chat_turns_pkey PRIMARY KEY (session_id, message_id)
);

-- Who serves now, and in which version.
CREATE TABLE chat.instances (
    instance_id uuid           NOT NULL CONSTRAINT instances_pkey PRIMARY KEY,
    version     text           NOT NULL,
    protocol    integer        NOT NULL,
    started_at  timestamptz(3) NOT NULL,
    last_seen   timestamptz(3) NOT NULL
);
"""

# A btree here, or any index on 15, would end HOT updates of the counter; BRIN on 16 and later does not.
LAST_ACTIVITY_INDEX = """
CREATE INDEX chat_sessions_last_activity_idx ON chat.chat_sessions USING brin (last_activity)
    WITH (autosummarize = on)
"""

# What people write SQL against: columns are added, never renamed or removed. The joins for `user_id` are
# left joins to a unique key, so that a query which does not ask for it never reads chat_sessions.
ANALYTICS = r"""
CREATE SCHEMA analytics;
COMMENT ON SCHEMA analytics IS 'Chat sessions for reports. Views only gain columns. All times are instants.';

CREATE VIEW analytics.sessions AS
SELECT session_id, user_id, created_at, last_activity, message_count, metadata::jsonb AS metadata
FROM chat.chat_sessions;
COMMENT ON VIEW analytics.sessions IS 'One row a chat session.';
COMMENT ON COLUMN analytics.sessions.user_id IS 'The user who owns the session.';
COMMENT ON COLUMN analytics.sessions.created_at IS 'When the session was created.';
COMMENT ON COLUMN analytics.sessions.last_activity IS 'When it was created or last appended to.';
COMMENT ON COLUMN analytics.sessions.message_count IS 'How many messages it has, of all roles.';

CREATE VIEW analytics.messages AS
SELECT m.session_id, s.user_id, m.seq, m.message_id, m.role, m.content, m.created_at,
       m.processing_time_ms, m.source_count,
       -- jsonb has no NUL character: without this, one such message would fail every query over all of them.
       -- What is left when escaped backslashes are gone is an escape.
       CASE WHEN strpos(replace(m.metadata::text, '\\', ''), '\u0000') = 0 THEN m.metadata::jsonb END AS metadata
FROM chat.chat_messages m
LEFT JOIN chat.chat_sessions s USING (session_id);
COMMENT ON VIEW analytics.messages IS 'One row a message.';
COMMENT ON COLUMN analytics.messages.user_id IS 'The user who owns the session.';
COMMENT ON COLUMN analytics.messages.seq IS 'Counts from 1 within the session, without gaps. The order of messages.';
COMMENT ON COLUMN analytics.messages.role IS 'user, assistant, system, or tool.';
COMMENT ON COLUMN analytics.messages.created_at IS
    'When it was said, by the clock of whoever recorded it. Always bound it, an index serves that.';
COMMENT ON COLUMN analytics.messages.processing_time_ms IS
    'How long the answer took. NULL where an assistant''s metadata has no whole number for it, and for other roles.';
COMMENT ON COLUMN analytics.messages.source_count IS
    'How many sources the answer has. NULL where an assistant''s metadata has no list of them, and for other roles.';
COMMENT ON COLUMN analytics.messages.metadata IS
    'As it was sent, by value. NULL where it holds a NUL character, which jsonb can''t express.';

CREATE VIEW analytics.turns AS
SELECT q.session_id, s.user_id, q.seq AS question_seq, a.seq AS answer_seq,
       q.created_at AS asked_at, a.created_at AS answered_at,
       a.processing_time_ms, a.source_count, q.content AS question, a.content AS answer
FROM chat.chat_messages q
LEFT JOIN chat.chat_sessions s USING (session_id)
LEFT JOIN chat.chat_messages a
    ON a.session_id = q.session_id AND a.session_month = q.session_month AND a.seq = q.seq + 1
    AND a.role = 'assistant'
WHERE q.role = 'user';
COMMENT ON VIEW analytics.turns IS
    'One row a user''s message, with the assistant''s answer where the very next message is one.';
COMMENT ON COLUMN analytics.turns.question_seq IS 'The user''s message in analytics.messages.';
COMMENT ON COLUMN analytics.turns.answer_seq IS
    'The answer in analytics.messages. NULL, like all about the answer, where there is none.';
COMMENT ON COLUMN analytics.turns.processing_time_ms IS 'How long the answer took, where its metadata says so.';
COMMENT ON COLUMN analytics.turns.source_count IS 'How many sources the answer has, where its metadata lists them.';
"""


def run(script: str) -> None:
    """One statement at a time: that is all that a prepared statement takes."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)


def upgrade() -> None:
    run(FUNCTIONS)
    run(TABLES)
    version = op.get_bind().dialect.server_version_info
    if version is not None and version >= (16,):
        run(LAST_ACTIVITY_INDEX)
    run(ANALYTICS)


def downgrade() -> None:
    run("DROP SCHEMA analytics CASCADE")
    run(
        "DROP TABLE chat.chat_messages, chat.chat_sessions, chat.cache_state, chat.chat_turns, chat.instances"
    )
    run("DROP FUNCTION chat.session_month(uuid)")

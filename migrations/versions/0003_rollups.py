"""Roll-ups that reports read in place of all messages, the log of what they have yet to count, and views over them.

Nothing is counted here: the worker does that afterwards, in small pieces (`docs/decisions/0009-roll-ups.md`).

Revision: 0003
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Written in the transactions of those who write, by triggers: whoever writes, with whatever version.
LOGS = """
-- Sessions that were made, appended to or deleted since they were last counted. Append only: a unique key would
-- lose the mark that commits while the worker takes the one before it.
CREATE TABLE chat.rollup_dirty (
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT rollup_dirty_pkey PRIMARY KEY,
    session_id uuid        NOT NULL,
    marked_at  timestamptz NOT NULL DEFAULT clock_timestamp()
)
-- A queue: what was taken is dead, and is in the way of who looks for the oldest.
WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000);

-- Facts of deleted messages, no text among them, until they are no longer counted.
CREATE TABLE chat.rollup_gone (
    id                 bigint         NOT NULL GENERATED ALWAYS AS IDENTITY CONSTRAINT rollup_gone_pkey PRIMARY KEY,
    session_id         uuid           NOT NULL,
    seq                integer        NOT NULL,
    role               text           NOT NULL,
    created_at         timestamptz(3) NOT NULL,
    processing_time_ms integer,
    source_count       smallint,
    metadata           json           NOT NULL
)
WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- Serves the worker, which takes all of a session's.
CREATE INDEX rollup_gone_session_idx ON chat.rollup_gone (session_id, seq, id);
"""

FUNCTIONS = """
-- Buckets that grow by 5 %: their middle is within 2.5 % of all that is in them. Not STRICT: that would be called
-- for each row, in place of being part of the statement.
CREATE FUNCTION chat.rollup_bucket(ms bigint) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN ms < 1 THEN -1 ELSE floor(ln(ms::double precision) / ln(1.05::double precision))::integer END;
"""

# Each ends in `;;`: there are semicolons in them.
TRIGGERS = """
CREATE FUNCTION chat.rollup_mark() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chat.rollup_dirty (session_id) SELECT session_id FROM changed;
    RETURN NULL;
END $$;;

CREATE FUNCTION chat.rollup_keep_gone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chat.rollup_gone
        (session_id, seq, role, created_at, processing_time_ms, source_count, metadata)
    SELECT session_id, seq, role, created_at, processing_time_ms, source_count,
           CASE role WHEN 'assistant' THEN metadata ELSE '{}' END
    FROM changed;
    RETURN NULL;
END $$;;

CREATE TRIGGER rollup_created AFTER INSERT ON chat.chat_sessions
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION chat.rollup_mark();;

-- An append moves its session's counter, in a row that is a fraction of its messages.
CREATE TRIGGER rollup_appended AFTER UPDATE ON chat.chat_sessions
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION chat.rollup_mark();;

CREATE TRIGGER rollup_deleted AFTER DELETE ON chat.chat_sessions
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION chat.rollup_mark();;

-- A session's messages go with its row, which leaves the mark.
CREATE TRIGGER rollup_deleted AFTER DELETE ON chat.chat_messages
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION chat.rollup_keep_gone();;
"""

ROLLUPS = """
-- One row. Every worker changes it first: one whose snapshot is older than another's commit fails on it.
CREATE TABLE chat.rollup_state (
    id              smallint NOT NULL DEFAULT 1 CONSTRAINT rollup_state_pkey PRIMARY KEY
        CONSTRAINT rollup_state_id_check CHECK (id = 1),
    -- whose days are counted; NULL before anything was
    timezone        text,
    -- whether the sessions from before the log, or from before the last rebuild, are all counted
    complete        boolean  NOT NULL DEFAULT false,
    -- of those: sessions with an id from here on are counted
    backfilled_from uuid,
    backfilled      bigint   NOT NULL DEFAULT 0,
    rounds          bigint   NOT NULL DEFAULT 0,
    counted_at      timestamptz
) WITH (fillfactor = 50);

-- What is counted of each session, and what it then amounts to.
CREATE TABLE chat.rollup_sessions (
    session_id        uuid           NOT NULL CONSTRAINT rollup_sessions_pkey PRIMARY KEY,
    user_id           text           NOT NULL,
    started_at        timestamptz(3) NOT NULL,
    first_message_at  timestamptz(3),
    last_message_at   timestamptz(3),
    first_question_at timestamptz(3),
    processing_ms     bigint         NOT NULL,
    day               date           NOT NULL,
    -- the seq of the last message that is counted
    messages          integer        NOT NULL,
    user_messages     integer        NOT NULL,
    answers           integer        NOT NULL,
    answered_turns    integer        NOT NULL,
    timed_answers     integer        NOT NULL,
    slowest_ms        integer,
    first_response_ms bigint,
    last_role         text,
    repeated          boolean        NOT NULL,
    -- each source once for each day on which an answer cites it
    cited             uuid[]         NOT NULL,
    cited_days        date[]         NOT NULL
);

-- Serves the neighbours of a session among its user's.
CREATE INDEX rollup_sessions_user_idx ON chat.rollup_sessions (user_id, started_at, session_id);
-- Serves the longest sessions of a day.
CREATE INDEX rollup_sessions_messages_idx ON chat.rollup_sessions (day, messages DESC);
-- Serves the slowest answers of a day.
CREATE INDEX rollup_sessions_slowest_idx ON chat.rollup_sessions (day, slowest_ms DESC NULLS LAST);

-- By five minutes and by hour in UTC; by day in the configured zone, named by its date at 00:00 UTC.
CREATE TABLE chat.rollup_times (
    grain             text        NOT NULL
        CONSTRAINT rollup_times_grain_check CHECK (grain IN ('5 minutes', 'hour', 'day')),
    at                timestamptz NOT NULL,
    sessions          bigint      NOT NULL,
    user_messages     bigint      NOT NULL,
    answers           bigint      NOT NULL,
    other_messages    bigint      NOT NULL,
    answered_turns    bigint      NOT NULL,
    timed_answers     bigint      NOT NULL,
    processing_ms     bigint      NOT NULL,
    listed_answers    bigint      NOT NULL,
    unsourced_answers bigint      NOT NULL,
    fallback_answers  bigint      NOT NULL,
    citations         bigint      NOT NULL,
    CONSTRAINT rollup_times_pkey PRIMARY KEY (grain, at)
) WITH (fillfactor = 70);

-- Answers by how long they took: bucket floor(ln(ms) / ln(1.05)), -1 for none at all.
CREATE TABLE chat.rollup_latencies (
    hour    timestamptz NOT NULL,
    bucket  smallint    NOT NULL,
    answers bigint      NOT NULL,
    CONSTRAINT rollup_latencies_pkey PRIMARY KEY (hour, bucket)
) WITH (fillfactor = 70);

CREATE TABLE chat.rollup_latency_days (
    day     date     NOT NULL,
    bucket  smallint NOT NULL,
    answers bigint   NOT NULL,
    CONSTRAINT rollup_latency_days_pkey PRIMARY KEY (day, bucket)
) WITH (fillfactor = 70);

CREATE TABLE chat.rollup_session_days (
    day               date   NOT NULL CONSTRAINT rollup_session_days_pkey PRIMARY KEY,
    sessions          bigint NOT NULL DEFAULT 0,
    engaged           bigint NOT NULL DEFAULT 0,
    bounced           bigint NOT NULL DEFAULT 0,
    abandoned         bigint NOT NULL DEFAULT 0,
    repeated          bigint NOT NULL DEFAULT 0,
    messages          bigint NOT NULL DEFAULT 0,
    turns             bigint NOT NULL DEFAULT 0,
    answered_turns    bigint NOT NULL DEFAULT 0,
    timed             bigint NOT NULL DEFAULT 0,
    duration_ms       bigint NOT NULL DEFAULT 0,
    responded         bigint NOT NULL DEFAULT 0,
    first_response_ms bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 70);

-- Sessions of a day by one of their measures: turns and messages as they are, milliseconds in buckets as above.
CREATE TABLE chat.rollup_session_histograms (
    day      date    NOT NULL,
    measure  text    NOT NULL CONSTRAINT rollup_session_histograms_measure_check
        CHECK (measure IN ('turns', 'abandoned_turns', 'messages', 'duration', 'first_response')),
    bucket   integer NOT NULL,
    sessions bigint  NOT NULL,
    CONSTRAINT rollup_session_histograms_pkey PRIMARY KEY (measure, day, bucket)
) WITH (fillfactor = 70);

-- On which days each user wrote.
CREATE TABLE chat.rollup_user_days (
    user_id  text    NOT NULL,
    day      date    NOT NULL,
    messages integer NOT NULL,
    CONSTRAINT rollup_user_days_pkey PRIMARY KEY (user_id, day)
);

-- active and new are of the day itself; wau and mau are by how much they change on it.
CREATE TABLE chat.rollup_users (
    day    date   NOT NULL CONSTRAINT rollup_users_pkey PRIMARY KEY,
    active bigint NOT NULL,
    new    bigint NOT NULL,
    wau    bigint NOT NULL,
    mau    bigint NOT NULL
) WITH (fillfactor = 70);

-- Users of a day, week or month: all, those who are new, and those of the one before it.
CREATE TABLE chat.rollup_lifecycles (
    grain     text   NOT NULL CONSTRAINT rollup_lifecycles_grain_check CHECK (grain IN ('day', 'week', 'month')),
    period    date   NOT NULL,
    active    bigint NOT NULL,
    new       bigint NOT NULL,
    kept      bigint NOT NULL,
    CONSTRAINT rollup_lifecycles_pkey PRIMARY KEY (grain, period)
) WITH (fillfactor = 70);

-- The same by how many days, weeks or months ago they were active before; 0: never.
CREATE TABLE chat.rollup_visits (
    grain  text    NOT NULL CONSTRAINT rollup_visits_grain_check CHECK (grain IN ('day', 'week', 'month')),
    period date    NOT NULL,
    gap    integer NOT NULL,
    users  bigint  NOT NULL,
    CONSTRAINT rollup_visits_pkey PRIMARY KEY (grain, period, gap)
) WITH (fillfactor = 70);

CREATE TABLE chat.rollup_retention (
    cohort date   NOT NULL,
    week   date   NOT NULL,
    users  bigint NOT NULL,
    CONSTRAINT rollup_retention_pkey PRIMARY KEY (cohort, week)
) WITH (fillfactor = 70);

-- By the first half of the name's SHA-256: a name may be longer than an index takes.
CREATE TABLE chat.rollup_sources (
    source_key uuid NOT NULL CONSTRAINT rollup_sources_pkey PRIMARY KEY,
    source     text NOT NULL
);

CREATE TABLE chat.rollup_source_days (
    day        date   NOT NULL,
    source_key uuid   NOT NULL,
    citations  bigint NOT NULL,
    sessions   bigint NOT NULL,
    CONSTRAINT rollup_source_days_pkey PRIMARY KEY (day, source_key)
) WITH (fillfactor = 70);

-- Sessions that cite a source on more than one day: a range that holds both days counts them once.
CREATE TABLE chat.rollup_source_again (
    day          date   NOT NULL,
    previous_day date   NOT NULL,
    source_key   uuid   NOT NULL,
    sessions     bigint NOT NULL,
    CONSTRAINT rollup_source_again_pkey PRIMARY KEY (day, previous_day, source_key)
) WITH (fillfactor = 70);

INSERT INTO chat.rollup_state DEFAULT VALUES;
"""

TABLES = (
    *(
        "dirty",
        "gone",
        "state",
        "sessions",
        "times",
        "latencies",
        "latency_days",
        "session_days",
        "session_histograms",
    ),
    *("user_days", "users", "lifecycles", "visits", "retention", "sources", "source_days", "source_again"),
)


def run(script: str, end: str = ";\n") -> None:
    """One statement at a time: that is all that a prepared statement takes."""
    for statement in script.split(end):
        if statement.strip():
            op.execute(statement)


def upgrade() -> None:
    run(LOGS)
    run(FUNCTIONS)
    run(ROLLUPS)
    run(TRIGGERS, ";;\n")


def downgrade() -> None:
    run("DROP TRIGGER rollup_deleted ON chat.chat_messages")
    for trigger in ("created", "appended", "deleted"):
        run(f"DROP TRIGGER rollup_{trigger} ON chat.chat_sessions")
    run("DROP FUNCTION chat.rollup_mark(), chat.rollup_keep_gone(), chat.rollup_bucket(bigint)")
    run("DROP TABLE " + ", ".join(f"chat.rollup_{table}" for table in TABLES))

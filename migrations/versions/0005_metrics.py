"""Sessions that can't be counted are set aside, and told of; percentiles of sessions, and fallback answers.

Revision: 0005
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLE = """
-- Sessions that the roll-ups are without, because counting them fails. Who is here needs no mark.
CREATE TABLE chat.rollup_set_aside (
    session_id uuid        NOT NULL CONSTRAINT rollup_set_aside_pkey PRIMARY KEY,
    error      text        NOT NULL,
    failures   integer     NOT NULL DEFAULT 1,
    since      timestamptz NOT NULL DEFAULT clock_timestamp(),
    retry_at   timestamptz NOT NULL
)
"""

STATE_BEFORE = """
CREATE VIEW analytics.rollup_state WITH (security_barrier = true) AS
SELECT s.timezone, s.complete, s.backfilled AS backfilled_sessions, s.counted_at,
       (SELECT count(*) FROM (SELECT FROM chat.rollup_dirty LIMIT 100000) d) AS waiting,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - o.marked_at)
                 FROM chat.rollup_dirty o ORDER BY o.id LIMIT 1), 0)::double precision AS lag_seconds
FROM chat.rollup_state s
"""

# The report that says `complete` must not lack a session.
STATE = (
    STATE_BEFORE.replace("CREATE VIEW", "CREATE OR REPLACE VIEW")
    .replace("s.complete,", "s.complete AND NOT EXISTS (SELECT FROM chat.rollup_set_aside) AS complete,")
    .replace(
        "AS lag_seconds\n",
        "AS lag_seconds,\n       (SELECT count(*) FROM chat.rollup_set_aside) AS set_aside\n",
    )
)

TURNS_BEFORE = """
CREATE VIEW analytics.turns AS
SELECT q.session_id, s.user_id, q.seq AS question_seq, a.seq AS answer_seq,
       q.created_at AS asked_at, a.created_at AS answered_at,
       a.processing_time_ms, a.source_count, q.content AS question, a.content AS answer
FROM chat.chat_messages q
LEFT JOIN chat.chat_sessions s USING (session_id)
LEFT JOIN chat.chat_messages a
    ON a.session_id = q.session_id AND a.session_month = q.session_month AND a.seq = q.seq + 1
    AND a.role = 'assistant'
WHERE q.role = 'user'
"""

# As the roll-ups count it: metadata with a NUL is not looked into.
TURNS = TURNS_BEFORE.replace("CREATE VIEW", "CREATE OR REPLACE VIEW").replace(
    "a.content AS answer\n",
    r"""a.content AS answer,
       CASE WHEN a.seq IS NOT NULL THEN
           coalesce(a.source_count = 0, false)
           OR coalesce(CASE WHEN strpos(replace(a.metadata::text, '\\', ''), '\u0000') = 0
                            THEN a.metadata::jsonb -> 'fallback' = 'true' END, false)
       END AS is_fallback
""",
)

IS_FALLBACK = "Whether the answer has no source in its list, or metadata.fallback = true."

TURNS_COMMENTS_BEFORE = {
    "VIEW analytics.turns": "One row a user's message, with the assistant's answer where the very next message is one.",
    "COLUMN analytics.turns.session_id": "The session in analytics.sessions.",
    "COLUMN analytics.turns.user_id": "The user who owns the session.",
    "COLUMN analytics.turns.question_seq": "The user's message in analytics.messages.",
    "COLUMN analytics.turns.answer_seq": "The answer in analytics.messages. NULL, like all about the answer, where there is none.",
    "COLUMN analytics.turns.asked_at": "When the question was written. Always bound it, an index serves that.",
    "COLUMN analytics.turns.answered_at": "When the answer was written.",
    "COLUMN analytics.turns.processing_time_ms": "How long the answer took, where its metadata says so.",
    "COLUMN analytics.turns.source_count": "How many sources the answer has, where its metadata lists them.",
    "COLUMN analytics.turns.question": "The user's text.",
    "COLUMN analytics.turns.answer": "The assistant's text.",
}

COMPLETE_BEFORE = (
    "false: sessions from before the roll-ups, or from before a rebuild, are still being counted."
)
COMMENTS = {
    "complete": f"{COMPLETE_BEFORE} Or some are set aside.",
    "set_aside": "Sessions that are in no number, because counting them fails. They are tried again by themselves; "
    "`chat-sessions rollup status` says why.",
}

STATE_COMMENTS_BEFORE = {
    "timezone": "Whose days they have. NULL before anything was counted.",
    "complete": COMPLETE_BEFORE,
    "backfilled_sessions": "How many of those are counted.",
    "counted_at": "When something was counted last.",
    "waiting": "Writes that are not counted yet, up to 100,000.",
    "lag_seconds": "How long the oldest of them has been waiting.",
}


# One SELECT, with the rights of the caller: so PostgreSQL takes it apart like a view, and plans it for the measure.
# A measure that there is not has no row.
QUANTILES = """
CREATE FUNCTION analytics.session_quantiles(measure text, first_day date, end_day date)
RETURNS TABLE (sessions bigint, average double precision, p50 double precision, p75 double precision,
               p90 double precision, p95 double precision, p99 double precision)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT coalesce(max(running.total), 0)::bigint,
           CASE session_quantiles.measure
               -- Not from the histogram, which has times within 2.5 %.
               WHEN 'duration' THEN (
                   SELECT sum(d.duration_ms) / nullif(sum(d.timed_sessions), 0)
                   FROM analytics.sessions_daily d
                   WHERE d.day >= session_quantiles.first_day AND d.day < session_quantiles.end_day
               )
               WHEN 'first_response' THEN (
                   SELECT sum(d.first_response_ms) / nullif(sum(d.responded_sessions), 0)
                   FROM analytics.sessions_daily d
                   WHERE d.day >= session_quantiles.first_day AND d.day < session_quantiles.end_day
               )
               ELSE sum(running.sessions * running.bucket) / nullif(max(running.total), 0)
           END::double precision,
           min(running.value) FILTER (WHERE running.so_far >= 0.5 * running.total),
           min(running.value) FILTER (WHERE running.so_far >= 0.75 * running.total),
           min(running.value) FILTER (WHERE running.so_far >= 0.9 * running.total),
           min(running.value) FILTER (WHERE running.so_far >= 0.95 * running.total),
           min(running.value) FILTER (WHERE running.so_far >= 0.99 * running.total)
    FROM (
        SELECT counted.bucket, counted.value, counted.sessions,
               sum(counted.sessions) OVER (ORDER BY counted.bucket) AS so_far,
               sum(counted.sessions) OVER () AS total
        FROM (
            SELECT m.bucket, m.value, sum(m.sessions) AS sessions
            FROM analytics.session_measures_daily m
            WHERE m.measure = session_quantiles.measure
              AND m.day >= session_quantiles.first_day AND m.day < session_quantiles.end_day
            GROUP BY m.bucket, m.value
        ) counted
    ) running
    HAVING session_quantiles.measure IN ('duration', 'first_response', 'turns', 'abandoned_turns', 'messages');
END
"""

FUNCTION = "analytics.session_quantiles(text, date, date)"
FUNCTION_COMMENT = (
    "What the sessions created from first_day on and before end_day measure: how many have it, the average, and what 50, "
    "75, 90, 95 and 99 % do not exceed. measure: turns, messages, abandoned_turns (turns of those whose last message is the "
    "user's), exact; duration (from first to last message), first_response (from the first question to the first answer "
    "after it), in ms, percentiles within 2.5 %. Percentiles of a range do not follow from those of its days: this adds up "
    "session_measures_daily."
)


def comment(on: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {on} IS '{quoted}'")


def upgrade() -> None:
    op.execute(TURNS)
    comment("COLUMN analytics.turns.is_fallback", IS_FALLBACK)
    op.execute(TABLE)
    op.execute(STATE)
    for column, text in COMMENTS.items():
        comment(f"COLUMN analytics.rollup_state.{column}", text)
    op.execute(QUANTILES)
    comment(f"FUNCTION {FUNCTION}", FUNCTION_COMMENT)
    # Whom `chat-sessions analyst add` lets call it, and nobody else.
    op.execute(f"REVOKE ALL ON FUNCTION {FUNCTION} FROM PUBLIC")


def downgrade() -> None:
    op.execute(f"DROP FUNCTION {FUNCTION}")
    op.execute("DROP VIEW analytics.turns")
    op.execute(TURNS_BEFORE)
    for on, text in TURNS_COMMENTS_BEFORE.items():
        comment(on, text)
    op.execute("DROP VIEW analytics.rollup_state")
    op.execute("DROP TABLE chat.rollup_set_aside")
    op.execute(STATE_BEFORE)
    comment("VIEW analytics.rollup_state", "One row: how current all other views over roll-ups are.")
    for column, text in STATE_COMMENTS_BEFORE.items():
        comment(f"COLUMN analytics.rollup_state.{column}", text)

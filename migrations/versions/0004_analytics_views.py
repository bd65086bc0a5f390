"""The views over the roll-ups, and a comment on every column that people write SQL against.

Revision: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# A bucket of chat.rollup_bucket by a number that is within 2.5 % of all in it.
FUNCTIONS = """
CREATE FUNCTION chat.rollup_value(bucket integer) RETURNS double precision LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN bucket < 0 THEN 0 ELSE exp((bucket + 0.5) * ln(1.05::double precision)) END;
"""

# Of the three grains: the same columns.
TIMES = """
    t.sessions, t.user_messages + t.answers + t.other_messages AS messages, t.user_messages, t.answers,
    t.other_messages, t.answered_turns, t.timed_answers, t.processing_ms,
    t.listed_answers, t.unsourced_answers, t.fallback_answers, t.citations
FROM chat.rollup_times t
WHERE t.user_messages + t.answers + t.other_messages + t.sessions > 0
"""


def percentiles(value: str, unit: str) -> str:
    """Of each percentage, the first bucket where the running count reaches it; as a number, by `value`."""
    return ",\n    ".join(
        value.format(f"min(v.bucket) FILTER (WHERE v.so_far >= {percent / 100} * v.count)")
        + f" AS p{percent}{unit}"
        for percent in (50, 75, 90, 95, 99)
    )


MILLISECONDS = percentiles("chat.rollup_value({})", "_ms")
MEASURED = percentiles(
    "CASE WHEN v.measure IN ('duration', 'first_response') THEN chat.rollup_value({0}) ELSE {0} END", ""
)

# No security barrier on what shows whole rows of the tables: it would hide nothing, for what is withheld is columns, and
# a join to a transcript would read all messages first (measured: 11 s in place of 20 ms).
VIEWS = f"""
CREATE OR REPLACE VIEW analytics.sessions AS
SELECT s.session_id, s.user_id, s.created_at, s.last_activity, s.message_count, s.metadata::jsonb AS metadata,
       r.day, r.first_message_at, r.last_message_at,
       (extract(epoch FROM r.last_message_at - r.first_message_at) * 1000)::bigint AS duration_ms,
       r.user_messages AS turns, r.answered_turns, r.answers, r.timed_answers, r.processing_ms, r.slowest_ms,
       r.first_response_ms, r.last_role, r.repeated AS is_repeat
FROM chat.chat_sessions s
LEFT JOIN chat.rollup_sessions r ON r.session_id = s.session_id;

CREATE VIEW analytics.messages_5_minutes WITH (security_barrier = true) AS
SELECT t.at AS bucket, {TIMES} AND t.grain = '5 minutes';

CREATE VIEW analytics.messages_hourly WITH (security_barrier = true) AS
SELECT t.at AS hour, {TIMES} AND t.grain = 'hour';

CREATE VIEW analytics.messages_daily WITH (security_barrier = true) AS
SELECT (t.at AT TIME ZONE 'UTC')::date AS day, {TIMES} AND t.grain = 'day';

CREATE VIEW analytics.response_times WITH (security_barrier = true) AS
SELECT l.hour, l.bucket, chat.rollup_value(l.bucket) AS about_ms, l.answers
FROM chat.rollup_latencies l
WHERE l.answers > 0;

CREATE VIEW analytics.response_times_daily WITH (security_barrier = true) AS
SELECT l.day, l.bucket, chat.rollup_value(l.bucket) AS about_ms, l.answers
FROM chat.rollup_latency_days l
WHERE l.answers > 0;

CREATE VIEW analytics.response_time_percentiles_daily WITH (security_barrier = true) AS
SELECT v.day, v.count::bigint AS timed_answers, {MILLISECONDS}
FROM (
    SELECT h.day, h.bucket, sum(h.answers) OVER (PARTITION BY h.day ORDER BY h.bucket) AS so_far,
           sum(h.answers) OVER (PARTITION BY h.day) AS count
    FROM chat.rollup_latency_days h
    WHERE h.answers > 0
) v
GROUP BY v.day, v.count;

CREATE VIEW analytics.sessions_daily WITH (security_barrier = true) AS
SELECT d.day, d.sessions, d.engaged AS engaged_sessions, d.bounced AS bounced_sessions,
       d.abandoned AS abandoned_sessions, d.repeated AS repeat_sessions,
       d.messages, d.turns, d.answered_turns, d.timed AS timed_sessions, d.duration_ms,
       d.responded AS responded_sessions, d.first_response_ms
FROM chat.rollup_session_days d
WHERE d.sessions > 0;

CREATE VIEW analytics.session_measures_daily WITH (security_barrier = true) AS
SELECT h.measure, h.day, h.bucket,
       CASE WHEN h.measure IN ('duration', 'first_response') THEN chat.rollup_value(h.bucket)
            ELSE h.bucket END AS value,
       h.sessions
FROM chat.rollup_session_histograms h
WHERE h.sessions > 0;

CREATE VIEW analytics.session_percentiles_daily WITH (security_barrier = true) AS
SELECT v.measure, v.day, v.count::bigint AS sessions, {MEASURED}
FROM (
    SELECT h.measure, h.day, h.bucket, sum(h.sessions) OVER (PARTITION BY h.measure, h.day ORDER BY h.bucket) AS so_far,
           sum(h.sessions) OVER (PARTITION BY h.measure, h.day) AS count
    FROM chat.rollup_session_histograms h
    WHERE h.sessions > 0
) v
GROUP BY v.measure, v.day, v.count;

CREATE VIEW analytics.session_turns_daily WITH (security_barrier = true) AS
SELECT t.day, t.bucket AS turns, t.sessions, coalesce(a.sessions, 0) AS abandoned_sessions
FROM chat.rollup_session_histograms t
LEFT JOIN chat.rollup_session_histograms a
    ON a.measure = 'abandoned_turns' AND a.day = t.day AND a.bucket = t.bucket
WHERE t.measure = 'turns' AND t.sessions > 0;

CREATE VIEW analytics.users_daily WITH (security_barrier = true) AS
SELECT d.day, d.active AS active_users, d.new AS new_users, d.active - d.new AS returning_users,
       d.wau, d.mau, d.active::double precision / d.mau AS stickiness
FROM (
    -- What changed on a day stands until the next one on which something does.
    SELECT c.day + n AS day, CASE n WHEN 0 THEN c.active ELSE 0 END AS active,
           CASE n WHEN 0 THEN c.new ELSE 0 END AS new, c.wau, c.mau
    FROM (
        SELECT u.day, u.active, u.new, (sum(u.wau) OVER w)::bigint AS wau, (sum(u.mau) OVER w)::bigint AS mau,
               lead(u.day) OVER w AS next_day
        FROM chat.rollup_users u
        WINDOW w AS (ORDER BY u.day)
    ) c
    CROSS JOIN LATERAL generate_series(0, c.next_day - c.day - 1) AS n
    WHERE c.mau > 0
) d;

CREATE VIEW analytics.user_visits WITH (security_barrier = true) AS
SELECT v.grain, v.period, nullif(v.gap, 0) AS gap,
       CASE WHEN v.gap = 0 THEN NULL WHEN v.grain = 'day' THEN v.period - v.gap
            WHEN v.grain = 'week' THEN v.period - 7 * v.gap
            ELSE (v.period - make_interval(months => v.gap))::date END AS previous_period,
       v.users
FROM chat.rollup_visits v
WHERE v.users > 0;

CREATE VIEW analytics.users_lifecycle WITH (security_barrier = true) AS
SELECT p.grain, p.period, sum(p.active)::bigint AS active_users, sum(p.new)::bigint AS new_users,
       sum(p.kept)::bigint AS returning_users, sum(p.active - p.new - p.kept)::bigint AS resurrecting_users,
       (sum(p.before) - sum(p.kept))::bigint AS dormant_users
FROM (
    SELECT v.grain, v.period, v.active, v.new, v.kept, 0 AS before FROM chat.rollup_lifecycles v
    UNION ALL
    SELECT v.grain,
           CASE v.grain WHEN 'day' THEN v.period + 1 WHEN 'week' THEN v.period + 7
                        ELSE (v.period + interval '1 month')::date END,
           0, 0, 0, v.active
    FROM chat.rollup_lifecycles v
) p
GROUP BY p.grain, p.period
HAVING sum(p.active) + sum(p.before) > 0;

CREATE VIEW analytics.retention_weekly WITH (security_barrier = true) AS
SELECT r.cohort AS cohort_week, (r.week - r.cohort) / 7 AS weeks_later, c.users AS cohort_users, r.users,
       r.users::double precision / nullif(c.users, 0) AS retention
FROM chat.rollup_retention r
JOIN chat.rollup_retention c ON c.cohort = r.cohort AND c.week = r.cohort
WHERE r.users > 0;

CREATE VIEW analytics.sources_cited WITH (security_barrier = true) AS
SELECT d.day, s.source, d.citations, d.sessions
FROM chat.rollup_source_days d
JOIN chat.rollup_sources s ON s.source_key = d.source_key
WHERE d.citations > 0;

CREATE VIEW analytics.sources_cited_again WITH (security_barrier = true) AS
SELECT a.day, a.previous_day, s.source, a.sessions
FROM chat.rollup_source_again a
JOIN chat.rollup_sources s ON s.source_key = a.source_key
WHERE a.sessions > 0;

CREATE VIEW analytics.longest_sessions WITH (security_barrier = true) AS
SELECT d.day, r.session_id, r.user_id, r.started_at, r.messages, r.user_messages AS turns,
       (extract(epoch FROM r.last_message_at - r.first_message_at) * 1000)::bigint AS duration_ms
FROM chat.rollup_session_days d
CROSS JOIN LATERAL (
    SELECT * FROM chat.rollup_sessions s WHERE s.day = d.day ORDER BY s.messages DESC LIMIT 50
) r
WHERE d.sessions > 0;

CREATE VIEW analytics.slowest_sessions WITH (security_barrier = true) AS
SELECT d.day, r.session_id, r.user_id, r.started_at, r.slowest_ms
FROM chat.rollup_session_days d
CROSS JOIN LATERAL (
    SELECT * FROM chat.rollup_sessions s WHERE s.day = d.day AND s.slowest_ms IS NOT NULL
    ORDER BY s.slowest_ms DESC NULLS LAST LIMIT 50
) r
WHERE d.sessions > 0;

CREATE VIEW analytics.rollup_state WITH (security_barrier = true) AS
SELECT s.timezone, s.complete, s.backfilled AS backfilled_sessions, s.counted_at,
       (SELECT count(*) FROM (SELECT FROM chat.rollup_dirty LIMIT 100000) d) AS waiting,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - o.marked_at)
                 FROM chat.rollup_dirty o ORDER BY o.id LIMIT 1), 0)::double precision AS lag_seconds
FROM chat.rollup_state s;
"""  # noqa: S608 - of what stands above

_DAY = "The day, in the time zone of analytics.rollup_state."
_TIMES = {
    "sessions": "Sessions created in this time.",
    "messages": "Messages of all roles.",
    "user_messages": "Messages of users. Each begins a turn.",
    "answers": "Messages of the assistant.",
    "other_messages": "Messages of all other roles.",
    "answered_turns": "Of user_messages: those whose very next message is the assistant's, whenever that came.",
    "timed_answers": "Of answers: those whose metadata says how long they took.",
    "processing_ms": "How long timed_answers took, together. Over timed_answers it is the average.",
    "listed_answers": "Of answers: those whose metadata has a list of sources, be it empty.",
    "unsourced_answers": "Of listed_answers: those without any source.",
    "fallback_answers": "Of answers: without any source in their list, or with metadata.fallback = true.",
    "citations": "Sources cited by answers, each once an answer.",
}
_USER = "The user who owns the session."
_PERCENT = {
    f"p{percent}": f"What {percent} % do not exceed, within 2.5 %." for percent in (50, 75, 90, 95, 99)
}
_BUCKET = "floor(ln(ms) / ln(1.05)), -1 for 0 ms. Counts of the same bucket may be added."
_SESSION = {
    "session_id": "Its id in analytics.sessions.",
    "user_id": _USER,
    "day": "The day on which it was created, in the time zone of analytics.rollup_state.",
    "started_at": "When it was created.",
}
_MEASURE = (
    "turns, messages: of a session. abandoned_turns: turns of the abandoned ones. duration: from its first to its "
    "last message, ms. first_response: from the first question to the first answer after it, ms."
)

# What has no entry keeps the comment that it has.
COMMENTS: dict[str, tuple[str | None, dict[str, str]]] = {
    "sessions": (
        None,
        {
            "session_id": "The session's id.",
            "metadata": "As it was sent, by value.",
            "day": f"{_SESSION['day']} From here on NULL until it is counted, seconds later.",
            "first_message_at": "The least time of its messages.",
            "last_message_at": "The greatest time of its messages.",
            "duration_ms": "From first_message_at to last_message_at.",
            "turns": "Messages of the user.",
            "answered_turns": "Of turns: those whose very next message is the assistant's.",
            "answers": "Messages of the assistant.",
            "timed_answers": "Of answers: those that say how long they took.",
            "processing_ms": "How long timed_answers took, together.",
            "slowest_ms": "How long the slowest of them took.",
            "first_response_ms": "From the first question to the first answer after it; 0 where clocks disagree.",
            "last_role": "Who wrote the last message. user: the session is abandoned, or waits for its answer.",
            "is_repeat": "Whether its user had created another session in the 24 hours before.",
        },
    ),
    "messages": (
        None,
        {
            "session_id": "The session in analytics.sessions.",
            "message_id": "The message's id.",
            "content": "The text.",
        },
    ),
    "turns": (
        None,
        {
            "session_id": "The session in analytics.sessions.",
            "user_id": _USER,
            "asked_at": "When the question was written. Always bound it, an index serves that.",
            "answered_at": "When the answer was written.",
            "question": "The user's text.",
            "answer": "The assistant's text.",
        },
    ),
    "messages_5_minutes": ("What was written, by five minutes.", {"bucket": "Their begin, UTC.", **_TIMES}),
    "messages_hourly": ("What was written, by hour.", {"hour": "Its begin, an hour of UTC.", **_TIMES}),
    "messages_daily": ("What was written, by day.", {"day": _DAY, **_TIMES}),
    "response_times": (
        "Answers that say how long they took, by hour and by how long: add up answers by bucket for percentiles.",
        {
            "hour": "The hour of UTC in which they were written.",
            "bucket": _BUCKET,
            "about_ms": "Within 2.5 % of all in the bucket.",
            "answers": "How many.",
        },
    ),
    "response_times_daily": (
        "The same as response_times, by day.",
        {
            "day": _DAY,
            "bucket": _BUCKET,
            "about_ms": "Within 2.5 % of all in the bucket.",
            "answers": "How many.",
        },
    ),
    "response_time_percentiles_daily": (
        "Percentiles of how long the answers of a day took.",
        {
            "day": _DAY,
            "timed_answers": "Answers that say how long they took.",
            **{f"{name}_ms": text for name, text in _PERCENT.items()},
        },
    ),
    "sessions_daily": (
        "Sessions by the day on which they were created, with all that came of them since.",
        {
            "day": _DAY,
            "sessions": "How many were created.",
            "engaged_sessions": "Of them: with a message of the user.",
            "bounced_sessions": "Of them: with exactly one turn.",
            "abandoned_sessions": "Of them: whose last message is the user's.",
            "repeat_sessions": "Of them: whose user had created another one in the 24 hours before.",
            "messages": "Their messages, of all roles.",
            "turns": "Their users' messages.",
            "answered_turns": "Of turns: those whose very next message is the assistant's.",
            "timed_sessions": "Of sessions: those with a message, which duration_ms is over.",
            "duration_ms": "From first to last message, together. Over timed_sessions it is the average.",
            "responded_sessions": "Of sessions: those with an answer to a question, which first_response_ms is over.",
            "first_response_ms": "From first question to first answer after it, together.",
        },
    ),
    "session_measures_daily": (
        "Sessions of a day by what they measure: add up sessions by bucket for percentiles.",
        {
            "measure": _MEASURE,
            "day": _DAY,
            "bucket": "turns and messages: the number itself. Milliseconds: as in response_times.",
            "value": "The number itself, or milliseconds within 2.5 %.",
            "sessions": "How many.",
        },
    ),
    "session_percentiles_daily": (
        "Percentiles of what the sessions of a day measure.",
        {"measure": _MEASURE, "day": _DAY, "sessions": "How many have it.", **_PERCENT},
    ),
    "session_turns_daily": (
        "Sessions of a day by their number of turns. Sessions that reach turn k: the sum over turns >= k.",
        {
            "day": _DAY,
            "turns": "Messages of the user in the session.",
            "sessions": "How many have so many.",
            "abandoned_sessions": "Of them: whose last message is the user's.",
        },
    ),
    "users_daily": (
        "Users who wrote. A day without any is there while mau is not 0.",
        {
            "day": _DAY,
            "active_users": "Users who wrote on this day (DAU).",
            "new_users": "Of them: for the first time.",
            "returning_users": "Of them: not for the first time.",
            "wau": "Users who wrote in the 7 days that end with this one.",
            "mau": "Users who wrote in the 28 days that end with this one.",
            "stickiness": "active_users / mau.",
        },
    ),
    "user_visits": (
        (
            "Users who wrote in a period, by when they had before. Users of a whole range: the sum of users over the "
            "periods of the range, where previous_period is NULL or before the range."
        ),
        {
            "grain": "day, week (from Monday), or month.",
            "period": "Its first day.",
            "gap": "How many periods ago they had written before. NULL: never.",
            "previous_period": "That period's first day. NULL: never.",
            "users": "How many.",
        },
    ),
    "users_lifecycle": (
        "Users of a period against the one before it.",
        {
            "grain": "day, week (from Monday), or month.",
            "period": "Its first day.",
            "active_users": "Users who wrote.",
            "new_users": "Of them: for the first time.",
            "returning_users": "Of them: had written in the period before.",
            "resurrecting_users": "Of them: had written earlier, and not in the period before.",
            "dormant_users": "Users who wrote in the period before, and not in this one.",
        },
    ),
    "retention_weekly": (
        "Users by the week in which they wrote first, and how many of them wrote so many weeks later.",
        {
            "cohort_week": "The Monday of the week in which they wrote first.",
            "weeks_later": "0 for that week itself.",
            "cohort_users": "How many wrote first in cohort_week.",
            "users": "How many of them wrote weeks_later.",
            "retention": "users / cohort_users.",
        },
    ),
    "sources_cited": (
        "Sources that answers cite, by day of the answer.",
        {
            "day": _DAY,
            "source": "As it stands in metadata.sources.",
            "citations": "Answers that cite it.",
            "sessions": "Sessions with such an answer. Over several days, see sources_cited_again.",
        },
    ),
    "sources_cited_again": (
        (
            "Sessions that cite a source on more than one day. Sessions of a range: the sum of "
            "sources_cited.sessions, less the sum of these where both days are in the range."
        ),
        {
            "day": _DAY,
            "previous_day": "The last day before on which the same sessions cite it.",
            "source": "As it stands in metadata.sources.",
            "sessions": "How many.",
        },
    ),
    "longest_sessions": (
        "The 50 sessions of each day with the most messages. Always bound the day.",
        {
            **_SESSION,
            "messages": "Messages of all roles.",
            "turns": "Messages of the user.",
            "duration_ms": "From its first to its last message.",
        },
    ),
    "slowest_sessions": (
        (
            "The 50 sessions of each day with the slowest answer. Always bound the day. "
            "The n slowest answers are in the n slowest sessions."
        ),
        {**_SESSION, "slowest_ms": "How long its slowest answer took."},
    ),
    "rollup_state": (
        "One row: how current all other views over roll-ups are.",
        {
            "timezone": "Whose days they have. NULL before anything was counted.",
            "complete": "false: sessions from before the roll-ups, or from before a rebuild, are still being counted.",
            "backfilled_sessions": "How many of those are counted.",
            "counted_at": "When something was counted last.",
            "waiting": "Writes that are not counted yet, up to 100,000.",
            "lag_seconds": "How long the oldest of them has been waiting.",
        },
    ),
}


def run(script: str) -> None:
    """One statement at a time: that is all that a prepared statement takes."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)


def comment(on: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {on} IS '{quoted}'")


def upgrade() -> None:
    run(FUNCTIONS)
    run(VIEWS)
    for view, (text, columns) in COMMENTS.items():
        if text is not None:
            comment(f"VIEW analytics.{view}", text)
        for column, its_text in columns.items():
            comment(f"COLUMN analytics.{view}.{column}", its_text)


# As 0001 has it: a view loses columns only by being made anew.
SESSIONS_BEFORE = """
CREATE VIEW analytics.sessions AS
SELECT session_id, user_id, created_at, last_activity, message_count, metadata::jsonb AS metadata
FROM chat.chat_sessions;
COMMENT ON VIEW analytics.sessions IS 'One row a chat session.';
COMMENT ON COLUMN analytics.sessions.user_id IS 'The user who owns the session.';
COMMENT ON COLUMN analytics.sessions.created_at IS 'When the session was created.';
COMMENT ON COLUMN analytics.sessions.last_activity IS 'When it was created or last appended to.';
COMMENT ON COLUMN analytics.sessions.message_count IS 'How many messages it has, of all roles.';
"""


def downgrade() -> None:
    for view in ("session_percentiles_daily", "response_time_percentiles_daily"):
        op.execute(f"DROP VIEW analytics.{view}")
    kept = {"messages", "turns", "session_percentiles_daily", "response_time_percentiles_daily"}
    op.execute("DROP VIEW " + ", ".join(f"analytics.{view}" for view in COMMENTS if view not in kept))
    run(SESSIONS_BEFORE)
    for view in ("messages", "turns"):
        for column in COMMENTS[view][1]:
            op.execute(f"COMMENT ON COLUMN analytics.{view}.{column} IS NULL")
    op.execute("DROP FUNCTION chat.rollup_value(integer)")

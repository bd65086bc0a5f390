-- How the roll-ups are counted. Each statement begins with its name between dashes.
--
-- All of a round runs in one snapshot, which has a write's rows if and only if it has the write's mark. What a
-- session amounts to is taken out of every roll-up as it was counted, and put in as it is now, both by the same
-- expressions: `sign` is -1 or 1.

-- take_turn --
-- Fails (40001) where another worker has committed since this one's snapshot.
UPDATE chat.rollup_state
SET rounds = rounds + 1, counted_at = clock_timestamp(), timezone = coalesce(timezone, $1) WHERE id = 1
RETURNING timezone, complete, backfilled_from;

-- pending --
-- Whether there is anything to do, and how much: counted up to $1 only.
SELECT NOT complete AS backfills, timezone,
       (SELECT count(*)::int FROM (SELECT FROM chat.rollup_dirty LIMIT $1::int) d) AS marks,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - marked_at)::float8
                 FROM chat.rollup_dirty ORDER BY id LIMIT 1), 0) AS lag_seconds,
       (SELECT count(*)::int FROM chat.rollup_set_aside) AS set_aside,
       EXISTS (SELECT FROM chat.rollup_set_aside WHERE retry_at <= clock_timestamp()) AS retries
FROM chat.rollup_state WHERE id = 1;

-- take_marks --
-- Half of $1 from the oldest on, half from the newest back: neither waits for the other.
DELETE FROM chat.rollup_dirty
WHERE id = ANY(ARRAY(
    (SELECT id FROM chat.rollup_dirty ORDER BY id LIMIT ($1::int + 1) / 2)
    UNION
    (SELECT id FROM chat.rollup_dirty ORDER BY id DESC LIMIT $1::int / 2)
))
RETURNING session_id;

-- mark --
INSERT INTO chat.rollup_dirty (session_id) SELECT unnest($1::uuid[]);

-- find_aside --
-- Of sessions $1 those that are set aside, and some whose time has come to be tried again.
SELECT session_id, retry_at <= clock_timestamp() AS is_due FROM chat.rollup_set_aside
WHERE session_id = ANY($1::uuid[]) OR session_id IN (
    SELECT session_id FROM chat.rollup_set_aside WHERE retry_at <= clock_timestamp() ORDER BY retry_at LIMIT 100
);

-- set_aside --
-- Sessions $1 failed with $2: they are tried again after 10 s, 20 s, 40 s, and so on up to an hour.
INSERT INTO chat.rollup_set_aside AS a (session_id, error, retry_at)
SELECT session_id, error, clock_timestamp() + interval '10 s' FROM unnest($1::uuid[], $2::text[]) AS u(session_id, error)
ON CONFLICT ON CONSTRAINT rollup_set_aside_pkey DO UPDATE
SET error = excluded.error, failures = a.failures + 1,
    retry_at = clock_timestamp() + least(interval '1 hour', interval '10 s' * 2 ^ least(a.failures, 10))
RETURNING session_id, error, failures, since, retry_at;

-- take_back --
DELETE FROM chat.rollup_set_aside WHERE session_id = ANY($1::uuid[]);

-- retry --
UPDATE chat.rollup_set_aside SET retry_at = clock_timestamp() WHERE retry_at > clock_timestamp();

-- list_aside --
SELECT session_id, error, failures, since, retry_at FROM chat.rollup_set_aside ORDER BY since, session_id LIMIT $1;

-- next_backfilled --
-- The newest ids first: what people look at is right first.
SELECT session_id FROM chat.chat_sessions
WHERE $1::uuid IS NULL OR session_id < $1
ORDER BY session_id DESC LIMIT $2;

-- backfilled --
UPDATE chat.rollup_state
SET backfilled_from = coalesce($1, backfilled_from), backfilled = backfilled + $2, complete = $3 WHERE id = 1;

-- count_sessions --
-- Sessions $1, days in time zone $2, at most $3 messages more of each. Returns what follows from it: `wrote`, by how
-- many a user's messages of a day changed; `moved`, where among a user's sessions one came or went; `left`, what is
-- still to be counted.
WITH gone AS (
    DELETE FROM chat.rollup_gone WHERE session_id = ANY($1::uuid[]) RETURNING *
), stood AS (
    SELECT * FROM chat.rollup_sessions WHERE session_id = ANY($1)
), reach AS (
    -- An id that was deleted and is there again has another history: it is counted from the beginning.
    SELECT s.session_id, s.user_id, s.created_at AS started_at, s.message_count, b.counted,
           least(s.message_count, b.counted + $3::int) AS messages
    FROM chat.chat_sessions s
    LEFT JOIN stood o USING (session_id)
    CROSS JOIN LATERAL (
        SELECT CASE WHEN s.session_id IN (SELECT session_id FROM gone) THEN 0 ELSE coalesce(o.messages, 0) END
    ) b(counted)
    WHERE s.session_id = ANY($1)
), lines AS (
    -- The last message that is counted already comes along: the next one may be its answer.
    SELECT 1 AS sign, r.session_id, r.user_id, r.counted, m.*
    FROM reach r
    CROSS JOIN LATERAL (
        SELECT m.seq, m.role, m.created_at, m.processing_time_ms, m.source_count, m.metadata
        FROM chat.chat_messages m
        WHERE m.session_id = r.session_id AND m.session_month = chat.session_month(r.session_id)
          AND m.seq BETWEEN r.counted AND r.messages
    ) m
    WHERE r.messages > r.counted
    UNION ALL
    SELECT -1, o.session_id, o.user_id, 0, g.seq, g.role, g.created_at, g.processing_time_ms, g.source_count, g.metadata
    FROM (
        -- Of an id that was deleted twice, the first history is the one that was counted.
        SELECT DISTINCT ON (session_id, seq) * FROM gone ORDER BY session_id, seq, id
    ) g
    JOIN stood o USING (session_id)
    WHERE g.seq <= o.messages
), facts AS (
    SELECT l.*,
           (l.created_at AT TIME ZONE $2::text)::date AS day,
           l.role = 'user' AS is_question,
           l.role = 'assistant' AS is_answer,
           l.role = 'assistant' AND lag(l.role) OVER w IS NOT DISTINCT FROM 'user' AS is_response,
           lag(l.created_at) OVER w AS previous_at,
           count(*) FILTER (WHERE l.role = 'user') OVER w > 0 AS is_asked,
           -- As analytics.messages has it.
           CASE WHEN l.role = 'assistant' AND strpos(replace(l.metadata::text, '\\', ''), '\u0000') = 0
                THEN l.metadata::jsonb END AS said
    FROM lines l
    WINDOW w AS (PARTITION BY sign, session_id ORDER BY seq)
), news AS MATERIALIZED (
    SELECT * FROM facts WHERE seq > counted
), cited AS MATERIALIZED (
    SELECT n.sign, n.session_id, n.created_at, n.day, m.source,
           left(encode(sha256(convert_to(m.source, 'UTF8')), 'hex'), 32)::uuid AS source_key
    FROM news n
    CROSS JOIN LATERAL (
        -- Strict and silent: what is not an array of sources, or not a text in it, is passed over.
        SELECT DISTINCT member #>> '{}' AS source
        FROM jsonb_path_query(n.said, 'strict $.sources[*] ? (@.type() == "string")', silent => true) AS member
    ) m
    WHERE n.source_count > 0
), cited_in AS MATERIALIZED (
    -- For all sessions at once: to look into `cited` for each of 5,000 takes four times as long as all else.
    SELECT session_id, array_agg(source_key) AS source_keys, array_agg(day) AS days
    FROM cited
    WHERE sign = 1
    GROUP BY session_id
), gained AS (
    SELECT session_id, min(created_at) AS first_message_at, max(created_at) AS last_message_at,
           count(*) FILTER (WHERE is_question) AS user_messages,
           count(*) FILTER (WHERE is_answer) AS answers,
           count(*) FILTER (WHERE is_response) AS answered_turns,
           count(processing_time_ms) FILTER (WHERE is_answer) AS timed_answers,
           sum(processing_time_ms) FILTER (WHERE is_answer) AS processing_ms,
           max(processing_time_ms) FILTER (WHERE is_answer) AS slowest_ms,
           (array_agg(created_at ORDER BY seq) FILTER (WHERE is_question))[1] AS first_question_at,
           (array_agg(created_at ORDER BY seq) FILTER (WHERE is_answer))[1] AS first_answer_at,
           (array_agg(created_at ORDER BY seq) FILTER (WHERE is_answer AND is_asked))[1] AS first_asked_answer_at,
           (array_agg(role ORDER BY seq DESC))[1] AS last_role
    FROM news
    WHERE sign = 1
    GROUP BY session_id
), stands AS MATERIALIZED (
    SELECT r.session_id, r.user_id, r.started_at,
           least(o.first_message_at, g.first_message_at) AS first_message_at,
           greatest(o.last_message_at, g.last_message_at) AS last_message_at,
           coalesce(o.first_question_at, g.first_question_at) AS first_question_at,
           coalesce(o.processing_ms, 0) + coalesce(g.processing_ms, 0) AS processing_ms,
           (r.started_at AT TIME ZONE $2)::date AS day,
           r.messages,
           coalesce(o.user_messages, 0) + coalesce(g.user_messages, 0) AS user_messages,
           coalesce(o.answers, 0) + coalesce(g.answers, 0) AS answers,
           coalesce(o.answered_turns, 0) + coalesce(g.answered_turns, 0) AS answered_turns,
           coalesce(o.timed_answers, 0) + coalesce(g.timed_answers, 0) AS timed_answers,
           greatest(o.slowest_ms, g.slowest_ms) AS slowest_ms,
           coalesce(o.first_response_ms, f.ms) AS first_response_ms,
           coalesce(g.last_role, o.last_role) AS last_role,
           coalesce((SELECT repeated FROM stood a WHERE a.session_id = r.session_id), false) AS repeated,
           p.cited, p.cited_days
    FROM reach r
    LEFT JOIN stood o ON o.session_id = r.session_id AND r.counted > 0
    LEFT JOIN gained g ON g.session_id = r.session_id
    LEFT JOIN cited_in c ON c.session_id = r.session_id
    CROSS JOIN LATERAL (
        -- The driver's clocks may disagree: no answer comes before its question.
        SELECT CASE WHEN waited < interval '0' THEN 0 ELSE (extract(epoch FROM waited) * 1000)::bigint END
        FROM (SELECT CASE WHEN o.first_question_at IS NULL THEN g.first_asked_answer_at - g.first_question_at
                          ELSE g.first_answer_at - o.first_question_at END) w(waited)
    ) f(ms)
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(source_key ORDER BY day, source_key), '{}') AS cited,
               coalesce(array_agg(day ORDER BY day, source_key), '{}') AS cited_days
        FROM (
            SELECT * FROM unnest(o.cited, o.cited_days) AS u(source_key, day)
            UNION
            SELECT * FROM unnest(c.source_keys, c.days)
        ) pairs
    ) p
), both_ways AS MATERIALIZED (
    SELECT x.*, x.last_role IS NOT DISTINCT FROM 'user' AS abandoned,
           (extract(epoch FROM x.last_message_at - x.first_message_at) * 1000)::bigint AS duration_ms
    FROM (SELECT -1 AS sign, * FROM stood UNION ALL SELECT 1, * FROM stands) x
), spans AS (
    SELECT date_bin('5 minutes', at, timestamptz '2000-01-01 00:00+00') AS at,
           sum(sessions) AS sessions, sum(user_messages) AS user_messages, sum(answers) AS answers,
           sum(other_messages) AS other_messages, sum(answered_turns) AS answered_turns,
           sum(timed_answers) AS timed_answers, sum(processing_ms) AS processing_ms,
           sum(listed_answers) AS listed_answers, sum(unsourced_answers) AS unsourced_answers,
           sum(fallback_answers) AS fallback_answers, sum(citations) AS citations
    FROM (
        SELECT created_at AS at, 0 AS sessions, sign * is_question::int AS user_messages,
               sign * is_answer::int AS answers, sign * (NOT is_question AND NOT is_answer)::int AS other_messages,
               0 AS answered_turns,
               sign * (is_answer AND processing_time_ms IS NOT NULL)::int AS timed_answers,
               sign * CASE WHEN is_answer THEN coalesce(processing_time_ms, 0) ELSE 0 END::bigint AS processing_ms,
               sign * (is_answer AND source_count IS NOT NULL)::int AS listed_answers,
               sign * (is_answer AND source_count IS NOT DISTINCT FROM 0::smallint)::int AS unsourced_answers,
               sign * (is_answer AND (source_count IS NOT DISTINCT FROM 0::smallint
                   OR said -> 'fallback' IS NOT DISTINCT FROM 'true'::jsonb))::int AS fallback_answers,
               0 AS citations
        FROM news
        UNION ALL
        SELECT previous_at, 0, 0, 0, 0, sign, 0, 0, 0, 0, 0, 0 FROM news WHERE is_response
        UNION ALL
        SELECT started_at, sum(sign), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 FROM both_ways GROUP BY started_at
        UNION ALL
        SELECT created_at, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, sign FROM cited
    ) AS parts
    GROUP BY 1
    HAVING bool_or((sessions, user_messages, answers, other_messages, answered_turns, citations) <> (0, 0, 0, 0, 0, 0))
), put_times AS (
    INSERT INTO chat.rollup_times AS t
    SELECT grain,
           CASE grain WHEN '5 minutes' THEN at WHEN 'hour' THEN date_trunc('hour', at, 'UTC')
                      ELSE (at AT TIME ZONE $2)::date::timestamp AT TIME ZONE 'UTC' END,
           sum(sessions), sum(user_messages), sum(answers), sum(other_messages), sum(answered_turns),
           sum(timed_answers), sum(processing_ms), sum(listed_answers), sum(unsourced_answers),
           sum(fallback_answers), sum(citations)
    FROM spans CROSS JOIN (VALUES ('5 minutes'), ('hour'), ('day')) AS g(grain)
    GROUP BY 1, 2
    ON CONFLICT ON CONSTRAINT rollup_times_pkey DO UPDATE
    SET sessions = t.sessions + excluded.sessions, user_messages = t.user_messages + excluded.user_messages,
        answers = t.answers + excluded.answers, other_messages = t.other_messages + excluded.other_messages,
        answered_turns = t.answered_turns + excluded.answered_turns,
        timed_answers = t.timed_answers + excluded.timed_answers,
        processing_ms = t.processing_ms + excluded.processing_ms,
        listed_answers = t.listed_answers + excluded.listed_answers,
        unsourced_answers = t.unsourced_answers + excluded.unsourced_answers,
        fallback_answers = t.fallback_answers + excluded.fallback_answers,
        citations = t.citations + excluded.citations
), put_latencies AS (
    INSERT INTO chat.rollup_latencies AS t
    SELECT date_trunc('hour', created_at, 'UTC'), chat.rollup_bucket(processing_time_ms), sum(sign)
    FROM news
    WHERE is_answer AND processing_time_ms IS NOT NULL
    GROUP BY 1, 2
    ON CONFLICT ON CONSTRAINT rollup_latencies_pkey DO UPDATE SET answers = t.answers + excluded.answers
), put_latency_days AS (
    INSERT INTO chat.rollup_latency_days AS t
    SELECT day, chat.rollup_bucket(processing_time_ms), sum(sign)
    FROM news
    WHERE is_answer AND processing_time_ms IS NOT NULL
    GROUP BY 1, 2
    ON CONFLICT ON CONSTRAINT rollup_latency_days_pkey DO UPDATE SET answers = t.answers + excluded.answers
), put_session_days AS (
    INSERT INTO chat.rollup_session_days AS t
    SELECT day, sum(sign), sum(sign * (user_messages > 0)::int), sum(sign * (user_messages = 1)::int),
           sum(sign * abandoned::int), sum(sign * repeated::int), sum(sign * messages),
           sum(sign * user_messages), sum(sign * answered_turns), sum(sign * (duration_ms IS NOT NULL)::int),
           sum(sign * coalesce(duration_ms, 0)), sum(sign * (first_response_ms IS NOT NULL)::int),
           sum(sign * coalesce(first_response_ms, 0))
    FROM both_ways
    GROUP BY day
    ON CONFLICT ON CONSTRAINT rollup_session_days_pkey DO UPDATE
    SET sessions = t.sessions + excluded.sessions, engaged = t.engaged + excluded.engaged,
        bounced = t.bounced + excluded.bounced, abandoned = t.abandoned + excluded.abandoned,
        repeated = t.repeated + excluded.repeated, messages = t.messages + excluded.messages,
        turns = t.turns + excluded.turns, answered_turns = t.answered_turns + excluded.answered_turns,
        timed = t.timed + excluded.timed, duration_ms = t.duration_ms + excluded.duration_ms,
        responded = t.responded + excluded.responded,
        first_response_ms = t.first_response_ms + excluded.first_response_ms
), put_histograms AS (
    INSERT INTO chat.rollup_session_histograms AS t
    SELECT day, measure, bucket, sum(sign)
    FROM both_ways CROSS JOIN LATERAL (VALUES
        ('turns', user_messages), ('abandoned_turns', CASE WHEN abandoned THEN user_messages END),
        ('messages', messages), ('duration', chat.rollup_bucket(duration_ms)),
        ('first_response', chat.rollup_bucket(first_response_ms))
    ) AS h(measure, bucket)
    WHERE bucket IS NOT NULL
    GROUP BY day, measure, bucket
    HAVING sum(sign) <> 0
    ON CONFLICT ON CONSTRAINT rollup_session_histograms_pkey DO UPDATE SET sessions = t.sessions + excluded.sessions
), put_sources AS (
    INSERT INTO chat.rollup_sources (source_key, source) SELECT DISTINCT source_key, source FROM cited
    ON CONFLICT ON CONSTRAINT rollup_sources_pkey DO NOTHING
), citing AS (
    SELECT b.sign, u.source_key, u.day,
           lag(u.day) OVER (PARTITION BY b.sign, b.session_id, u.source_key ORDER BY u.day) AS previous_day
    FROM both_ways b CROSS JOIN LATERAL unnest(b.cited, b.cited_days) AS u(source_key, day)
), put_source_days AS (
    INSERT INTO chat.rollup_source_days AS t
    SELECT day, source_key, sum(citations), sum(sessions)
    FROM (SELECT day, source_key, sign AS citations, 0 AS sessions FROM cited
          UNION ALL SELECT day, source_key, 0, sign FROM citing) AS parts
    GROUP BY day, source_key
    HAVING sum(citations) <> 0 OR sum(sessions) <> 0
    ON CONFLICT ON CONSTRAINT rollup_source_days_pkey DO UPDATE
    SET citations = t.citations + excluded.citations, sessions = t.sessions + excluded.sessions
), put_source_again AS (
    INSERT INTO chat.rollup_source_again AS t
    SELECT day, previous_day, source_key, sum(sign)
    FROM citing
    WHERE previous_day IS NOT NULL
    GROUP BY day, previous_day, source_key
    HAVING sum(sign) <> 0
    ON CONFLICT ON CONSTRAINT rollup_source_again_pkey DO UPDATE SET sessions = t.sessions + excluded.sessions
), put_sessions AS (
    INSERT INTO chat.rollup_sessions AS t SELECT * FROM stands
    ON CONFLICT ON CONSTRAINT rollup_sessions_pkey DO UPDATE
    SET user_id = excluded.user_id, started_at = excluded.started_at, first_message_at = excluded.first_message_at,
        last_message_at = excluded.last_message_at, first_question_at = excluded.first_question_at,
        processing_ms = excluded.processing_ms, day = excluded.day, messages = excluded.messages,
        user_messages = excluded.user_messages, answers = excluded.answers,
        answered_turns = excluded.answered_turns, timed_answers = excluded.timed_answers,
        slowest_ms = excluded.slowest_ms, first_response_ms = excluded.first_response_ms,
        last_role = excluded.last_role, repeated = excluded.repeated,
        cited = excluded.cited, cited_days = excluded.cited_days
), forgotten AS (
    DELETE FROM chat.rollup_sessions WHERE session_id = ANY($1) AND session_id NOT IN (SELECT session_id FROM reach)
)
-- Days as numbers: one in the year 10000 is a day, and none of Python's.
SELECT 'wrote' AS what, user_id, day - date '2000-01-01' AS day, NULL::timestamptz AS started_at, NULL::uuid AS session_id, sum(sign)::int AS change
FROM news
WHERE is_question
GROUP BY user_id, day
HAVING sum(sign) <> 0
UNION ALL
SELECT 'moved', user_id, NULL, started_at, session_id, sum(sign)
FROM both_ways
GROUP BY user_id, started_at, session_id
HAVING sum(sign) <> 0
UNION ALL
SELECT 'left', NULL, NULL, NULL, session_id, NULL FROM reach WHERE messages < message_count;

-- count_users --
-- Users $1 wrote $3 messages more on days $2, from 2000-01-01 on. Where that changes on which days a user was active, all of this user's
-- days are taken out and put in again: each is placed by the one before it.
WITH changes AS (
    SELECT user_id, date '2000-01-01' + day AS day, sum(change)::int AS change
    FROM unnest($1::text[], $2::int[], $3::int[]) AS u(user_id, day, change)
    GROUP BY user_id, day
), moved AS (
    SELECT DISTINCT c.user_id
    FROM changes c LEFT JOIN chat.rollup_user_days d USING (user_id, day)
    WHERE (d.user_id IS NULL) <> (coalesce(d.messages, 0) + c.change = 0)
), stood AS MATERIALIZED (
    SELECT d.user_id, d.day, d.messages FROM moved JOIN chat.rollup_user_days d USING (user_id)
), active AS (
    SELECT -1 AS sign, user_id, day FROM stood
    UNION ALL
    SELECT 1, user_id, day
    FROM (SELECT * FROM stood UNION ALL SELECT c.* FROM changes c JOIN moved USING (user_id)) AS days
    GROUP BY user_id, day
    HAVING sum(messages) <> 0
), placed AS MATERIALIZED (
    SELECT sign, user_id, day, date_trunc('week', day)::date AS week, date_trunc('month', day)::date AS month,
           lag(day) OVER w AS previous_day, first_value(day) OVER w AS first_day
    FROM active
    WINDOW w AS (PARTITION BY sign, user_id ORDER BY day)
), put_users AS (
    INSERT INTO chat.rollup_users AS t
    SELECT day, sum(active), sum(new), sum(wau), sum(mau)
    FROM (
        -- A day counts for the windows that end with it and later ones, from where the day before it no longer does.
        SELECT day, sign AS active, sign * (previous_day IS NULL)::int AS new, 0 AS wau, 0 AS mau FROM placed
        UNION ALL SELECT greatest(day, previous_day + 7), 0, 0, sign, 0 FROM placed
        UNION ALL SELECT day + 7, 0, 0, -sign, 0 FROM placed
        UNION ALL SELECT greatest(day, previous_day + 28), 0, 0, 0, sign FROM placed
        UNION ALL SELECT day + 28, 0, 0, 0, -sign FROM placed
    ) AS parts
    GROUP BY day
    HAVING (sum(active), sum(new), sum(wau), sum(mau)) <> (0, 0, 0, 0)
    ON CONFLICT ON CONSTRAINT rollup_users_pkey DO UPDATE
    SET active = t.active + excluded.active, new = t.new + excluded.new, wau = t.wau + excluded.wau,
        mau = t.mau + excluded.mau
), visits AS MATERIALIZED (
    SELECT grain, period, gap, sum(sign) AS users
    FROM (
        SELECT 'day' AS grain, day AS period, coalesce(day - previous_day, 0) AS gap, sign FROM placed
        UNION ALL
        SELECT 'week', week, coalesce((week - date_trunc('week', previous_day)::date) / 7, 0), sign FROM placed
        WHERE previous_day IS NULL OR previous_day < week
        UNION ALL
        SELECT 'month', month,
               coalesce((extract(year FROM month) - extract(year FROM previous_day)) * 12
                   + extract(month FROM month) - extract(month FROM previous_day), 0)::int, sign
        FROM placed
        WHERE previous_day IS NULL OR previous_day < month
    ) AS parts
    GROUP BY grain, period, gap
    HAVING sum(sign) <> 0
), put_visits AS (
    INSERT INTO chat.rollup_visits AS t SELECT * FROM visits
    ON CONFLICT ON CONSTRAINT rollup_visits_pkey DO UPDATE SET users = t.users + excluded.users
), put_lifecycles AS (
    INSERT INTO chat.rollup_lifecycles AS t
    SELECT grain, period, sum(users), sum(users * (gap = 0)::int), sum(users * (gap = 1)::int)
    FROM visits
    GROUP BY grain, period
    ON CONFLICT ON CONSTRAINT rollup_lifecycles_pkey DO UPDATE
    SET active = t.active + excluded.active, new = t.new + excluded.new, kept = t.kept + excluded.kept
), put_retention AS (
    INSERT INTO chat.rollup_retention AS t
    SELECT date_trunc('week', first_day)::date, week, sum(sign)
    FROM placed
    WHERE previous_day IS NULL OR previous_day < week
    GROUP BY 1, 2
    HAVING sum(sign) <> 0
    ON CONFLICT ON CONSTRAINT rollup_retention_pkey DO UPDATE SET users = t.users + excluded.users
), forgotten AS (
    DELETE FROM chat.rollup_user_days d USING changes c
    WHERE (d.user_id, d.day) = (c.user_id, c.day) AND d.messages + c.change = 0
)
INSERT INTO chat.rollup_user_days AS t (user_id, day, messages)
SELECT c.user_id, c.day, c.change
FROM changes c LEFT JOIN chat.rollup_user_days d USING (user_id, day)
WHERE coalesce(d.messages, 0) + c.change <> 0
ON CONFLICT ON CONSTRAINT rollup_user_days_pkey DO UPDATE SET messages = t.messages + excluded.messages;

-- count_repeats --
-- At these places among a user's sessions one came or went: it, and the one after it, may now follow upon another.
WITH touched AS (
    SELECT DISTINCT s.*
    FROM unnest($1::text[], $2::timestamptz[], $3::uuid[]) AS p(user_id, started_at, session_id)
    CROSS JOIN LATERAL (
        SELECT r.session_id, r.user_id, r.started_at, r.repeated
        FROM chat.rollup_sessions r
        WHERE r.user_id = p.user_id AND (r.started_at, r.session_id) >= (p.started_at, p.session_id)
        ORDER BY r.started_at, r.session_id LIMIT 2
    ) s
), judged AS (
    SELECT t.session_id, t.repeated AS was, EXISTS (
        SELECT FROM chat.rollup_sessions e
        WHERE e.user_id = t.user_id AND e.started_at > t.started_at - interval '24 hours'
          AND (e.started_at, e.session_id) < (t.started_at, t.session_id)
    ) AS repeated
    FROM touched t
), changed AS (
    UPDATE chat.rollup_sessions r SET repeated = j.repeated
    FROM judged j
    WHERE r.session_id = j.session_id AND j.repeated <> j.was
    RETURNING r.day, CASE WHEN r.repeated THEN 1 ELSE -1 END AS sign
)
INSERT INTO chat.rollup_session_days AS t (day, repeated)
SELECT day, sum(sign) FROM changed GROUP BY day
ON CONFLICT ON CONSTRAINT rollup_session_days_pkey DO UPDATE SET repeated = t.repeated + excluded.repeated;

-- begin_anew --
UPDATE chat.rollup_state
SET timezone = $1, complete = false, backfilled_from = NULL, backfilled = 0, rounds = rounds + 1 WHERE id = 1;

-- The named reports. A query begins with its name between dashes, then a sentence that says what it counts.
--
-- Parameters: since and until, instants, since inclusive and until exclusive; limit, for rankings.
-- Days are UTC, whatever the time zone of the connection.
-- The ranges stand bare on created_at: wrapped in a function, no index would serve them.

-- sessions_per_day --
-- How many sessions were created on each day of the range; a day without any has 0.
WITH days AS (
    SELECT day::date
    FROM generate_series(
        date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE 'UTC'),
        (CAST(:until AS timestamptz) - interval '1 microsecond') AT TIME ZONE 'UTC',
        interval '1 day'
    ) AS day
), created AS (
    SELECT (created_at AT TIME ZONE 'UTC')::date AS day, count(*) AS sessions
    FROM analytics.sessions
    WHERE created_at >= :since AND created_at < :until
    GROUP BY 1
)
SELECT day, coalesce(sessions, 0) AS sessions
FROM days LEFT JOIN created USING (day)
ORDER BY day;

-- messages_by_role --
-- How many messages each role wrote in the range, and their percentage of all; most first.
SELECT role, count(*) AS messages, (100.0 * count(*) / sum(count(*)) OVER ())::double precision AS percent
FROM analytics.messages
WHERE created_at >= :since AND created_at < :until
GROUP BY role
ORDER BY messages DESC, role;

-- response_time --
-- How long the assistant's answers of the range took, over those that say so (timed_answers): average,
-- median (p50) and 95th percentile, both interpolated.
SELECT count(*) AS answers,
       count(processing_time_ms) AS timed_answers,
       avg(processing_time_ms)::double precision AS avg_ms,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY processing_time_ms) AS p50_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY processing_time_ms) AS p95_ms
FROM analytics.messages
WHERE role = 'assistant' AND created_at >= :since AND created_at < :until;

-- active_users --
-- How many users wrote a message on each day of the range (dau), and in the 7 days (wau) and 28 days (mau)
-- that end with it; the days before the range's begin are looked at, what is after its end is not.
WITH days AS (
    SELECT day::date, day >= first_day AS reported
    FROM date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE 'UTC') AS first_day,
        generate_series(
            first_day - interval '27 days',
            (CAST(:until AS timestamptz) - interval '1 microsecond') AT TIME ZONE 'UTC',
            interval '1 day'
        ) AS day
), active AS (
    SELECT user_id, (created_at AT TIME ZONE 'UTC')::date AS day
    FROM analytics.messages
    WHERE role = 'user'
      AND created_at
          >= (date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE 'UTC') - interval '27 days') AT TIME ZONE 'UTC'
      AND created_at < :until
    GROUP BY 1, 2
), visits AS (
    SELECT day, lead(day) OVER (PARTITION BY user_id ORDER BY day) AS next_day
    FROM active
), changes AS (
    -- A visit counts until the user's next one takes over, and for 7 or 28 days at most.
    SELECT day, 1 AS dau, 1 AS wau, 1 AS mau FROM visits
    UNION ALL
    SELECT least(next_day, day + 7), 0, -1, 0 FROM visits
    UNION ALL
    SELECT least(next_day, day + 28), 0, 0, -1 FROM visits
), counts AS (
    SELECT day, reported,
           coalesce(sum(dau), 0) AS dau,
           coalesce(sum(sum(wau)) OVER so_far, 0)::bigint AS wau,
           coalesce(sum(sum(mau)) OVER so_far, 0)::bigint AS mau
    FROM days LEFT JOIN changes USING (day)
    GROUP BY day, reported
    WINDOW so_far AS (ORDER BY day)
)
SELECT day, dau, wau, mau
FROM counts
WHERE reported
ORDER BY day;

-- top_sources --
-- How many of the assistant's answers of the range cite each source, an answer counting once, and in how
-- many sessions; most cited first.
WITH members AS (
    -- Strict and silent: what is not an array of sources, or not a text in it, is passed over.
    SELECT session_id, seq,
           jsonb_path_query(metadata, 'strict $.sources[*] ? (@.type() == "string")', silent => true) AS member
    FROM analytics.messages
    WHERE role = 'assistant' AND source_count > 0 AND created_at >= :since AND created_at < :until
), cited AS (
    SELECT DISTINCT session_id, seq, member #>> '{}' AS source
    FROM members
)
SELECT source, count(*) AS citations, count(DISTINCT session_id) AS sessions
FROM cited
GROUP BY source
ORDER BY citations DESC, source COLLATE "C"
LIMIT :limit;

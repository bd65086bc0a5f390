-- The named reports. A query begins with its name between dashes, then one or two sentences that say what it counts;
-- behind the name with another word stands the same report from other views:
--
--     name           from roll-ups: of days, or of hours where it reads messages_hourly
--     name hours     from roll-ups of hours, where the range is not made of days of the roll-ups' zone
--     name plain     from the messages themselves: any range, any zone, one user; the same numbers, percentiles interpolated
--     name folded    from the messages alone, a week at most: rows whose question is the same without accents, case and
--                    punctuation are then added up, and the most frequent kept (app/analytics/questions.py)
--
-- Parameters: since and until, instants, since inclusive and until exclusive; first_day and end_day, the same as days of
-- timezone; granularity: hour, day, week, or month; user_id, or NULL; limit, for rankings.
-- Days are those of timezone, whatever the time zone of the connection.
-- The ranges stand bare on columns: wrapped in a function, no index would serve them.

-- summary --
-- The figures of the range beside those of the range of equal length before it: sessions, active users, messages, 95th
-- percentile of the response time (within 2.5 %), and the share of users' messages without an answer as the next message. Change is the difference over the previous value.
WITH ranges(which, first_day, end_day) AS (
    VALUES ('value', CAST(:first_day AS date), CAST(:end_day AS date)),
           ('previous', CAST(:first_day AS date) - (CAST(:end_day AS date) - CAST(:first_day AS date)), CAST(:first_day AS date))
), figures AS (
    SELECT which, metric, figure
    FROM ranges r
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(sessions), 0)::double precision AS sessions,
               coalesce(sum(messages), 0)::double precision AS messages,
               sum(user_messages - answered_turns)::double precision / nullif(sum(user_messages), 0) AS unanswered_rate
        FROM analytics.messages_daily
        WHERE day >= r.first_day AND day < r.end_day
    ) written
    CROSS JOIN LATERAL (
        SELECT min(about_ms) FILTER (WHERE so_far >= 0.95 * total) AS p95_ms
        FROM (
            SELECT about_ms, sum(answers) OVER (ORDER BY bucket) AS so_far, sum(answers) OVER () AS total
            FROM (
                SELECT bucket, about_ms, sum(answers) AS answers
                FROM analytics.response_times_daily
                WHERE day >= r.first_day AND day < r.end_day
                GROUP BY bucket, about_ms
            ) counted
        ) running
    ) timed
    CROSS JOIN LATERAL (
        VALUES (1, 'sessions', sessions), (2, 'active_users', analytics.active_users(r.first_day, r.end_day)), (3, 'messages', messages),
               (4, 'response_time_p95_ms', p95_ms), (5, 'unanswered_rate', unanswered_rate)
    ) AS named(place, metric, figure)
)
SELECT metric,
       min(figure) FILTER (WHERE which = 'value') AS value,
       min(figure) FILTER (WHERE which = 'previous') AS previous,
       (min(figure) FILTER (WHERE which = 'value') - min(figure) FILTER (WHERE which = 'previous'))
           / nullif(min(figure) FILTER (WHERE which = 'previous'), 0) AS change
FROM figures
GROUP BY metric
ORDER BY array_position(
    ARRAY['sessions', 'active_users', 'messages', 'response_time_p95_ms', 'unanswered_rate'], metric
);

-- sessions_per_day --
-- How many sessions were created on each day of the range; a day without any has 0.
SELECT day::date AS day, coalesce(sessions, 0) AS sessions
FROM generate_series(CAST(:first_day AS date)::timestamp, CAST(:end_day AS date) - interval '1 day', interval '1 day') AS days(day)
LEFT JOIN analytics.messages_daily USING (day)
ORDER BY day;

-- sessions_per_day hours --
WITH days AS (
    SELECT day::date
    FROM generate_series(
        date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE :timezone),
        (CAST(:until AS timestamptz) - interval '1 microsecond') AT TIME ZONE :timezone,
        interval '1 day'
    ) AS day
), created AS (
    SELECT (at AT TIME ZONE :timezone)::date AS day, sum(sessions)::bigint AS sessions
    FROM analytics.messages_hourly AS t(at)
    WHERE at >= :since AND at < :until
    GROUP BY 1
)
SELECT day, coalesce(sessions, 0) AS sessions
FROM days LEFT JOIN created USING (day)
ORDER BY day;

-- sessions_per_day plain --
WITH days AS (
    SELECT day::date
    FROM generate_series(
        date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE :timezone),
        (CAST(:until AS timestamptz) - interval '1 microsecond') AT TIME ZONE :timezone,
        interval '1 day'
    ) AS day
), created AS (
    SELECT (created_at AT TIME ZONE :timezone)::date AS day, count(*) AS sessions
    FROM analytics.sessions
    WHERE created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
    GROUP BY 1
)
SELECT day, coalesce(sessions, 0) AS sessions
FROM days LEFT JOIN created USING (day)
ORDER BY day;

-- traffic --
-- How many sessions were created in each period of the range, and how many messages were written: all, users' and
-- assistant's. A period at the edge has what lies in the range.
WITH periods AS (
    SELECT DISTINCT date_trunc(:granularity, day) AS period
    FROM generate_series(CAST(:first_day AS date)::timestamp, CAST(:end_day AS date) - interval '1 day', interval '1 day') AS days(day)
), counted AS (
    SELECT date_trunc(:granularity, day::timestamp) AS period, sum(sessions)::bigint AS sessions,
           sum(messages)::bigint AS messages, sum(user_messages)::bigint AS user_messages, sum(answers)::bigint AS answers
    FROM analytics.messages_daily
    WHERE day >= :first_day AND day < :end_day
    GROUP BY 1
)
SELECT period, coalesce(sessions, 0) AS sessions, coalesce(messages, 0) AS messages,
       coalesce(user_messages, 0) AS user_messages, coalesce(answers, 0) AS bot_messages
FROM periods LEFT JOIN counted USING (period)
ORDER BY period;

-- traffic hours --
WITH periods AS (
    SELECT DISTINCT date_trunc(:granularity, at, :timezone) AS at
    FROM (
        SELECT generate_series(CAST(:since AS timestamptz), CAST(:until AS timestamptz), interval '1 hour')
        UNION ALL
        SELECT CAST(:until AS timestamptz) - interval '1 microsecond'
    ) AS instants(at)
    WHERE at < :until
), counted AS (
    SELECT date_trunc(:granularity, at, :timezone) AS at, sum(sessions)::bigint AS sessions,
           sum(messages)::bigint AS messages, sum(user_messages)::bigint AS user_messages, sum(answers)::bigint AS answers
    FROM analytics.messages_hourly AS t(at)
    WHERE at >= :since AND at < :until
    GROUP BY 1
)
SELECT at AT TIME ZONE :timezone AS period, coalesce(sessions, 0) AS sessions, coalesce(messages, 0) AS messages,
       coalesce(user_messages, 0) AS user_messages, coalesce(answers, 0) AS bot_messages
FROM periods LEFT JOIN counted USING (at)
ORDER BY at;

-- traffic plain --
WITH periods AS (
    SELECT DISTINCT date_trunc(:granularity, at, :timezone) AS at
    FROM (
        SELECT generate_series(CAST(:since AS timestamptz), CAST(:until AS timestamptz), interval '1 hour')
        UNION ALL
        SELECT CAST(:until AS timestamptz) - interval '1 microsecond'
    ) AS instants(at)
    WHERE at < :until
), counted AS (
    SELECT date_trunc(:granularity, created_at, :timezone) AS at, count(*) FILTER (WHERE role = 'session') AS sessions,
           count(*) FILTER (WHERE role <> 'session') AS messages, count(*) FILTER (WHERE role = 'user') AS user_messages,
           count(*) FILTER (WHERE role = 'assistant') AS answers
    FROM (
        SELECT created_at, user_id, role FROM analytics.messages WHERE created_at >= :since AND created_at < :until
        UNION ALL
        SELECT created_at, user_id, 'session' FROM analytics.sessions WHERE created_at >= :since AND created_at < :until
    ) all_of_it
    WHERE (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
    GROUP BY 1
)
SELECT at AT TIME ZONE :timezone AS period, coalesce(sessions, 0) AS sessions, coalesce(messages, 0) AS messages,
       coalesce(user_messages, 0) AS user_messages, coalesce(answers, 0) AS bot_messages
FROM periods LEFT JOIN counted USING (at)
ORDER BY at;

-- traffic_heatmap --
-- How many sessions were created and messages written in the range, by weekday (1 is Monday) and hour of the day. What has
-- none is left out.
SELECT extract(isodow FROM at AT TIME ZONE :timezone)::integer AS weekday,
       extract(hour FROM at AT TIME ZONE :timezone)::integer AS hour,
       sum(sessions)::bigint AS sessions, sum(messages)::bigint AS messages
FROM analytics.messages_hourly AS t(at)
WHERE at >= :since AND at < :until
GROUP BY 1, 2
ORDER BY 1, 2;

-- traffic_heatmap plain --
SELECT extract(isodow FROM created_at AT TIME ZONE :timezone)::integer AS weekday,
       extract(hour FROM created_at AT TIME ZONE :timezone)::integer AS hour,
       count(*) FILTER (WHERE is_session) AS sessions, count(*) FILTER (WHERE NOT is_session) AS messages
FROM (
    SELECT created_at, user_id, false AS is_session FROM analytics.messages WHERE created_at >= :since AND created_at < :until
    UNION ALL
    SELECT created_at, user_id, true FROM analytics.sessions WHERE created_at >= :since AND created_at < :until
) all_of_it
WHERE (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
GROUP BY 1, 2
ORDER BY 1, 2;

-- messages_by_role --
-- How many messages each role wrote in the range, and their percentage of all; most first.
WITH counted AS (
    SELECT coalesce(sum(user_messages), 0)::bigint AS users, coalesce(sum(answers), 0)::bigint AS answers,
           coalesce(sum(other_messages), 0)::bigint AS others
    FROM analytics.messages_daily
    WHERE day >= :first_day AND day < :end_day
), roles AS (
    SELECT 'user' AS role, users AS messages FROM counted
    UNION ALL
    SELECT 'assistant', answers FROM counted
    UNION ALL
    -- Called only where there are any, which is not the rule: its begin is made of the count, so it can't be called first.
    SELECT other.role, other.messages
    FROM (SELECT others FROM counted WHERE others > 0) needed
    CROSS JOIN LATERAL analytics.messages_of_other_roles(CASE WHEN needed.others > 0 THEN CAST(:since AS timestamptz) END, :until) other
)
SELECT role, messages, (100.0 * messages / sum(messages) OVER ())::double precision AS percent
FROM roles
WHERE messages > 0
ORDER BY messages DESC, role;

-- messages_by_role hours --
WITH counted AS (
    SELECT coalesce(sum(user_messages), 0)::bigint AS users, coalesce(sum(answers), 0)::bigint AS answers,
           coalesce(sum(other_messages), 0)::bigint AS others
    FROM analytics.messages_hourly AS t(at)
    WHERE at >= :since AND at < :until
), roles AS (
    SELECT 'user' AS role, users AS messages FROM counted
    UNION ALL
    SELECT 'assistant', answers FROM counted
    UNION ALL
    SELECT other.role, other.messages
    FROM (SELECT others FROM counted WHERE others > 0) needed
    CROSS JOIN LATERAL analytics.messages_of_other_roles(CASE WHEN needed.others > 0 THEN CAST(:since AS timestamptz) END, :until) other
)
SELECT role, messages, (100.0 * messages / sum(messages) OVER ())::double precision AS percent
FROM roles
WHERE messages > 0
ORDER BY messages DESC, role;

-- messages_by_role plain --
SELECT role, count(*) AS messages, (100.0 * count(*) / sum(count(*)) OVER ())::double precision AS percent
FROM analytics.messages
WHERE created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
GROUP BY role
ORDER BY messages DESC, role;

-- response_time --
-- How long the assistant's answers of the range took, over those that say so (timed_answers): average, median (p50) and
-- 95th percentile, each as of the answer that half or 95 % do not exceed, within 2.5 %; interpolated where read from messages.
WITH counted AS (
    SELECT bucket, about_ms, sum(answers) AS answers
    FROM analytics.response_times_daily
    WHERE day >= :first_day AND day < :end_day
    GROUP BY bucket, about_ms
), running AS (
    SELECT about_ms, sum(answers) OVER (ORDER BY bucket) AS so_far, sum(answers) OVER () AS total
    FROM counted
), written AS (
    SELECT coalesce(sum(answers), 0)::bigint AS answers, coalesce(sum(timed_answers), 0)::bigint AS timed_answers,
           (sum(processing_ms) / nullif(sum(timed_answers), 0))::double precision AS avg_ms
    FROM analytics.messages_daily
    WHERE day >= :first_day AND day < :end_day
)
SELECT answers, timed_answers, avg_ms,
       (SELECT min(about_ms) FROM running WHERE so_far >= 0.5 * total) AS p50_ms,
       (SELECT min(about_ms) FROM running WHERE so_far >= 0.95 * total) AS p95_ms
FROM written;

-- response_time hours --
WITH counted AS (
    SELECT bucket, about_ms, sum(answers) AS answers
    FROM analytics.response_times
    WHERE hour >= :since AND hour < :until
    GROUP BY bucket, about_ms
), running AS (
    SELECT about_ms, sum(answers) OVER (ORDER BY bucket) AS so_far, sum(answers) OVER () AS total
    FROM counted
), written AS (
    SELECT coalesce(sum(answers), 0)::bigint AS answers, coalesce(sum(timed_answers), 0)::bigint AS timed_answers,
           (sum(processing_ms) / nullif(sum(timed_answers), 0))::double precision AS avg_ms
    FROM analytics.messages_hourly
    WHERE hour >= :since AND hour < :until
)
SELECT answers, timed_answers, avg_ms,
       (SELECT min(about_ms) FROM running WHERE so_far >= 0.5 * total) AS p50_ms,
       (SELECT min(about_ms) FROM running WHERE so_far >= 0.95 * total) AS p95_ms
FROM written;

-- response_time plain --
SELECT count(*) AS answers,
       count(processing_time_ms) AS timed_answers,
       avg(processing_time_ms)::double precision AS avg_ms,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY processing_time_ms) AS p50_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY processing_time_ms) AS p95_ms
FROM analytics.messages
WHERE role = 'assistant' AND created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id);

-- response_time_percentiles --
-- How long the assistant's answers of each period of the range took, over those that say so: what 50, 75, 90, 95 and 99 % do
-- not exceed, within 2.5 %; interpolated where read from messages. A period without any is left out.
WITH counted AS (
    -- Whole numbers as double precision, which is exact: numeric would take twice as long.
    SELECT day::timestamp AS period, bucket, about_ms, answers::double precision AS answers
    FROM analytics.response_times_daily
    WHERE day >= :first_day AND day < :end_day AND :granularity = 'day'
    UNION ALL
    -- Longer periods have few buckets of many rows. One of the two is not read.
    SELECT date_trunc(:granularity, day::timestamp), bucket, about_ms, sum(answers::double precision)
    FROM analytics.response_times_daily
    WHERE day >= :first_day AND day < :end_day AND :granularity <> 'day'
    GROUP BY 1, 2, 3
), running AS (
    SELECT period, about_ms, 100 * sum(answers) OVER (PARTITION BY period ORDER BY bucket ROWS UNBOUNDED PRECEDING) AS so_far,
           sum(answers) OVER (PARTITION BY period) AS total
    FROM counted
)
SELECT period, min(total)::bigint AS timed_answers,
       min(about_ms) FILTER (WHERE so_far >= 50 * total) AS p50_ms,
       min(about_ms) FILTER (WHERE so_far >= 75 * total) AS p75_ms,
       min(about_ms) FILTER (WHERE so_far >= 90 * total) AS p90_ms,
       min(about_ms) FILTER (WHERE so_far >= 95 * total) AS p95_ms,
       min(about_ms) FILTER (WHERE so_far >= 99 * total) AS p99_ms
FROM running
GROUP BY period
ORDER BY period;

-- response_time_percentiles hours --
WITH counted AS (
    SELECT date_trunc(:granularity, hour, :timezone) AT TIME ZONE :timezone AS period, bucket, about_ms, sum(answers) AS answers
    FROM analytics.response_times
    WHERE hour >= :since AND hour < :until
    GROUP BY 1, 2, 3
), running AS (
    SELECT period, about_ms, sum(answers) OVER (PARTITION BY period ORDER BY bucket) AS so_far,
           sum(answers) OVER (PARTITION BY period) AS total
    FROM counted
)
SELECT period, total::bigint AS timed_answers,
       min(about_ms) FILTER (WHERE so_far >= 0.5 * total) AS p50_ms,
       min(about_ms) FILTER (WHERE so_far >= 0.75 * total) AS p75_ms,
       min(about_ms) FILTER (WHERE so_far >= 0.9 * total) AS p90_ms,
       min(about_ms) FILTER (WHERE so_far >= 0.95 * total) AS p95_ms,
       min(about_ms) FILTER (WHERE so_far >= 0.99 * total) AS p99_ms
FROM running
GROUP BY period, total
ORDER BY period;

-- response_time_percentiles plain --
SELECT date_trunc(:granularity, created_at, :timezone) AT TIME ZONE :timezone AS period,
       count(*) AS timed_answers,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY processing_time_ms) AS p50_ms,
       percentile_cont(0.75) WITHIN GROUP (ORDER BY processing_time_ms) AS p75_ms,
       percentile_cont(0.9) WITHIN GROUP (ORDER BY processing_time_ms) AS p90_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY processing_time_ms) AS p95_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY processing_time_ms) AS p99_ms
FROM analytics.messages
WHERE role = 'assistant' AND processing_time_ms IS NOT NULL AND created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
GROUP BY 1
ORDER BY 1;

-- response_time_histogram --
-- How many of the assistant's answers of the range took about so long, each within 2.5 %.
SELECT about_ms, sum(answers)::bigint AS answers
FROM analytics.response_times_daily
WHERE day >= :first_day AND day < :end_day
GROUP BY bucket, about_ms
ORDER BY bucket;

-- response_time_histogram hours --
SELECT about_ms, sum(answers)::bigint AS answers
FROM analytics.response_times
WHERE hour >= :since AND hour < :until
GROUP BY bucket, about_ms
ORDER BY bucket;

-- unanswered_rate --
-- Of the users' messages of each period, those whose very next message is not the assistant's; of the answers, those without
-- any source in their list, or with metadata.fallback = true (fallback_rate). A period without messages is left out.
WITH counted AS (
    SELECT date_trunc(:granularity, at, :timezone) AT TIME ZONE :timezone AS period,
           sum(user_messages)::bigint AS user_messages, sum(answered_turns)::bigint AS answered_turns,
           sum(answers)::bigint AS answers, sum(fallback_answers)::bigint AS fallback_answers
    FROM analytics.messages_hourly AS t(at)
    WHERE at >= :since AND at < :until
    GROUP BY 1
)
SELECT period, user_messages, user_messages - answered_turns AS unanswered,
       (user_messages - answered_turns)::double precision / nullif(user_messages, 0) AS unanswered_rate,
       answers, fallback_answers, fallback_answers::double precision / nullif(answers, 0) AS fallback_rate
FROM counted
WHERE user_messages + answers > 0
ORDER BY period;

-- unanswered_rate plain --
WITH counted AS (
    SELECT date_trunc(:granularity, created_at, :timezone) AT TIME ZONE :timezone AS period,
           count(*) FILTER (WHERE role = 'user') AS user_messages, count(*) FILTER (WHERE answered) AS answered_turns,
           count(*) FILTER (WHERE role = 'assistant') AS answers, count(*) FILTER (WHERE fallback) AS fallback_answers
    FROM (
        SELECT created_at, user_id, role, false AS answered,
               source_count = 0 OR metadata @> '{"fallback": true}' AS fallback
        FROM analytics.messages
        WHERE role = 'assistant' AND created_at >= :since AND created_at < :until
        UNION ALL
        SELECT asked_at, user_id, 'user', answer_seq IS NOT NULL, false
        FROM analytics.turns
        WHERE asked_at >= :since AND asked_at < :until
    ) written
    WHERE (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
    GROUP BY 1
)
SELECT period, user_messages, user_messages - answered_turns AS unanswered,
       (user_messages - answered_turns)::double precision / nullif(user_messages, 0) AS unanswered_rate,
       answers, fallback_answers, fallback_answers::double precision / nullif(answers, 0) AS fallback_rate
FROM counted
ORDER BY period;

-- session_outcomes --
-- Of the sessions created in each period: those with a user's message (engaged), with exactly one (bounce), whose last message
-- is the user's (abandonment), and whose user had created another in the 24 hours before (repeat contact). A period without sessions is left out.
SELECT date_trunc(:granularity, day::timestamp) AS period, sum(sessions)::bigint AS sessions,
       sum(engaged_sessions)::bigint AS engaged_sessions,
       (sum(engaged_sessions) / sum(sessions))::double precision AS engaged_session_rate,
       (sum(bounced_sessions) / sum(sessions))::double precision AS bounce_rate,
       (sum(abandoned_sessions) / sum(sessions))::double precision AS abandonment_rate,
       (sum(repeat_sessions) / sum(sessions))::double precision AS repeat_contact_rate
FROM analytics.sessions_daily
WHERE day >= :first_day AND day < :end_day
GROUP BY 1
ORDER BY 1;

-- session_duration --
-- How long sessions created in the range lasted, from first to last message: average, and what 50, 75, 90, 95 and 99 % do not
-- exceed, within 2.5 %. Sessions without a message are left out.
SELECT sessions, average AS avg_ms, p50 AS p50_ms, p75 AS p75_ms, p90 AS p90_ms, p95 AS p95_ms, p99 AS p99_ms
FROM analytics.session_quantiles('duration', :first_day, :end_day);

-- first_response_time --
-- How long sessions created in the range waited from the first question to the first answer after it: average, and what 50, 75,
-- 90, 95 and 99 % do not exceed, within 2.5 %. Sessions without such an answer are left out.
SELECT sessions, average AS avg_ms, p50 AS p50_ms, p75 AS p75_ms, p90 AS p90_ms, p95 AS p95_ms, p99 AS p99_ms
FROM analytics.session_quantiles('first_response', :first_day, :end_day);

-- turns_per_session --
-- How many messages of the user sessions created in the range have: average, and what 50, 75, 90, 95 and 99 % do not exceed.
SELECT sessions, average AS avg, p50, p75, p90, p95, p99
FROM analytics.session_quantiles('turns', :first_day, :end_day);

-- messages_per_session --
-- How many messages sessions created in the range have: average, and what 50, 75, 90, 95 and 99 % do not exceed.
SELECT sessions, average AS avg, p50, p75, p90, p95, p99
FROM analytics.session_quantiles('messages', :first_day, :end_day);

-- drop_off --
-- How many sessions created in the range reach so many messages of the user, their share of all, and how many of those that end
-- there have the user's as their last message.
WITH counted AS (
    -- Both measures at once: the view session_turns_daily joins them, day by day.
    SELECT bucket AS turns, sum(sessions) FILTER (WHERE measure = 'turns') AS sessions,
           coalesce(sum(sessions) FILTER (WHERE measure = 'abandoned_turns'), 0)::bigint AS abandoned_sessions
    FROM analytics.session_measures_daily
    WHERE measure IN ('turns', 'abandoned_turns') AND day >= :first_day AND day < :end_day
    GROUP BY bucket
)
SELECT turns, (sum(sessions) OVER (ORDER BY turns DESC))::bigint AS sessions,
       (sum(sessions) OVER (ORDER BY turns DESC) / sum(sessions) OVER ())::double precision AS share, abandoned_sessions
FROM counted
ORDER BY turns
LIMIT :limit;

-- active_users --
-- How many users wrote a message on each day of the range (dau), and in the 7 days (wau) and 28 days (mau)
-- that end with it; the days before the range's begin are looked at, what is after its end is not.
SELECT day::date AS day, coalesce(active_users, 0) AS dau, coalesce(wau, 0) AS wau, coalesce(mau, 0) AS mau
FROM generate_series(CAST(:first_day AS date), CAST(:end_day AS date) - 1, interval '1 day') AS days(day)
LEFT JOIN analytics.users_daily USING (day)
ORDER BY day;

-- active_users plain --
WITH days AS (
    SELECT day::date, day >= first_day AS reported
    FROM date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE :timezone) AS first_day,
        generate_series(
            first_day - interval '27 days',
            (CAST(:until AS timestamptz) - interval '1 microsecond') AT TIME ZONE :timezone,
            interval '1 day'
        ) AS day
), active AS (
    SELECT user_id, (created_at AT TIME ZONE :timezone)::date AS day
    FROM analytics.messages
    WHERE role = 'user'
      AND created_at
          >= (date_trunc('day', CAST(:since AS timestamptz) AT TIME ZONE :timezone) - interval '27 days') AT TIME ZONE :timezone
      AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
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

-- stickiness --
-- How many users wrote on each day of the range, as a share of those who did in the 28 days that end with it. A day at the
-- end of 28 days without any user is left out.
SELECT day, active_users AS dau, mau, stickiness
FROM analytics.users_daily
WHERE day >= :first_day AND day < :end_day
ORDER BY day;

-- new_users --
-- How many users wrote in each period that begins in the range, all of it counted: for the first time (new), having written in the
-- period before (returning), or only earlier (resurrecting); dormant are those of the period before who did not.
SELECT period::timestamp AS period, active_users, new_users, returning_users, resurrecting_users, dormant_users
FROM analytics.users_lifecycle
WHERE grain = :granularity AND period >= :first_day AND period < :end_day
ORDER BY period;

-- sessions_per_user --
-- How many sessions were created in the range, how many users wrote in it, and the one over the other.
SELECT sessions, users, sessions::double precision / nullif(users, 0) AS sessions_per_user
FROM (
    SELECT coalesce(sum(sessions), 0)::bigint AS sessions
    FROM analytics.sessions_daily
    WHERE day >= :first_day AND day < :end_day
) created
CROSS JOIN analytics.active_users(:first_day, :end_day) AS active(users);

-- retention --
-- Users by the week in which they wrote first, if that begins in the range, and the share of them who wrote so many weeks later.
SELECT cohort_week, weeks_later, cohort_users, users, retention AS retention_rate
FROM analytics.retention_weekly
WHERE cohort_week >= :first_day AND cohort_week < :end_day
ORDER BY cohort_week, weeks_later;

-- top_sources --
-- How many of the assistant's answers of the range cite each source, an answer counting once, and in how
-- many sessions; most cited first.
WITH cited AS (
    SELECT source, citations, sessions
    FROM analytics.sources_cited
    WHERE day >= :first_day AND day < :end_day
    UNION ALL
    -- A session that cites it on several days of the range was counted on each.
    SELECT source, 0, -sessions
    FROM analytics.sources_cited_again
    WHERE day >= :first_day AND day < :end_day AND previous_day >= :first_day
)
SELECT source, sum(citations)::bigint AS citations, sum(sessions)::bigint AS sessions
FROM cited
GROUP BY source
ORDER BY citations DESC, source COLLATE "C"
LIMIT :limit;

-- top_sources plain --
WITH members AS (
    -- Strict and silent: what is not an array of sources, or not a text in it, is passed over.
    SELECT session_id, seq,
           jsonb_path_query(metadata, 'strict $.sources[*] ? (@.type() == "string")', silent => true) AS member
    FROM analytics.messages
    WHERE role = 'assistant' AND source_count > 0 AND created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
), cited AS (
    SELECT DISTINCT session_id, seq, member #>> '{}' AS source
    FROM members
)
SELECT source, count(*) AS citations, count(DISTINCT session_id) AS sessions
FROM cited
GROUP BY source
ORDER BY citations DESC, source COLLATE "C"
LIMIT :limit;

-- uncited_sources --
-- Sources that answers cite before the range, and none in it: when they were last cited before, and by how many answers; most
-- cited first.
SELECT source, max(day) AS last_cited, sum(citations)::bigint AS citations
FROM analytics.sources_cited
WHERE day < :end_day
GROUP BY source
HAVING NOT bool_or(day >= :first_day)
ORDER BY citations DESC, source COLLATE "C"
LIMIT :limit;

-- top_questions folded --
-- How often users asked the same in the range: messages whose first 200 characters have the same words, whatever their accents,
-- case and punctuation, as most of them write it; when last, and the newest session with it.
SELECT left(content, 200) AS question, count(*) AS asked, max(created_at) AS last_asked, max(session_id::text) AS session_id
FROM analytics.messages
WHERE role = 'user' AND created_at >= :since AND created_at < :until
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
GROUP BY 1
ORDER BY asked DESC, left(content, 200) COLLATE "C"
LIMIT :different;

-- unanswered_questions folded --
-- The same as top_questions, of those messages whose very next message is not the assistant's, or is one without any source in
-- its list, or with metadata.fallback = true.
SELECT left(question, 200) AS question, count(*) AS asked, max(asked_at) AS last_asked, max(session_id::text) AS session_id
FROM analytics.turns
WHERE asked_at >= :since AND asked_at < :until AND (answer_seq IS NULL OR is_fallback)
  AND (CAST(:user_id AS text) IS NULL OR user_id = :user_id)
GROUP BY 1
ORDER BY asked DESC, left(question, 200) COLLATE "C"
LIMIT :different;

-- sources_per_answer --
-- How many sources the assistant's answers of each period cite, and the share of answers with at least one, both over the answers
-- that list their sources. A period without any is left out.
SELECT date_trunc(:granularity, at, :timezone) AT TIME ZONE :timezone AS period,
       sum(listed_answers)::bigint AS listed_answers,
       (sum(citations) / sum(listed_answers))::double precision AS sources_per_answer,
       (1 - sum(unsourced_answers) / sum(listed_answers))::double precision AS sourced_rate
FROM analytics.messages_hourly AS t(at)
WHERE at >= :since AND at < :until
GROUP BY 1
HAVING sum(listed_answers) > 0
ORDER BY 1;

-- longest_sessions --
-- The sessions created in the range with the most messages; at most 50 of a day.
SELECT session_id, user_id, started_at, messages, turns, duration_ms
FROM analytics.longest_sessions
WHERE day >= :first_day AND day < :end_day
ORDER BY messages DESC, session_id
LIMIT least(:limit, 50);

-- slowest_sessions --
-- The sessions created in the range by how long their slowest answer took; at most 50 of a day.
SELECT session_id, user_id, started_at, slowest_ms
FROM analytics.slowest_sessions
WHERE day >= :first_day AND day < :end_day
ORDER BY slowest_ms DESC, session_id
LIMIT least(:limit, 50);

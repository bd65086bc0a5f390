"""Measures, visits and rankings are read from their indexes alone, and roles that nobody has cost no planning. The numbers are
the same.

Revision: 0009
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# A range reads thousands of rows of a few bytes each, which lie scattered in their tables: each cost a look at another page.
# What is changed is no longer HOT by that: a row of today's is changed once a round, and its entries of before are taken out
# when their page is full (https://www.postgresql.org/docs/current/btree.html, bottom-up deletion).
COVERED = {
    "rollup_visits": ("(grain, period, gap)", "users"),
    "rollup_session_histograms": ("(measure, day, bucket)", "sessions"),
}

RANKINGS = {
    "rollup_sessions_messages_idx": (
        "(day, messages DESC)",
        "session_id, user_id, started_at, user_messages, first_message_at, last_message_at",
    ),
    "rollup_sessions_slowest_idx": ("(day, slowest_ms DESC NULLS LAST)", "session_id, user_id, started_at"),
}

RETENTION_BEFORE = """
CREATE OR REPLACE VIEW analytics.retention_weekly WITH (security_barrier = true) AS
SELECT r.cohort AS cohort_week, (r.week - r.cohort) / 7 AS weeks_later, c.users AS cohort_users, r.users,
       r.users::double precision / nullif(c.users, 0) AS retention
FROM chat.rollup_retention r
JOIN chat.rollup_retention c ON c.cohort = r.cohort AND c.week = r.cohort
WHERE r.users > 0
"""

# In one pass: the bounds of a range reached one side of the join only, and the other was read whole.
RETENTION = """
CREATE OR REPLACE VIEW analytics.retention_weekly WITH (security_barrier = true) AS
SELECT r.cohort AS cohort_week, (r.week - r.cohort) / 7 AS weeks_later, r.cohort_users, r.users,
       r.users::double precision / nullif(r.cohort_users, 0) AS retention
FROM (
    SELECT cohort, week, users, max(users) FILTER (WHERE week = cohort) OVER (PARTITION BY cohort) AS cohort_users
    FROM chat.rollup_retention
) r
WHERE r.users > 0
"""

# With a setting of its own it is not made a part of the statement that calls it, which would plan it for every month there
# is: that took longer than the report.
OTHER_ROLES = """
CREATE FUNCTION analytics.messages_of_other_roles(since timestamptz, until timestamptz)
RETURNS TABLE (role text, messages bigint)
LANGUAGE sql STABLE PARALLEL SAFE
SET jit = off
BEGIN ATOMIC
    SELECT m.role, count(*)
    FROM analytics.messages m
    WHERE m.created_at >= messages_of_other_roles.since AND m.created_at < messages_of_other_roles.until
      AND m.role NOT IN ('user', 'assistant')
    GROUP BY m.role;
END
"""

# Whoever may call the function that is there already, and nobody else.
OTHER_ROLES_RIGHTS = """
DO $$
DECLARE
    analyst regrole;
BEGIN
    REVOKE ALL ON FUNCTION analytics.messages_of_other_roles FROM PUBLIC;
    FOR analyst IN
        SELECT a.grantee::regrole
        FROM pg_proc p CROSS JOIN aclexplode(p.proacl) a
        WHERE p.oid = 'analytics.session_quantiles'::regproc AND a.privilege_type = 'EXECUTE' AND a.grantee NOT IN (0, p.proowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION analytics.messages_of_other_roles TO %s', analyst);
    END LOOP;
END
$$
"""

OTHER_ROLES_COMMENT = (
    "How many messages each role but user and assistant wrote in a range of time, since inclusive, until exclusive. Read from "
    "the messages: ask where analytics.messages_daily has other_messages."
)


def upgrade() -> None:
    for table, (key, payload) in COVERED.items():
        # One statement: there is no moment without the key, by whose name the roll-ups insert.
        op.execute(
            f"ALTER TABLE chat.{table} DROP CONSTRAINT {table}_pkey, "
            f"ADD CONSTRAINT {table}_pkey PRIMARY KEY {key} INCLUDE ({payload})"
        )
    for index, (key, payload) in RANKINGS.items():
        op.execute(f"DROP INDEX chat.{index}")
        op.execute(f"CREATE INDEX {index} ON chat.rollup_sessions {key} INCLUDE ({payload})")
    op.execute(RETENTION)
    op.execute(OTHER_ROLES)
    op.execute(OTHER_ROLES_RIGHTS)
    quoted = OTHER_ROLES_COMMENT.replace("'", "''")
    op.execute(f"COMMENT ON FUNCTION analytics.messages_of_other_roles IS '{quoted}'")


def downgrade() -> None:
    op.execute("DROP FUNCTION analytics.messages_of_other_roles")
    op.execute(RETENTION_BEFORE)
    for index, (key, _) in RANKINGS.items():
        op.execute(f"DROP INDEX chat.{index}")
        op.execute(f"CREATE INDEX {index} ON chat.rollup_sessions {key}")
    for table, (key, _) in COVERED.items():
        op.execute(
            f"ALTER TABLE chat.{table} DROP CONSTRAINT {table}_pkey, ADD CONSTRAINT {table}_pkey PRIMARY KEY {key}"
        )

"""Users of any range of days by one function, which reads whole weeks as weeks. No table changes.

Revision: 0010
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

# Users of a range are the visits in it that have none before them in it. Of the whole weeks in the range those are counted by
# the week: the visits of 91 days are up to 4,095 rows, those of 13 weeks 78. A user who was there in the days before the first of
# those weeks has one visit that follows on one of those days, and is counted there.
# PL/pgSQL keeps its plan for the connection; to plan it takes as long as to run it.
ACTIVE_USERS = """
CREATE FUNCTION analytics.active_users(first_day date, end_day date) RETURNS bigint
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE
AS $$
DECLARE
    first_week date := date_trunc('week', (first_day + 6)::timestamp);
    end_week date := date_trunc('week', end_day::timestamp);
BEGIN
    IF first_week >= end_week THEN
        first_week := end_day;
        end_week := end_day;
    END IF;
    RETURN (
        SELECT coalesce(sum(users), 0)
        FROM (
            SELECT l.active_users AS users
            FROM analytics.users_lifecycle l
            WHERE (l.grain = 'week' AND l.period >= first_week AND l.period < end_week)
               OR (l.grain = 'day' AND l.period >= first_day AND l.period < first_week)
               OR (l.grain = 'day' AND l.period >= end_week AND l.period < end_day)
            UNION ALL
            SELECT -again
            FROM generate_series(1, (end_week - first_week) / 7 - 1) AS later(n)
            CROSS JOIN LATERAL (
                SELECT sum(v.users) AS again
                FROM analytics.user_visits v
                WHERE v.grain = 'week' AND v.period = first_week + 7 * n AND v.gap_or_0 BETWEEN 1 AND n
            ) weeks
            UNION ALL
            SELECT -again
            FROM generate_series(1, end_day - first_day - 1) AS later(n)
            CROSS JOIN LATERAL (
                SELECT sum(v.users) AS again
                FROM analytics.user_visits v
                WHERE v.grain = 'day' AND v.period = first_day + n AND v.gap_or_0 <= n
                  AND v.gap_or_0 >= CASE WHEN first_day + n >= first_week AND first_day + n < end_week
                                         THEN first_day + n - first_week + 1 ELSE 1 END
            ) days
            WHERE first_day < first_week OR first_day + n >= end_week
        ) AS parts
    );
END
$$
"""

# Whoever may call the function that is there already, and nobody else.
ACTIVE_USERS_RIGHTS = """
DO $$
DECLARE
    analyst regrole;
BEGIN
    REVOKE ALL ON FUNCTION analytics.active_users FROM PUBLIC;
    FOR analyst IN
        SELECT a.grantee::regrole
        FROM pg_proc p CROSS JOIN aclexplode(p.proacl) a
        WHERE p.oid = 'analytics.session_quantiles'::regproc AND a.privilege_type = 'EXECUTE' AND a.grantee NOT IN (0, p.proowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION analytics.active_users TO %s', analyst);
    END LOOP;
END
$$
"""

ACTIVE_USERS_COMMENT = (
    "How many users wrote a message from first_day on and before end_day, each counted once. Exact. Users of a range do not "
    "follow from those of its days: who wrote on two of them is counted in both."
)

GAP_OR_0_BEFORE = (
    "The same as gap, 0: never. Bound it where few gaps of many matter: an index serves this one. Users who wrote in a range of "
    "days: those of each day, less those with a gap that begins in the range too."
)

GAP_OR_0 = "The same as gap, 0: never. Bound it where few gaps of many matter: an index serves this one."


def comment(on: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {on} IS '{quoted}'")


def upgrade() -> None:
    op.execute(ACTIVE_USERS)
    op.execute(ACTIVE_USERS_RIGHTS)
    comment("FUNCTION analytics.active_users", ACTIVE_USERS_COMMENT)
    comment("COLUMN analytics.user_visits.gap_or_0", GAP_OR_0)


def downgrade() -> None:
    comment("COLUMN analytics.user_visits.gap_or_0", GAP_OR_0_BEFORE)
    op.execute("DROP FUNCTION analytics.active_users")

"""Sessions that can't be counted are set aside, and told of.

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


def comment(on: str, text: str) -> None:
    quoted = text.replace("'", "''")
    op.execute(f"COMMENT ON {on} IS '{quoted}'")


def upgrade() -> None:
    op.execute(TABLE)
    op.execute(STATE)
    for column, text in COMMENTS.items():
        comment(f"COLUMN analytics.rollup_state.{column}", text)


def downgrade() -> None:
    op.execute("DROP VIEW analytics.rollup_state")
    op.execute("DROP TABLE chat.rollup_set_aside")
    op.execute(STATE_BEFORE)
    comment("VIEW analytics.rollup_state", "One row: how current all other views over roll-ups are.")
    for column, text in STATE_COMMENTS_BEFORE.items():
        comment(f"COLUMN analytics.rollup_state.{column}", text)

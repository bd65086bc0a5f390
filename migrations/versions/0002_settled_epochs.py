"""Whether an epoch has settled.

Revision: 0002
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Every lease on an epoch before this one has ended: no writer need wait for that.
    # With a default that is a constant, no row is rewritten.
    op.execute("ALTER TABLE chat.cache_state ADD COLUMN settled boolean NOT NULL DEFAULT true")


def downgrade() -> None:
    # What runs on 0001 speaks protocol 0 and refuses another one; nobody of this one can go on without the column.
    op.execute(
        "UPDATE chat.cache_state SET protocol = 0, epoch = left(translate(gen_random_uuid()::text, '-', ''), 16)"
    )
    op.execute("ALTER TABLE chat.cache_state DROP COLUMN settled")

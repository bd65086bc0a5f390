"""${message}

Revision: ${up_revision}, after ${down_revision | comma,n}
"""

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


# `env.py` sets lock_timeout and statement_timeout for every migration. Expand before you contract,
# and never backfill rows in here: that is a maintenance command, batched and resumable.
def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}

"""Sessions of everybody can be listed newest first.

Revision: 0006
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # `created_at` never changes, so updates of a session stay HOT.
    op.execute(
        "CREATE INDEX chat_sessions_created_at_idx ON chat.chat_sessions (created_at DESC, session_id DESC)"
    )


def downgrade() -> None:
    op.execute("DROP INDEX chat.chat_sessions_created_at_idx")

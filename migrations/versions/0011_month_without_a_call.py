"""The month of an id is worked out in the statement that asks, not in a call. No table changes.

PostgreSQL writes the body of an SQL function into the statement, but not that of a STRICT one whose body could answer for NULL,
as CASE can. So every stored message was checked with a call of its own: 5 of the 20 us that a row of a batch of 100 turns
took to store. An id is never NULL in a table. The month of each id is the same as before.

Revision: 0011
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# As revision 0007 made it, but for STRICT.
MONTH = """
CREATE OR REPLACE FUNCTION chat.session_month(id uuid) RETURNS date
LANGUAGE sql IMMUTABLE {strict} PARALLEL SAFE
RETURN CASE
    WHEN get_byte(uuid_send(id), 6) >> 4 = 7 AND get_byte(uuid_send(id), 8) >> 6 = 2
         AND ('x' || encode(substr(uuid_send(id), 1, 6), 'hex'))::bit(48)::bigint
             < 253402300800000  -- the end of the year 9999, the last that Python's calendar has
    THEN date_trunc('month', timestamp '1970-01-01' + interval '1 millisecond'
         * ('x' || encode(substr(uuid_send(id), 1, 6), 'hex'))::bit(48)::bigint)::date
    ELSE date '0001-01-01'
END
"""


def upgrade() -> None:
    op.execute(MONTH.format(strict=""))


def downgrade() -> None:
    op.execute(MONTH.format(strict="STRICT"))

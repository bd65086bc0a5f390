"""Whether the sessions' rows agree with their messages: everything else is decided by their counters.

Reads only, a bounded page at a time, on a database that is being written to.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from app.chat import CHAIN_START, next_chain, session_month
from app.postgres.engine import Database

_PAGE_SESSIONS = 200

#: Ids in memory at once, and in one statement.
_PAGE_MESSAGES = 10_000

# One statement, so one snapshot: a write changes the row and adds its messages in one transaction. Seqs are distinct
# and positive, so as many as the last one says are all from 1 on, without a gap.
_COUNTED = """
SELECT s.session_id, s.message_count, s.chain, m.stored, m.last_seq
FROM (
    SELECT session_id, message_count, chain FROM chat.chat_sessions
    WHERE {which} ORDER BY session_id LIMIT $2
) s
LEFT JOIN LATERAL (
    SELECT count(*)::int AS stored, coalesce(max(seq), 0) AS last_seq FROM chat.chat_messages
    WHERE session_id = s.session_id AND session_month = chat.session_month(s.session_id)
) m ON true
ORDER BY s.session_id
"""
_PAGE = _COUNTED.format(which="session_id > $1")
_ONE = _COUNTED.format(which="session_id = $1")

# A message is never changed, and goes only with its whole session: pages of one session need no common snapshot.
_IDS = """
SELECT m.session_id, m.message_id
FROM unnest($1::uuid[], $2::date[], $3::int[], $4::int[]) AS w(session_id, session_month, first_seq, last_seq)
JOIN chat.chat_messages m ON m.session_id = w.session_id AND m.session_month = w.session_month
    AND m.seq BETWEEN w.first_seq AND w.last_seq
ORDER BY m.session_id, m.seq
"""


Flaw = Literal["miscounted", "wrong-chain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongRow:
    """A row that disagrees with its messages."""

    session_id: UUID
    flaw: Flaw
    difference: str


async def compare_counters(
    database: Database, *, deep: bool = False
) -> AsyncIterator[tuple[int, list[WrongRow]]]:
    """Page by page: how many rows it has, and those that are wrong. `deep`: each chain is computed again, too."""
    after = UUID(int=0)
    while True:
        async with database.connection() as conn:
            rows = await conn.fetch(_PAGE, after, _PAGE_SESSIONS)
        if not rows:
            return
        wrong = [flaw for row in rows if (flaw := _miscounted(row))]
        if deep:
            miscounted = {one.session_id for one in wrong}
            wrong += await _wrong_chains(
                database, [row for row in rows if row["session_id"] not in miscounted]
            )
        yield len(rows), wrong
        after = rows[-1]["session_id"]


def _miscounted(row: Any) -> WrongRow | None:
    if row["message_count"] == row["stored"] == row["last_seq"]:
        return None
    return WrongRow(
        session_id=row["session_id"],
        flaw="miscounted",
        difference=f"message_count {row['message_count']}, {row['stored']} messages, the last seq {row['last_seq']}",
    )


async def _wrong_chains(database: Database, rows: Sequence[Any]) -> list[WrongRow]:
    chains = {row["session_id"]: CHAIN_START for row in rows}
    for ranges in _statements(rows):
        ids, firsts, lasts = zip(*ranges, strict=True)
        async with database.connection() as conn:
            records = await conn.fetch(_IDS, ids, [session_month(one) for one in ids], firsts, lasts)
        for record in records:
            session_id = record["session_id"]
            chains[session_id] = next_chain(chains[session_id], [record["message_id"]])
    wrong = []
    for row in rows:
        if (chain := chains[row["session_id"]]) == row["chain"]:
            continue
        async with database.connection() as conn:
            still_there = await conn.fetch(_ONE, row["session_id"], 1)
        if still_there:
            wrong.append(
                WrongRow(
                    session_id=row["session_id"],
                    flaw="wrong-chain",
                    difference=f"chain {row['chain'].hex()}, its messages give {chain.hex()}",
                )
            )
    return wrong


def _statements(rows: Sequence[Any]) -> Iterator[list[tuple[UUID, int, int]]]:
    """(session, first seq, last seq), as many together as one statement may read."""
    ranges: list[tuple[UUID, int, int]] = []
    room = _PAGE_MESSAGES
    for row in rows:
        first, last = 1, row["message_count"]
        while first <= last:
            until = min(last, first + room - 1)
            ranges.append((row["session_id"], first, until))
            room -= until - first + 1
            first = until + 1
            if room == 0:
                yield ranges
                ranges, room = [], _PAGE_MESSAGES
    if ranges:
        yield ranges

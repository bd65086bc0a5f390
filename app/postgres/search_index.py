"""An index over the words of closed months, for who searches far back: made and dropped by hand, off the write path.

A GIN index over `chat.search_words(content)`, of which PostgreSQL's own functions are all that it needs. The words are those of
`app.analytics.folding`, cut where anything but ASCII letters, digits and `_` stands: the index finds candidates.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date

import asyncpg

from app.errors import StartRefused
from app.postgres.engine import Database
from app.postgres.partitions import partition_month

#: The first so many characters of a word are in the index: a key has a size, and base64 is one word.
WORD_CHARACTERS_MAX = 32

_LOCK = 7311520260011
_BUILD_SECONDS_MAX = 24 * 3600.0

# The aggregate keeps the function from being inlined, so that the planner knows its cost.
_FUNCTION = r"""
CREATE OR REPLACE FUNCTION chat.search_words(content text) RETURNS text[]
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE COST 2000
RETURN (
    SELECT array_agg(DISTINCT left(word, 32))
    FROM regexp_split_to_table(
        translate(
            regexp_replace(lower(normalize(content, NFD) COLLATE "C"), '[\u0300-\u036f]+', '', 'g'), 'đĐ', 'dd'
        ),
        '[^a-z0-9_]+'
    ) AS word
    WHERE word <> ''
)
"""

_PARTITIONS = r"""
SELECT p.relname AS partition, coalesce(i.indisvalid, false) AS indexed, i.indexrelid IS NOT NULL AS begun,
       pg_relation_size(i.indexrelid) AS bytes, p.reltuples AS messages
FROM pg_inherits h
JOIN pg_class p ON p.oid = h.inhrelid
LEFT JOIN (pg_index i JOIN pg_class x ON x.oid = i.indexrelid AND x.relname LIKE '%\_search\_words\_idx')
    ON i.indrelid = p.oid
WHERE h.inhparent = 'chat.chat_messages'::regclass
ORDER BY 1
"""

_ESTIMATE = """
EXPLAIN (FORMAT JSON) SELECT FROM chat.chat_messages
WHERE session_month = ANY($1::date[]) AND chat.search_words(content) @> $2::text[]
"""

# Where more messages are candidates, reading them all is faster than finding and splitting those: measured, 4 against
# some 200 us each.
_WORTH_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Months:
    """The months of messages that there are: those whose index a search should use, and the others."""

    indexed: tuple[date, ...]
    others: tuple[date, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionState:
    name: str
    indexed: bool
    begun: bool
    index_bytes: int | None
    messages: float

    @property
    def index_name(self) -> str:
        return f"{self.name}_search_words_idx"


async def partition_states(database: Database) -> list[PartitionState]:
    """All partitions with what they have of an index; `messages` is the planner's estimate."""
    async with database.connection() as conn:
        return await _states(conn)


async def _states(conn: asyncpg.Connection) -> list[PartitionState]:
    return [
        PartitionState(
            name=row["partition"],
            indexed=row["indexed"],
            begun=row["begun"],
            index_bytes=row["bytes"],
            messages=row["messages"],
        )
        for row in await conn.fetch(_PARTITIONS)
    ]


async def months_for(database: Database, words: Sequence[str]) -> Months:
    """Which months to ask the index for messages with all of these words. None where it would cost more."""
    async with database.connection() as conn:
        states = await _states(conn)
        months = {state.name: partition_month(state.name) for state in states}
        indexed = [state for state in states if state.indexed]
        if indexed and words:
            # The driver has decoded the JSON: SQLAlchemy has set it up so.
            plan = await conn.fetchval(_ESTIMATE, [months[one.name] for one in indexed], list(words))
            if plan[0]["Plan"]["Plan Rows"] > _WORTH_SHARE * sum(one.messages for one in indexed):
                indexed = []
    used = {one.name for one in indexed} if words else set()
    return Months(
        indexed=tuple(month for name, month in months.items() if name in used),
        others=tuple(month for name, month in months.items() if name not in used),
    )


async def build_indexes(
    database: Database, *, before: date, advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Makes the index of every month before this one, one after the other, while others write, and names those made.
    `advance` is told of each.

    What a broken build left is made anew. Not through a transaction pooler: a month takes minutes. Raises
    `StartRefused` while another one builds.
    """
    made: list[str] = []
    async with _alone(database) as conn:
        await conn.execute(_FUNCTION)
        for state in await _states(conn):
            if state.indexed or partition_month(state.name) >= before:
                continue
            if state.begun:
                await conn.execute(f"DROP INDEX chat.{state.index_name}")
            await conn.execute(
                f"CREATE INDEX CONCURRENTLY {state.index_name} ON chat.{state.name} "
                "USING gin (chat.search_words(content))",
                timeout=_BUILD_SECONDS_MAX,
            )
            # How frequent which words are: it decides where the index is used.
            await conn.execute(f"ANALYZE chat.{state.name}", timeout=_BUILD_SECONDS_MAX)
            made.append(state.name)
            advance(1)
    return made


async def drop_indexes(database: Database) -> list[str]:
    """Drops all of them, and names their partitions. Searches go on. The function stays: one may be using it."""
    async with _alone(database) as conn:
        begun = [state for state in await _states(conn) if state.begun]
        for state in begun:
            await conn.execute(f"DROP INDEX CONCURRENTLY chat.{state.index_name}", timeout=_BUILD_SECONDS_MAX)
    return [state.name for state in begun]


@asynccontextmanager
async def _alone(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection without a time limit, for one that builds or drops at a time."""
    async with database.connection() as conn:
        if not await conn.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            raise StartRefused(
                "search indexes are being built or dropped by somebody else", hint="wait for it"
            )
        try:
            await conn.execute("SET statement_timeout = 0")
            yield conn
        finally:
            if not conn.is_closed():
                await conn.execute("RESET statement_timeout")
                await conn.execute("SELECT pg_advisory_unlock($1)", _LOCK)

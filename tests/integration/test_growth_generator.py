"""A generated archive (benchmarks/growth) is what the product would have written."""

from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from app.chat import format_time, parse_time, session_month
from app.coherence.ports import CacheState
from app.maintenance.audit import Auditor
from app.postgres.counters import compare_counters
from app.postgres.engine import Database
from app.postgres.rows import MessageColumns
from app.postgres.store import PostgresChatSessionStore
from benchmarks.growth.archive import Plan, pieces_of, sections_of
from benchmarks.growth.fill import copy_sections, make_partitions_of
from tests.factories import new_append
from tests.servers import Servers
from tests.stores import new_hybrid

pytestmark = pytest.mark.anyio

MESSAGES, SESSIONS = 2_000, 100
PLAN = Plan(messages=MESSAGES, sessions=SESSIONS, seed=7, months=3, until=datetime(2025, 11, 22, tzinfo=UTC))

GENERATED = """
SELECT session_id, session_month, seq, message_id, role, content, created_at,
       processing_time_ms, source_count, metadata::text AS metadata, request_digest, request_size
FROM chat.chat_messages ORDER BY session_id, seq
"""


@pytest.fixture
async def filled(database: Database, database_url: str) -> Database:
    sections = sections_of(PLAN)
    await make_partitions_of(database_url, sections)
    assert await copy_sections(database_url, sections) == MESSAGES
    return database


async def test_counters_and_chains_are_those_of_the_messages(filled: Database) -> None:
    pages = [page async for page in compare_counters(filled, deep=True)]

    assert sum(checked for checked, _ in pages) == SESSIONS
    assert [flaw for _, wrong in pages for flaw in wrong] == []


async def test_every_column_is_what_the_product_makes_of_the_message_it_reads(filled: Database) -> None:
    store = PostgresChatSessionStore(filled, ttl_seconds=3600)
    async with filled.connection() as conn:
        stored = await conn.fetch(GENERATED)
        session_ids = await conn.fetch("SELECT session_id FROM chat.chat_sessions ORDER BY session_id")
    columns = MessageColumns()
    for record in session_ids:
        session_id = record["session_id"]
        history = await store.read_history(session_id, max_messages=MESSAGES)
        columns.add(session_id, history.messages, first_seq=1)

    names = list(stored[0].keys())
    arrays = [array or [None] * MESSAGES for array in columns.arrays]
    ours = [dict(zip(names, row, strict=True)) for row in zip(*arrays, strict=True)]
    differing = [
        (name, row[name], record[name])
        for row, record in zip(ours, stored, strict=True)
        for name in names
        if row[name] != record[name]
    ]
    assert len(stored) == MESSAGES
    assert differing == []


async def test_sessions_times_and_ids_agree(filled: Database) -> None:
    async with filled.connection() as conn:
        sessions = await conn.fetch("SELECT * FROM chat.chat_sessions")
        messages = await conn.fetch(GENERATED)
        month_of_tables = await conn.fetch(
            "SELECT tableoid::regclass::text AS name, session_month FROM chat.chat_messages GROUP BY 1, 2"
        )
    last = {record["session_id"]: record["created_at"] for record in messages}

    for session in sessions:
        assert _moment(session["session_id"].int) == session["created_at"]
        assert session["last_activity"] == last[session["session_id"]]
    for message in messages:
        assert _moment(message["message_id"].int) == message["created_at"]
        assert message["session_month"] == session_month(message["session_id"])
    assert max(last.values()) <= PLAN.until
    assert len(month_of_tables) > PLAN.months
    assert all(
        record["name"].endswith(f"chat_messages_{record['session_month']:%Y_%m}")
        for record in month_of_tables
    )


def _moment(uuid7: int) -> datetime:
    moment = datetime.fromtimestamp((uuid7 >> 80) / 1000, UTC)
    assert parse_time(format_time(moment)) == moment
    return moment


async def test_both_stores_read_it_and_write_on(
    filled: Database, servers: Servers, redis: Redis, state: CacheState
) -> None:
    durable = PostgresChatSessionStore(filled, ttl_seconds=3600)
    async with filled.connection() as conn:
        session = await conn.fetchrow(
            "SELECT session_id, user_id, message_count FROM chat.chat_sessions ORDER BY message_count DESC LIMIT 1"
        )
    session_id, count = session["session_id"], session["message_count"]
    async with AsyncExitStack() as stack:
        hybrid = new_hybrid(stack, filled, servers.redis_url, state=state)

        cold = await hybrid.store.read_history(session_id, max_messages=50)
        archived = await hybrid.store.list_sessions(session["user_id"], status="archived", limit=100)
        appended = await hybrid.store.append(new_append(session_id, "Xin chào"))
        cached = await hybrid.store.read_history(session_id, max_messages=50)
        finding = await Auditor(durable, hybrid.cache, hybrid.store, messages_max=100).audit(session_id)
    read = await durable.read_history(session_id, max_messages=50)
    pages = [page async for page in compare_counters(filled, deep=True)]

    assert cold.lines[1:] == cached.lines[:-1]
    assert appended.first_seq == count + 1
    assert (cached.source, cached.body) == ("redis", read.body)
    assert session_id in {one.session_id for one in archived.sessions}
    assert finding.verdict == "same"
    assert [flaw for _, wrong in pages for flaw in wrong] == []


def test_the_same_plan_is_the_same_archive_and_another_seed_another_one() -> None:
    first, again, other = (
        b"".join(
            piece.sessions + piece.messages for section in sections_of(plan) for piece in pieces_of(section)
        )
        for plan in (
            PLAN,
            PLAN,
            Plan(messages=MESSAGES, sessions=SESSIONS, seed=8, months=3, until=PLAN.until),
        )
    )

    assert first == again
    assert first != other


def test_lengths_of_sessions_are_skewed_and_add_up() -> None:
    counts = sorted(count for section in sections_of(PLAN) for count in section.counts)

    assert sum(counts) == MESSAGES
    assert counts[0] >= 2
    assert counts[-1] > 5 * counts[len(counts) // 2]

"""Statements over the partitioned table are planned once a connection, not at every execution."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from app.chat import session_month, utc_now
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions, months_from
from app.postgres.store import PostgresChatSessionStore
from tests.factories import keyed_append, new_answer, new_append, turn_append

pytestmark = pytest.mark.anyio


async def test_no_operation_is_planned_anew_over_the_partitions(
    database_url: str, database: Database
) -> None:
    """PostgreSQL's own choice was a custom plan each time: 17 ms an append at ten years of partitions."""
    one_connection = Database(create_engine(database_url, application_name="plans", pool_size=1))
    store = PostgresChatSessionStore(one_connection, ttl_seconds=3600)
    await make_partitions(one_connection, months_from(utc_now().date(), 3))
    session_id = (await store.create_session("user123")).session.session_id

    for count in range(8):
        await store.append(new_append(session_id, "a"))
        await store.append(keyed_append(session_id, f"key {count}", "b", "c"))
        await store.read_history(session_id, max_messages=5)
        await store.begin_turn(turn_append(session_id, key=f"turn {count}"), window=5)
    async with one_connection.connection() as conn:
        prepared = await conn.fetch(
            "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements "
            "WHERE statement LIKE '%chat.chat_messages%' AND statement NOT LIKE '%pg_inherits%'"
        )
    await one_connection.close()

    assert {record["custom_plans"] for record in prepared} == {0}
    assert min(record["generic_plans"] for record in prepared) >= 8
    assert len(prepared) >= 3


async def test_no_call_reads_all_of_a_table_however_small_that_was_when_it_was_planned(
    database_url: str, database: Database
) -> None:
    """The plans stay while the tables grow: an append after an import of 300,000 sessions took 100 ms."""
    session_id = (
        await PostgresChatSessionStore(database, ttl_seconds=3600).create_session("user123")
    ).session.session_id
    async with database.connection() as conn:
        await conn.execute("ANALYZE")
    one_connection = Database(create_engine(database_url, application_name="plans", pool_size=1))
    store = PostgresChatSessionStore(one_connection, ttl_seconds=3600)
    await store.append(new_append(session_id, "a"))
    turn = await store.begin_turn(turn_append(session_id, key="turn"), window=5)
    await store.begin_turn(turn_append((await store.create_session("user123")).session.session_id), window=5)
    await store.finish_turn(turn, new_answer(turn))
    await store.begin_turn(turn_append(session_id, key="turn"), window=5)
    await store.read_history(session_id, max_messages=5)
    await store.get_session(session_id)
    await store.delete_session(session_id)

    async with one_connection.connection() as conn:
        prepared = await conn.fetch(
            "SELECT name, statement, parameter_types::text[] AS types FROM pg_prepared_statements "
            "WHERE statement ~ 'chat.chat_' AND statement !~ 'pg_inherits|pg_prepared'"
        )
        found = {
            record["statement"]: await conn.fetchval(
                f"EXPLAIN (FORMAT json) EXECUTE {record['name']} "
                f"({', '.join(literal_of(kind, session_id) for kind in record['types'])})"
            )
            for record in prepared
        }
    await one_connection.close()

    scans = {statement: list(scans_of(plan[0]["Plan"])) for statement, plan in found.items()}
    assert {scan["Relation Name"] for each in scans.values() for scan in each} >= {
        "chat_sessions",
        "chat_turns",
        f"chat_messages_{session_month(session_id):%Y_%m}",
    }
    unbounded = [
        (statement, scan["Node Type"], scan["Relation Name"])
        for statement, each in scans.items()
        for scan in each
        if not scan["finds"]
    ]
    assert unbounded == []
    assert len(scans) >= 12


def literal_of(kind: str, session_id: UUID) -> str:
    """What lets a plan of partitions come as far as the one of the session."""
    values = {"uuid": f"'{session_id}'::uuid", "date": f"'{session_month(session_id)}'::date"}
    value = values.get(kind.removesuffix("[]"), "NULL")
    return f"ARRAY[{value}]" if kind.endswith("[]") and value != "NULL" else value


def scans_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Where a plan reads a table of chats, and whether an index finds what."""
    below = plan.get("Plans", [])
    if plan.get("Relation Name", "").startswith("chat_") and "Scan" in plan["Node Type"]:
        yield plan | {"finds": "Index Cond" in plan or any("Index Cond" in one for one in below)}
    for one in below:
        yield from scans_of(one)

"""Statements over the partitioned table are planned once a connection, not at every execution."""

import pytest

from app.chat import utc_now
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions, months_from
from app.postgres.store import PostgresChatSessionStore
from tests.factories import keyed_append, new_append, turn_append

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

"""An analyst reads what is granted, and can do nothing else: asked of a real server, as that account."""

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from app.analytics.rollups import Rollups
from app.errors import StartRefused
from app.postgres.analysts import ANALYST, ANALYST_PII, CONNECTIONS_MAX, TEXT_COLUMNS, Analyst, add_analyst
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from tests.contract.suite import new_session
from tests.databases import migrate, new_database
from tests.integration.test_rollups import count_all
from tests.servers import Servers

pytestmark = pytest.mark.anyio

NAMES = ("lan", "minh", "khoa")


@pytest.fixture
async def roles(database: Database) -> AsyncIterator[Database]:
    """Roles are the server's: these are gone before and after."""
    await drop_roles(database)
    yield database
    await drop_roles(database)


async def drop_roles(database: Database) -> None:
    async with database.connection() as conn:
        for role in (*NAMES, ANALYST, ANALYST_PII):
            if await conn.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role):
                await conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def connected(database_url: str, analyst: Analyst) -> asyncpg.Connection:
    return await asyncpg.connect(database_url, user=analyst.name, password=analyst.password)


async def views(database: Database) -> list[tuple[str, str]]:
    async with database.connection() as conn:
        return [
            tuple(record)
            for record in await conn.fetch(
                "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'analytics'"
            )
        ]


async def refused(conn: asyncpg.Connection, statement: str) -> bool:
    # What guards the data is not a setting that an analyst may change.
    await conn.execute("SET default_transaction_read_only = off")
    try:
        await conn.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    except asyncpg.ObjectNotInPrerequisiteStateError as exc:
        # Nobody may write to a view that joins.
        return "view" in str(exc)
    return False


@pytest.mark.parametrize("pii", [False, True])
async def test_an_analyst_reads_every_column_but_those_with_text(
    roles: Database, database_url: str, pii: bool
) -> None:
    store = PostgresChatSessionStore(roles, ttl_seconds=3600)
    await new_session(store, "Bí mật")
    await count_all(Rollups(roles, timezone="UTC"))
    conn = await connected(database_url, await add_analyst(roles, "lan", pii=pii))

    denied = {
        (view, column)
        for view, column in await views(roles)
        if await refused(conn, f'SELECT "{column}" FROM analytics."{view}"')
    }
    seen = await conn.fetchval("SELECT sum(messages) FROM messages_daily")
    await conn.close()

    text = {(view, column) for view, columns in TEXT_COLUMNS.items() for column in columns}
    assert denied == (set() if pii else text)
    assert seen == 1


_QUANTILES = "SELECT * FROM analytics.session_quantiles('turns', '2000-01-01', '2100-01-01')"
_OTHER_ROLES = "SELECT * FROM analytics.messages_of_other_roles('2000-01-01', '2100-01-01')"
_ACTIVE_USERS = "SELECT analytics.active_users('2000-01-01', '2100-01-01')"


@pytest.mark.parametrize("pii", [False, True])
async def test_an_analyst_may_call_the_functions_of_the_schema(
    roles: Database, database_url: str, pii: bool
) -> None:
    await new_session(PostgresChatSessionStore(roles, ttl_seconds=3600), "Bí mật")
    await count_all(Rollups(roles, timezone="UTC"))
    conn = await connected(database_url, await add_analyst(roles, "lan", pii=pii))

    [found] = await conn.fetch(_QUANTILES)
    none = await conn.fetch(_QUANTILES.replace("turns", "legs"))
    others = await conn.fetch(_OTHER_ROLES)
    users = await conn.fetchval(_ACTIVE_USERS)
    await conn.close()

    assert (found["sessions"], found["average"], found["p99"]) == (1, 1, 1)
    assert none == others == []
    assert users == 1


@pytest.mark.usefixtures("roles")
async def test_an_analyst_from_before_a_function_may_call_it(servers: Servers) -> None:
    async with new_database(servers, "chat_tests_analysts") as url:
        await migrate(url, "0008")
        database = Database(create_engine(url, application_name="tests"))
        analyst = await add_analyst(database, "lan", pii=False)
        await database.close()
        await migrate(url)
        conn = await connected(url, analyst)

        assert await conn.fetch(_OTHER_ROLES) == []
        assert await conn.fetchval(_ACTIVE_USERS) == 0
        await conn.close()


async def test_nobody_else_may_call_the_functions_of_the_schema(roles: Database, database_url: str) -> None:
    async with roles.connection() as conn:
        await conn.execute("CREATE ROLE khoa LOGIN PASSWORD 'khoa'; GRANT USAGE ON SCHEMA analytics TO khoa")
    conn = await asyncpg.connect(database_url, user="khoa", password="khoa")

    assert await refused(conn, _QUANTILES)
    assert await refused(conn, _OTHER_ROLES)
    assert await refused(conn, _ACTIVE_USERS)
    await conn.close()


@pytest.mark.parametrize("pii", [False, True])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1 FROM chat.chat_messages",
        "SELECT 1 FROM chat.chat_messages_legacy",
        "SELECT 1 FROM chat.chat_sessions",
        "SELECT 1 FROM chat.rollup_sessions",
        "SELECT 1 FROM chat.cache_state",
        "SELECT chat.session_month(gen_random_uuid())",
        "DELETE FROM analytics.sessions",
        "UPDATE analytics.sessions SET user_id = 'x'",
        "INSERT INTO analytics.messages (content) VALUES ('x')",
        "CREATE TABLE analytics.mine (x int)",
        "CREATE TABLE public.mine (x int)",
        "CREATE TEMPORARY TABLE mine (x int)",
        "CREATE SCHEMA mine",
        "CREATE FUNCTION analytics.mine() RETURNS int LANGUAGE sql RETURN 1",
        "CREATE ROLE mine",
        "SET ROLE chat_analyst; SELECT content FROM analytics.messages; SELECT 1 FROM chat.chat_messages",
        "SET temp_file_limit = -1",
        "COPY analytics.sessions TO PROGRAM 'cat'",
        "SELECT pg_read_file('postgresql.conf')",
    ],
)
async def test_an_analyst_can_do_nothing_else(
    roles: Database, database_url: str, pii: bool, statement: str
) -> None:
    conn = await connected(database_url, await add_analyst(roles, "lan", pii=pii))

    assert await refused(conn, statement), statement
    await conn.close()


async def test_an_analyst_is_bounded(roles: Database, database_url: str) -> None:
    analyst = await add_analyst(roles, "lan", pii=False)
    conn = await connected(database_url, analyst)
    settings = {
        name: await conn.fetchval("SELECT current_setting($1)", name)
        for name in (
            "statement_timeout",
            "idle_in_transaction_session_timeout",
            "default_transaction_read_only",
            "temp_file_limit",
        )
    }
    others = [await connected(database_url, analyst) for _ in range(CONNECTIONS_MAX - 1)]

    with pytest.raises(asyncpg.TooManyConnectionsError):
        await connected(database_url, analyst)
    for one in (conn, *others):
        await one.close()
    assert analyst.limited
    assert settings == {
        "statement_timeout": "1min",
        "idle_in_transaction_session_timeout": "1min",
        "default_transaction_read_only": "on",
        "temp_file_limit": "1GB",
    }


async def test_adding_again_keeps_the_password_and_changes_the_rights(
    roles: Database, database_url: str
) -> None:
    first = await add_analyst(roles, "lan", pii=True)

    again = await add_analyst(roles, "lan", pii=False)
    conn = await connected(database_url, first)

    assert again.password is None
    assert await refused(conn, "SELECT content FROM analytics.messages")
    assert await conn.fetchval("SELECT count(*) FROM sessions") == 0
    await conn.close()


async def test_a_view_made_since_is_granted_by_adding_again(roles: Database, database_url: str) -> None:
    analyst = await add_analyst(roles, "lan", pii=False)
    async with roles.connection() as conn:
        await conn.execute("CREATE VIEW analytics.newer AS SELECT 1 AS one")
    try:
        await add_analyst(roles, "lan", pii=False)
        conn = await connected(database_url, analyst)
        assert await conn.fetchval("SELECT one FROM newer") == 1
        await conn.close()
    finally:
        async with roles.connection() as conn:
            await conn.execute("DROP VIEW analytics.newer")


@pytest.mark.parametrize(
    "name", ["", "Lan", "1lan", "pg_lan", "lan; DROP TABLE x", 'lan"', "x" * 64, "chat_analyst", "lan\n"]
)
async def test_a_name_that_is_none_is_refused(roles: Database, name: str) -> None:
    with pytest.raises(StartRefused, match="is no name for an analyst"):
        await add_analyst(roles, name, pii=False)


async def test_an_account_that_is_no_analyst_is_left_alone(roles: Database) -> None:
    async with roles.connection() as conn:
        await conn.execute("CREATE ROLE minh LOGIN")

    with pytest.raises(StartRefused, match="minh is there already, and is no analyst"):
        await add_analyst(roles, "minh", pii=False)


async def test_an_account_that_may_not_make_others_is_told_so(roles: Database, database_url: str) -> None:
    async with roles.connection() as conn:
        await conn.execute("CREATE ROLE khoa LOGIN PASSWORD 'khoa'")
    address = urlsplit(database_url).netloc.rpartition("@")[2]
    theirs = urlsplit(database_url)._replace(netloc=f"khoa:khoa@{address}").geturl()
    database = Database(create_engine(theirs, application_name="tests"))

    with pytest.raises(StartRefused, match="CREATEROLE"):
        await add_analyst(database, "lan", pii=False)
    await database.close()


async def test_analysts_are_added_at_once_in_several_databases(
    roles: Database, servers: Servers, database_url: str
) -> None:
    async with new_database(servers, "chat_analysts") as other_url:
        await migrate(other_url)
        other = Database(create_engine(other_url, application_name="tests"))
        try:
            added = await asyncio.gather(
                *(add_analyst(one, name, pii=False) for one in (roles, other) for name in ("lan", "minh")),
                return_exceptions=True,
            )
            assert [one for one in added if not isinstance(one, Analyst)] == []
            again = await add_analyst(other, "khoa", pii=False)
            conn = await connected(other_url, again)
            assert await conn.fetchval("SELECT count(*) FROM sessions") == 0
            await conn.close()
        finally:
            async with other.connection() as conn:
                await conn.execute(f"DROP OWNED BY lan, minh, khoa, {ANALYST}, {ANALYST_PII}")
            await other.close()

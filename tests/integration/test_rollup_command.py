"""`chat-sessions rollup`, `analyst` and `dictionary`, as they are called from a shell; and the service that counts."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.analytics import rollups
from app.cli.main import app
from app.postgres.analysts import ANALYST
from app.postgres.engine import Database
from app.postgres.store import PostgresChatSessionStore
from app.settings import Settings
from app.wiring import open_runtime
from tests.contract.suite import new_session, until
from tests.integration.test_analysts import roles
from tests.integration.test_rollups import uncountable

__all__ = ["roles"]

pytestmark = pytest.mark.anyio

Call = Callable[..., Awaitable[Result]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Call:
    """Runs a command in an empty folder: no .env and no running service is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("DATABASE_URL", database_url)

    async def call_(*arguments: str, **environment: str) -> Result:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # In a thread: the command has an event loop of its own.
        return await asyncio.to_thread(CliRunner().invoke, app, arguments)

    return call_


async def messages_by_day(database: Database) -> list[tuple[object, ...]]:
    async with database.connection() as conn:
        return [tuple(row) for row in await conn.fetch("SELECT day, messages FROM analytics.messages_daily")]


async def test_what_is_pending_is_counted_by_hand(call: Call, database: Database) -> None:
    await new_session(PostgresChatSessionStore(database, ttl_seconds=60), "a", "b")

    done = await call("rollup")

    assert done.exit_code == 0, done.output
    assert done.output.endswith("days of UTC\n")
    assert [count for _, count in await messages_by_day(database)] == [2]


async def test_other_days_take_a_rebuild(call: Call, database: Database) -> None:
    await new_session(PostgresChatSessionStore(database, ttl_seconds=60), "a", "b")
    await call("rollup")

    refused = await call("rollup", ANALYTICS_TIMEZONE="Asia/Ho_Chi_Minh")
    rebuilt = await call("rollup", "--rebuild", ANALYTICS_TIMEZONE="Asia/Ho_Chi_Minh")

    assert refused.exit_code == 1
    assert "have days of UTC, and ANALYTICS_TIMEZONE is Asia/Ho_Chi_Minh" in refused.stderr
    assert "--rebuild" in refused.stderr
    assert rebuilt.exit_code == 0, rebuilt.output
    assert [count for _, count in await messages_by_day(database)] == [2]


async def test_a_session_that_can_not_be_counted_is_shown(call: Call, database: Database) -> None:
    store = PostgresChatSessionStore(database, ttl_seconds=60)
    bad = await new_session(store, "a", "b")
    await new_session(store, "a", "b", "c")
    async with uncountable(database, bad):
        done = await call("rollup")
        shown = await call("rollup", "status")
        as_json = await call("rollup", "status", "--json")
    both = await call("rollup", "status", "--rebuild")
    mended = await call("rollup", "--json")

    assert done.exit_code == 1
    assert "1 of the sessions can't be counted" in done.stderr
    assert shown.exit_code == 0
    assert str(bad) in shown.stdout
    assert "never_this_one" in shown.stdout
    [session] = json.loads(as_json.stdout)["sessions"]
    assert (session["session_id"], session["failures"]) == (str(bad), 1)
    assert both.exit_code == 2
    assert mended.exit_code == 0, mended.output
    assert json.loads(mended.stdout)["set_aside"] == 0
    assert [count for _, count in await messages_by_day(database)] == [5]


async def test_a_time_zone_that_is_none_is_named(call: Call) -> None:
    done = await call("rollup", ANALYTICS_TIMEZONE="Mars/Olympus")

    assert done.exit_code == 1
    assert "ANALYTICS_TIMEZONE=Mars/Olympus: should be the name of a time zone" in done.stderr


@pytest.mark.parametrize("command", [("rollup",), ("dictionary",), ("analyst", "add", "lan")])
async def test_a_database_that_can_not_be_reached_is_one_line(call: Call, command: tuple[str, ...]) -> None:
    done = await call(*command, DATABASE_URL="postgresql://chat:secret@127.0.0.1:1/chat")

    assert done.exit_code == 1
    assert "PostgreSQL can't be reached" in done.stderr
    assert "Traceback" not in done.output


async def test_the_url_of_an_analyst_opens_the_views(call: Call, roles: Database) -> None:
    made = await call("analyst", "add", "lan")
    again = await call("analyst", "add", "lan", "--pii", "--json")

    conn = await asyncpg.connect(made.stdout.strip())
    try:
        assert await conn.fetchval("SELECT count(*) FROM messages") == 0
    finally:
        await conn.close()
    assert json.loads(again.stdout)["role"] == f"{ANALYST}_pii"
    assert "lan@" in json.loads(again.stdout)["url"]


async def test_the_dictionary_is_printed(call: Call, database: Database) -> None:
    done = await call("dictionary")

    assert done.exit_code == 0
    assert "## analytics.sessions_daily" in done.stdout


async def test_a_service_counts_by_itself(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "_EVERY_SECONDS", 0.05)
    async with open_runtime(
        settings.model_copy(update={"analytics_timezone": "Asia/Ho_Chi_Minh"})
    ) as runtime:
        await new_session(runtime.store, "a", "b")

        async def counted() -> bool:
            return [count for _, count in await messages_by_day(database)] == [2]

        await until(counted, seconds=30)

    async with database.connection() as conn:
        assert await conn.fetchval("SELECT timezone FROM analytics.rollup_state") == "Asia/Ho_Chi_Minh"
        assert await conn.fetchval("SELECT complete FROM analytics.rollup_state")

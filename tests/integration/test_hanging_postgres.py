"""PostgreSQL takes what is sent and says nothing: stopped, stuck in its disk, or behind a network that swallows packets."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from sqlalchemy import text

import app.postgres.engine as engine_module
from app.errors import DurableStoreUnavailable
from app.postgres.engine import Database, create_engine
from app.settings import Settings
from app.store import ChatSessionStore
from app.wiring import open_runtime
from tests.contract.suite import new_session, texts, until
from tests.factories import new_append
from tests.failure.chaos.proxy import Link

pytestmark = pytest.mark.anyio

A_MOMENT_AGO = "PostgreSQL did not answer a moment ago"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "COMMAND_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(engine_module, "CONNECT_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(engine_module, "_SIGN_SECONDS", 0.4)


@pytest.fixture
async def link(database_url: str) -> AsyncIterator[Link]:
    port = urlsplit(database_url).port
    assert port is not None
    made = Link(0, lambda: port)
    await made.open()
    yield made
    made.close()


def through(link: Link, url: str) -> str:
    parts = urlsplit(url)
    host = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{link.port}"
    return parts._replace(netloc=host.removeprefix("@")).geturl()


@asynccontextmanager
async def opened(url: str, *, remembers_outages: bool) -> AsyncIterator[Database]:
    engine = create_engine(url, application_name="tests", pool_size=2)
    database = Database(engine, remembers_outages=remembers_outages)
    try:
        yield database
    finally:
        await database.close()


async def ask(database: Database, statement: str = "SELECT 1") -> int:
    async with database.connection() as conn:
        answer: int = await conn.fetchval(statement)
    return answer


async def ask_core(database: Database) -> int:
    async with database.core() as conn:
        answer: int = (await conn.execute(text("SELECT 1"))).scalar_one()
    return answer


#: What is hot, and what goes through SQLAlchemy.
asks = pytest.mark.parametrize("ask", [ask, ask_core])

Ask = Callable[[Database], Awaitable[int]]


async def found_hanging(database: Database, link: Link, ask: Ask) -> None:
    """It has answered, it hangs, and one has waited in vain."""
    assert await ask(database) == 1
    await link.change("hole")
    with pytest.raises(DurableStoreUnavailable, match="can't be reached"):
        await ask(database)


@asks
async def test_one_waits_in_vain_and_the_others_are_told_at_once(
    link: Link, database_url: str, ask: Ask
) -> None:
    async with opened(through(link, database_url), remembers_outages=True) as database:
        await found_hanging(database, link, ask)
        for _ in range(3):
            with pytest.raises(DurableStoreUnavailable, match=A_MOMENT_AGO):
                await ask(database)

        await link.change("ok")
        # Not before somebody has had an answer, or it is time to try.
        with pytest.raises(DurableStoreUnavailable, match=A_MOMENT_AGO):
            await ask(database)
        database.answers_again()
        assert await ask(database) == 1


@asks
async def test_one_at_a_time_tries_again(
    link: Link, database_url: str, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    async with opened(through(link, database_url), remembers_outages=True) as database:
        await found_hanging(database, link, ask)
        monkeypatch.setattr(engine_module, "_TRY_AGAIN_SECONDS", 0.0)
        with pytest.raises(DurableStoreUnavailable, match="can't be reached"):
            await ask(database)
        await link.change("ok")

        assert await ask(database) == 1
        monkeypatch.undo()
        assert await ask(database) == 1


@asks
async def test_while_one_tries_again_the_others_are_told_at_once(
    link: Link, database_url: str, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    async with opened(through(link, database_url), remembers_outages=True) as database:
        await found_hanging(database, link, ask)
        monkeypatch.setattr(engine_module, "_TRY_AGAIN_SECONDS", 0.0)
        trying = asyncio.create_task(ask(database))
        # It runs until it waits.
        await asyncio.sleep(0)

        with pytest.raises(DurableStoreUnavailable, match=A_MOMENT_AGO):
            await ask(database)

        with pytest.raises(DurableStoreUnavailable, match="can't be reached"):
            await trying


async def test_a_statement_that_takes_too_long_is_no_outage_while_others_have_answers(
    database_url: str,
) -> None:
    async with opened(database_url, remembers_outages=True) as database:
        assert await ask(database) == 1
        asked = asyncio.create_task(ask(database, "SELECT 1 FROM pg_sleep(2)"))
        while not asked.done():
            # As the heartbeat does, on connections of its own.
            database.answers_again()
            await asyncio.sleep(0.05)

        with pytest.raises(DurableStoreUnavailable, match="can't be reached"):
            await asked
        assert await ask(database) == 1


@asks
async def test_one_that_refuses_by_itself_is_asked_as_ever(
    link: Link, database_url: str, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr(engine_module, "_SIGN_SECONDS", 0.0)
    async with opened(through(link, database_url), remembers_outages=True) as database:
        assert await ask(database) == 1
        await link.change("cut")
        for _ in range(2):
            with pytest.raises(DurableStoreUnavailable, match="PostgreSQL can't"):
                await ask(database)
        await link.change("ok")

        assert await ask(database) == 1


async def test_a_command_waits_for_its_own(link: Link, database_url: str) -> None:
    async with opened(through(link, database_url), remembers_outages=False) as database:
        assert await ask(database) == 1
        await link.change("hole")
        for _ in range(2):
            with pytest.raises(DurableStoreUnavailable, match="can't be reached"):
                await ask(database)
        await link.change("ok")

        assert await ask(database) == 1


async def test_a_service_goes_on_with_its_cache_and_comes_back_by_its_heartbeat(
    link: Link, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_TRY_AGAIN_SECONDS", 1000.0)
    assert settings.database_url is not None
    behind = settings.model_copy(update={"database_url": through(link, settings.database_url)})
    async with open_runtime(behind) as runtime:
        session_id = await new_session(runtime.store, "a")
        assert await texts(runtime.store, session_id) == ["a"]
        await link.change("hole")

        async def is_refused_at_once() -> bool:
            try:
                await runtime.store.append(new_append(session_id, "lost"))
            except DurableStoreUnavailable as exc:
                return A_MOMENT_AGO in str(exc)
            return False

        await until(is_refused_at_once)

        async def is_labelled() -> bool:
            """Once the lease has ended: until then nobody could have committed anything newer."""
            history = await runtime.store.read_history(session_id, max_messages=10)
            assert [message.content for message in history.messages] == ["a"]
            return history.freshness.age_seconds is not None

        await until(is_labelled)
        assert {one.name: one.status for one in await runtime.store.health()}["postgres"] != "pass"

        await link.change("ok")
        await until(lambda: appended(runtime.store, session_id))
        assert await texts(runtime.store, session_id) == ["a", "b"]


async def appended(store: ChatSessionStore, session_id: UUID) -> bool:
    try:
        await store.append(new_append(session_id, "b"))
    except DurableStoreUnavailable:
        return False
    return True

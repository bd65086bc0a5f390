"""Servers and handles. Data comes from plain functions in `tests/factories.py`."""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from redis.asyncio import Redis

from app.coherence.ports import CacheState
from app.postgres.cache_state import claim_state
from app.postgres.engine import Database, create_engine
from app.settings import Settings
from tests.databases import empty, forget_state, migrate, new_database
from tests.servers import PROCESSES_MAX, Servers, announcement, choose, cores, open_servers
from tests.stores import trust

# Its assertions explain themselves like those of any test module, whoever imports it first.
pytest.register_assert_rewrite("tests.contract.suite")

servers_key = pytest.StashKey[set[str]]()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Real servers for the whole run, or for this process of it; the last line of the report says which."""
    # Not below pytest's own folders: as root, the account that the servers run as can't reach into those.
    with TemporaryDirectory(prefix="chat-tests-") as folder, open_servers(choose(), Path(folder)) as opened:
        request.config.stash[servers_key].add(opened.versions())
        yield opened


def pytest_configure(config: pytest.Config) -> None:
    # A run in the background of a script ignores Ctrl-C, and so would the services that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[servers_key] = set()
    if config.getoption("numprocesses", None) and choose() == "urls":
        # Tests empty the databases 1 and 2 of Redis, end everybody's connections, and set its limits.
        raise pytest.UsageError(
            "one pair of servers is for one process: with TEST_DATABASE_URL no -n, or -n auto"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process for each core, each with servers of its own; 0 is this process alone."""
    return 0 if choose() == "urls" or cores() == 1 else min(cores(), PROCESSES_MAX)


def pytest_report_header() -> str:
    return f"servers: {announcement(choose())}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["servers"] = list(session.config.stash[servers_key])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a process says at its end; one that crashed says nothing."""
    node.config.stash[servers_key].update(getattr(node, "workeroutput", {}).get("servers", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"servers: {'; '.join(config.stash[servers_key]) or 'none were needed'}")


@pytest.fixture(scope="session")
async def database_url(servers: Servers, anyio_backend: str) -> AsyncIterator[str]:
    """A migrated database that is ours alone."""
    async with new_database(servers, "chat_tests") as url:
        await migrate(url)
        yield url


@pytest.fixture(scope="session")
async def connections(database_url: str) -> AsyncIterator[Database]:
    """The connections of all tests: a new one reads PostgreSQL's catalogs anew, which takes longer than most tests."""
    database = Database(create_engine(database_url, application_name="tests"))
    yield database
    await database.close()


@pytest.fixture
async def database(connections: Database) -> Database:
    """The migrated database, empty, in mode hybrid; nobody may trust Redis."""
    await empty(connections)
    await claim_state(connections, redis_only=None)
    return connections


@pytest.fixture
async def redis(servers: Servers) -> AsyncIterator[Redis]:
    """The sessions' database of Redis, empty; the auxiliary one is empty too."""
    async with (
        Redis.from_url(servers.redis_url, db=2) as aux,
        Redis.from_url(servers.redis_url, db=1) as redis,
    ):
        await aux.flushdb()
        await redis.flushdb()
        yield redis


@pytest.fixture
async def state(servers: Servers, database: Database, redis: Redis) -> CacheState:
    """The state of the database, in which the test's Redis may be trusted."""
    return await trust(database, servers.redis_url)


@pytest.fixture
async def settings(servers: Servers, database_url: str, database: Database, redis: Redis) -> Settings:
    """Hybrid mode on the test's servers, both of them empty; a first start will claim the database."""
    await forget_state(database)
    return Settings(_env_file=None, database_url=database_url, redis_url=servers.redis_url)

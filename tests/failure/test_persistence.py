"""Redis-only mode while Redis ends and starts again: what is lost, what is not, and what a caller is told.

Each test has a server of its own, which it ends by signal and starts again on the same port and files. The store
is the same before and after: nothing has to be rebuilt. What each setting costs: benchmarks/persistence.py.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import UUID

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app.embedded import _find_valkey, _free_port
from app.errors import RedisUnavailable, SessionNotFound
from app.redis_sessions.store import RedisChatSessionStore
from app.settings import Settings
from app.store import Append
from tests.contract.suite import Call, every_call, new_session, texts, until
from tests.factories import keyed_append, new_append
from tests.integration.api_client import SESSIONS, assert_problem, open_api

pytestmark = [
    pytest.mark.anyio,
    # redis-py leaves the socket of a connection that is cancelled while it is made to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NOTHING = ("--save", "", "--appendonly", "no")
SNAPSHOTS = ("--save", "3600 1", "--appendonly", "no")
AOF_ALWAYS = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")

CALLERS = 8
ACKNOWLEDGED_BEFORE_THE_KILL = 300


class OwnServer:
    """A Valkey with these options, on one port and in one folder for all of its lives."""

    def __init__(self, folder: Path, *options: str) -> None:
        programs = _find_valkey()
        self.port = _free_port(0)
        self.folder = folder / "redis"
        self._argv = [str(programs.path(programs.server)), "--dir", str(self.folder), "--bind", "127.0.0.1"]
        self._argv += ["--port", str(self.port), *options]
        self._process = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *options: str) -> None:
        """Until it answers, which may be before it has read its files."""
        self.folder.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [*self._argv, *options], stdout=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 10
        while True:
            assert self._process.poll() is None, "the server ended while it started"
            assert time.monotonic() < deadline
            with suppress(RedisConnectionError), self.redis() as redis:
                redis.info("server")
                return
            time.sleep(0.005)

    def restart(self) -> None:
        self.start()
        deadline = time.monotonic() + 10
        with self.redis() as redis:
            while redis.info("persistence")["loading"]:
                assert time.monotonic() < deadline
                time.sleep(0.005)

    def redis(self) -> Redis:
        return Redis(port=self.port, db=1, retry=None)

    def end(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)
        self._process.wait(10)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., OwnServer]]:
    with ExitStack() as stack:

        def started(*options: str) -> OwnServer:
            server = OwnServer(tmp_path, *options)
            stack.callback(server.close)
            server.start()
            return server

        yield started


@pytest.fixture
async def open_store() -> AsyncIterator[Callable[[OwnServer], RedisChatSessionStore]]:
    opened = []

    def for_server(server: OwnServer) -> RedisChatSessionStore:
        opened.append(RedisChatSessionStore(redis_url=server.url, messages_max=10_000))
        return opened[-1]

    yield for_server
    for store in opened:
        await store.close()


async def back(store: RedisChatSessionStore) -> None:
    """A store rests for a moment after an outage."""

    async def healthy() -> bool:
        return (await store.health())[0].status == "pass"

    await until(healthy)


async def test_with_always_nothing_acknowledged_is_lost_by_a_kill(start, open_store) -> None:
    server = start(*AOF_ALWAYS)
    store = open_store(server)
    sessions = [await new_session(store) for _ in range(CALLERS)]
    sent: list[Append] = []
    acknowledged: list[Append] = []
    unanswered: list[Append] = []
    enough = asyncio.Event()

    async def caller(session_id: UUID) -> None:
        while not unanswered:
            append = keyed_append(session_id, f"key {len(sent)}", f"question {len(sent)}", "answer")
            sent.append(append)
            try:
                await store.append(append)
            except RedisUnavailable:
                unanswered.append(append)
            else:
                acknowledged.append(append)
            if len(acknowledged) >= ACKNOWLEDGED_BEFORE_THE_KILL:
                enough.set()

    callers = asyncio.gather(*map(caller, sessions))
    await enough.wait()
    server.end(signal.SIGKILL)
    await callers
    server.restart()
    await back(store)

    def ids(appends: list[Append], session_id: UUID) -> list[UUID]:
        of_session = [one.messages for one in appends if one.session_id == session_id]
        return [message.message_id for messages in of_session for message in messages]

    for session_id in sessions:
        history = await store.read_history(session_id, max_messages=10_000)
        found = [message.message_id for message in history.messages]
        assert found[: len(ids(acknowledged, session_id))] == ids(acknowledged, session_id)
        assert found == ids(sent, session_id)[: len(found)]

    # An answer that never came says nothing about the append: its retry appends it once.
    for append in unanswered:
        await store.append(append)
    for session_id in sessions:
        history = await store.read_history(session_id, max_messages=10_000)
        assert [message.message_id for message in history.messages] == ids(sent, session_id)


async def test_without_persistence_a_graceful_restart_is_an_empty_store_and_no_error(start) -> None:
    server = start(*NOTHING)
    settings = Settings(_env_file=None, redis_url=server.url, redis_only_mode=True, database_url=None)
    async with open_api(settings) as api:
        session = await api.new_session()
        await api.record(session, "a", "b")

        server.end(signal.SIGTERM)
        assert_problem(await api.get(f"{session}/history"), 503, "redis_unavailable")
        server.restart()
        await back(api.runtime.store)

        assert_problem(await api.get(f"{session}/history"), 404, "session_not_found")
        listed = await api.get(SESSIONS, params={"user_id": "user123"})
        assert (listed.status_code, listed.json()["sessions"], listed.json()["total"]) == (200, [], 0)
        another = await api.new_session()
        await api.record(another, "c")
        assert await api.contents(another) == ["c"]


async def test_a_graceful_restart_with_snapshots_keeps_all(start, open_store) -> None:
    server = start(*SNAPSHOTS)
    store = open_store(server)
    sessions = [await new_session(store, "a", "b") for _ in range(20)]

    server.end(signal.SIGTERM)
    server.restart()
    await back(store)

    assert [await texts(store, session_id) for session_id in sessions] == [["a", "b"]] * 20
    listed = (await store.list_sessions("user123", limit=100)).sessions
    assert [session.session_id for session in listed] == sessions[::-1]


async def test_a_kill_takes_sessions_back_to_the_last_snapshot(start, open_store) -> None:
    server = start(*SNAPSHOTS)
    store = open_store(server)
    old = await new_session(store, "a")
    with server.redis() as redis:
        redis.save()
    await store.append(new_append(old, "b"))
    young = await new_session(store, "c")

    server.end(signal.SIGKILL)
    server.restart()
    await back(store)

    assert await texts(store, old) == ["a"]
    assert (await store.append(new_append(old, "d"))).last_seq == 2
    with pytest.raises(SessionNotFound):
        await store.get_session(young)


@every_call
async def test_a_redis_that_is_down_never_reads_as_not_found(start, open_store, call: Call) -> None:
    server = start(*AOF_ALWAYS)
    store = open_store(server)
    session_id = await new_session(store, "a")

    server.end(signal.SIGKILL)

    # The first finds it out, the second is told so without asking Redis again.
    for _ in range(2):
        with pytest.raises(RedisUnavailable):
            await call(store, session_id, "user123")
    with pytest.raises(RedisUnavailable):
        await store.list_sessions("user123", limit=10)
    with pytest.raises(RedisUnavailable):
        await store.create_session("user123")
    assert (await store.health())[0].status == "fail"

    server.restart()
    await back(store)

    assert await texts(store, session_id) == ["a"]


async def test_a_redis_that_still_reads_its_files_never_reads_as_not_found(start, open_store) -> None:
    server = start(*SNAPSHOTS)
    before = open_store(server)
    sessions = [await new_session(before, "a") for _ in range(200)]
    server.end(signal.SIGTERM)

    # 20 ms a session, until it is told to hurry.
    server.start("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    store = open_store(server)
    with server.redis() as redis:
        with pytest.raises(RedisUnavailable) as raised:
            await store.get_session(sessions[-1])
        redis.config_set("key-load-delay", 0)
    await back(store)

    assert "loading" in str(raised.value.__cause__)

    assert [await texts(store, session_id) for session_id in sessions] == [["a"]] * 200
    assert await texts(before, sessions[0]) == ["a"]


async def test_a_redis_that_can_not_save_refuses_and_keeps_what_it_has(start, open_store) -> None:
    server = start(*SNAPSHOTS)
    store = open_store(server)
    session_id = await new_session(store, "a")
    in_the_way = server.folder / "dump.rdb"
    in_the_way.mkdir()

    with server.redis() as redis:
        redis.bgsave()

        async def failed() -> bool:
            return redis.info("persistence")["rdb_last_bgsave_status"] == "err"

        await until(failed)
    with pytest.raises(RedisUnavailable):
        await store.append(new_append(session_id, "b"))
    with pytest.raises(RedisUnavailable):  # a read slides the TTL, so it is a write to Redis
        await store.read_history(session_id, max_messages=10)

    in_the_way.rmdir()
    with server.redis() as redis:
        redis.save()
    await back(store)

    assert await texts(store, session_id) == ["a"]

"""The speed of the hybrid store, as ratios within one run: on embedded servers, fsync on, in about a minute.

Cases that are compared take turns on the same servers (call by call, or A-B-C, C-B-A, ...). A ratio is taken
within a round; reported are its minimum, median and maximum over the
rounds. What a baseline's ratio to itself ("again") strays from 1 is what the machine's noise is worth.
Only the docstrings of the scenarios say what is expected, and why.

    python benchmarks/quick.py [--json FILE]
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import asyncpg
import uvloop
from by_hand import HandWrittenStore, Model
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from app.chat import NewMessage, new_uuid, session_month, utc_now
from app.coherence.ports import CacheState, MarkOutcome, Row
from app.embedded import EmbeddedServers, embedded_servers
from app.postgres.engine import sqlalchemy_url
from app.postgres.schema import upgrade
from app.redis_sessions.cache import RedisSessionCache
from app.settings import Settings
from app.store import Append, ChatSessionStore
from app.wiring import Stores as OfDatabase
from app.wiring import open_runtime, open_stores

CALLERS = 32
SESSIONS = 160
MESSAGES_BEFORE = 20
QUESTION = ("Điều kiện tham gia đấu thầu? " * 5)[:120]
ANSWER = ("Theo Điều 5 của Luật Đấu thầu 2023, nhà thầu phải đáp ứng các điều kiện. " * 6)[:400]

Call = Callable[[], Awaitable[object]]


@dataclass(kw_only=True)
class Scenario:
    """Rounds of one number a case. `pairs` are the ratios that are reported: name, numerator, denominator."""

    name: str
    expected: str
    unit: str
    pairs: Sequence[tuple[str, str, str]]
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, one_round: dict[str, float]) -> None:
        for case, value in one_round.items():
            self.rounds.setdefault(case, []).append(value)

    def ratios(self) -> dict[str, list[float]]:
        return {
            name: [a / b for a, b in zip(self.rounds[over], self.rounds[under], strict=True)]
            for name, over, under in self.pairs
        }

    def text(self) -> str:
        lines = [f"{self.name}: {self.expected}", f"  {'ratio':<46} {'min':>9} {'median':>9} {'max':>9}"]
        lines += [_row(name, values) for name, values in self.ratios().items()]
        lines.append(f"  {self.unit}")
        lines += [_row(name, values) for name, values in self.rounds.items()]
        return "\n".join(lines)


def _row(name: str, values: list[float]) -> str:
    shown = (min(values), statistics.median(values), max(values))
    return f"  {name:<46} " + " ".join(f"{value:>9,.{0 if value >= 100 else 2}f}" for value in shown)


@dataclass(frozen=True, kw_only=True)
class Stores:
    """All that is compared, on the same two servers. `unmarked` is `hybrid` without its marks; PostgreSQL alone has
    a database of its own: beside others it would turn their cache off.
    """

    hybrid: ChatSessionStore
    always: ChatSessionStore
    unmarked: ChatSessionStore
    postgres_only: ChatSessionStore
    redis_only: ChatSessionStore
    by_hand: HandWrittenStore
    conn: asyncpg.Connection
    redis: Redis


class UnmarkedCache(RedisSessionCache):
    """Unsafe, to measure against: nothing says that a write is under way. The publish stays."""

    async def mark(
        self,
        writes: Sequence[tuple[Row, Row]],
        state: CacheState,  # noqa: ARG002 - in the place of one that needs it
        *,
        token: str,  # noqa: ARG002 - as above
    ) -> list[MarkOutcome]:
        return ["marked"] * len(writes)


@asynccontextmanager
async def opened_stores(servers: EmbeddedServers) -> AsyncIterator[Stores]:
    """The stores as `wiring` builds them, each kind with databases of its own; bare connections beside."""
    assert servers.database_url is not None
    assert servers.redis_url is not None
    alone_url = await _second_database(servers.database_url)
    shared: dict[str, Any] = {"_env_file": None, "redis_url": servers.redis_url}
    async with AsyncExitStack() as stack:

        async def opened(**settings: Any) -> ChatSessionStore:
            return (await stack.enter_async_context(open_runtime(Settings(**shared, **settings)))).store

        async def hybrid(**settings: Any) -> OfDatabase:
            # Without the service around it: its samples would be in some of the rounds.
            of_hybrid = Settings(database_url=servers.database_url, **shared, **settings)
            return await stack.enter_async_context(open_stores(of_hybrid))

        # As in SQLAlchemy's tutorial: its own pool, of 5 connections and up to 10 more.
        engine = create_async_engine(sqlalchemy_url(servers.database_url))
        stack.push_async_callback(engine.dispose)
        async with engine.begin() as tx:
            await tx.run_sync(Model.metadata.create_all)
        conn = await asyncpg.connect(servers.database_url)
        stack.push_async_callback(conn.close)
        leased, always, unmarked = await hybrid(), await hybrid(cache_verify="always"), await hybrid()
        assert leased.hybrid is not None
        assert always.hybrid is not None
        assert unmarked.hybrid is not None
        assert unmarked.cache is not None
        # The very same store in all but this one step.
        unmarked.cache.__class__ = UnmarkedCache
        yield Stores(
            hybrid=leased.hybrid,
            always=always.hybrid,
            unmarked=unmarked.hybrid,
            postgres_only=await opened(database_url=alone_url, enable_redis_sessions=False),
            redis_only=await opened(redis_only_mode=True, redis_db_sessions=3, redis_db_aux=4),
            by_hand=HandWrittenStore(
                engine, await stack.enter_async_context(Redis.from_url(f"{servers.redis_url}/5"))
            ),
            conn=conn,
            redis=await stack.enter_async_context(Redis.from_url(f"{servers.redis_url}/1")),
        )


async def _second_database(url: str) -> str:
    alone_url = f"{url}_alone"
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f'CREATE DATABASE "{alone_url.rpartition("/")[2]}" TEMPLATE template0')
    finally:
        await admin.close()
    await asyncio.to_thread(upgrade, alone_url)
    return alone_url


def turn_of(session_id: UUID) -> Append:
    """A question and its answer, as one append."""
    return append_of(session_id, ("user", QUESTION), ("assistant", ANSWER))


def append_of(session_id: UUID, *messages: tuple[Any, str]) -> Append:
    return Append(
        session_id=session_id,
        messages=tuple(
            NewMessage(message_id=new_uuid(), role=role, content=content, created_at=utc_now())
            for role, content in messages
        ),
    )


async def filled_sessions(store: ChatSessionStore, count: int) -> list[UUID]:
    """Sessions with `MESSAGES_BEFORE` messages, in every store that the store has."""

    async def one(index: int) -> UUID:
        session_id = (await store.create_session(f"user{index}")).session.session_id
        turns = [("user", QUESTION), ("assistant", ANSWER)] * (MESSAGES_BEFORE // 2)
        await store.append(append_of(session_id, *turns))
        return session_id

    return await in_parallel(one, count)


async def filled_by_hand(store: HandWrittenStore, count: int) -> list[UUID]:
    async def one(index: int) -> UUID:
        session_id = await store.create_session(f"user{index}")
        await store.add_messages(
            session_id, [("user", QUESTION), ("assistant", ANSWER)] * (MESSAGES_BEFORE // 2)
        )
        return session_id

    return await in_parallel(one, count)


async def in_parallel(one: Callable[[int], Awaitable[UUID]], count: int) -> list[UUID]:
    at_once = asyncio.Semaphore(8)

    async def bounded(index: int) -> UUID:
        async with at_once:
            return await one(index)

    return await asyncio.gather(*(bounded(index) for index in range(count)))


class Load:
    """Closed loops, each on sessions of its own, one after the other."""

    def __init__(self, call: Callable[[UUID], Awaitable[object]], sessions: list[UUID]) -> None:
        self._call = call
        self._owned = [cycle(sessions[caller::CALLERS]) for caller in range(CALLERS)]

    async def per_second(self, seconds: float) -> float:
        done = 0
        began = time.perf_counter()

        async def caller(owned: Iterator[UUID]) -> None:
            nonlocal done
            while time.perf_counter() < began + seconds:
                await self._call(next(owned))
                done += 1

        await asyncio.gather(*map(caller, self._owned))
        return done / (time.perf_counter() - began)


async def alone(scenario: Scenario, cases: dict[str, Call], *, calls: int, rounds: int) -> Scenario:
    """The median time of a call, with one caller: service time, for there is nothing to wait for.

    Cases take turns call by call, so that a slow second of the disk is everybody's.
    """
    order = list(cases.items())
    for index in range(-1, rounds):
        times: dict[str, list[int]] = {name: [] for name in cases}
        for _ in range(calls):
            random.shuffle(order)
            for name, call in order:
                began = time.perf_counter_ns()
                await call()
                times[name].append(time.perf_counter_ns() - began)
        if index >= 0:  # the first was for connections, prepared statements, scripts
            scenario.add({name: statistics.median(of_case) / 1e6 for name, of_case in times.items()})
    return scenario


async def together(scenario: Scenario, cases: dict[str, Load], *, seconds: float, rounds: int) -> Scenario:
    """Calls a second by `CALLERS` closed loops, case after case, every other round backwards."""
    for load in cases.values():
        await load.per_second(seconds / 4)
    for index in range(rounds):
        order = list(cases)[:: 1 if index % 2 == 0 else -1]
        rates = {name: await cases[name].per_second(seconds) for name in order}
        scenario.add({name: rates[name] for name in cases})
    return scenario


async def one_append(stores: Stores, sessions: list[UUID]) -> Scenario:
    """Hypothesis: alone, a durable append costs what its transaction costs. Ours has the same five round
    trips as the bare one (begin, lock, one look, write, commit) and one script against one SET (the mark runs
    beside the write), so what is above 1 is Python: values, checks, the pool, a task of its own. Expected: at
    most 1.4.

    Control: the bare one a second time in each round.
    """
    own, bare = cycle(sessions[::2]), cycle(sessions[1::2])

    async def hybrid() -> None:
        await stores.hybrid.append(append_of(next(own), ("assistant", ANSWER)))

    async def bare_append() -> None:
        session_id = next(bare)
        async with stores.conn.transaction():
            row = await stores.conn.fetchrow(
                "SELECT message_count FROM chat.chat_sessions WHERE session_id = $1 FOR NO KEY UPDATE",
                session_id,
            )
            await stores.conn.execute(
                "INSERT INTO chat.chat_messages "
                "(session_id, session_month, seq, message_id, role, content, created_at) "
                "VALUES ($1, $2, $3, $4, 'assistant', $5, $6)",
                session_id,
                session_month(session_id),
                row["message_count"] + 1,
                new_uuid(),
                ANSWER,
                utc_now(),
            )
            await stores.conn.execute(
                "UPDATE chat.chat_sessions SET message_count = $2, last_activity = $3 WHERE session_id = $1",
                session_id,
                row["message_count"] + 1,
                utc_now(),
            )
        await stores.redis.set(f"bare:{session_id}", ANSWER, px=3_600_000)

    alone_sessions = cycle(await filled_sessions(stores.postgres_only, len(sessions)))

    async def postgres_only() -> None:
        await stores.postgres_only.append(append_of(next(alone_sessions), ("assistant", ANSWER)))

    scenario = Scenario(
        name="durable append, one caller",
        expected="hybrid at most 1.4 x a bare transaction and a bare SET",
        unit="p50, ms",
        pairs=[
            ("hybrid / bare", "hybrid", "bare"),
            ("PostgreSQL only / bare", "PostgreSQL only", "bare"),
            ("control: bare again / bare", "bare again", "bare"),
        ],
    )
    cases: dict[str, Call] = {
        "hybrid": hybrid,
        "bare": bare_append,
        "bare again": bare_append,
        "PostgreSQL only": postgres_only,
    }
    return await alone(scenario, cases, calls=40, rounds=10)


async def one_mark(stores: Stores, sessions: list[UUID]) -> Scenario:
    """Hypothesis: the mark is sent beside the insert and answered before it, so at low load it costs the
    processor's time for one command, and no wait. Expected: at most 1.05.

    Control: the one without marks a second time in each round.
    """
    third = len(sessions) // 3
    owned = [cycle(sessions[third * index : third * (index + 1)]) for index in range(3)]

    def append(store: ChatSessionStore, its: Iterator[UUID]) -> Call:
        return lambda: store.append(append_of(next(its), ("assistant", ANSWER)))

    scenario = Scenario(
        name="the mark in a durable append, one caller",
        expected="at most 1.05 x the same store without its marks",
        unit="p50, ms",
        pairs=[
            ("marked / unmarked", "marked", "unmarked"),
            ("control: unmarked again / unmarked", "unmarked again", "unmarked"),
        ],
    )
    cases = {
        "marked": append(stores.hybrid, owned[0]),
        "unmarked": append(stores.unmarked, owned[1]),
        "unmarked again": append(stores.unmarked, owned[2]),
    }
    return await alone(scenario, cases, calls=60, rounds=12)


async def one_hit(stores: Stores, sessions: list[UUID]) -> Scenario:
    """Hypothesis: a trusted hit is one GETEX and the reading of the entry's head; PostgreSQL is not asked. With
    CACHE_VERIFY=always its row is looked up at the same time. Expected: at most 2 times a bare GETEX, whose
    reply is left as it is, and clearly less than always.

    Control: the bare one a second time in each round.
    """
    read, bare = cycle(sessions), cycle(sessions)

    def history(store: ChatSessionStore) -> Call:
        async def one() -> None:
            history = await store.read_history(next(read), max_messages=10)
            assert history.source == "redis"
            assert len(history.lines) == 10

        return one

    async def bare_hit() -> None:
        value = await stores.redis.getex(f"session:{next(bare)}", px=3_600_000)
        assert value is not None

    scenario = Scenario(
        name="history hit, one caller",
        expected="lease at most 2 x a bare GETEX",
        unit="p50, ms",
        pairs=[
            ("lease / bare GETEX", "lease", "bare GETEX"),
            ("always / lease", "always", "lease"),
            ("control: bare again / bare GETEX", "bare again", "bare GETEX"),
        ],
    )
    cases: dict[str, Call] = {
        "lease": history(stores.hybrid),
        "always": history(stores.always),
        "bare GETEX": bare_hit,
        "bare again": bare_hit,
    }
    return await alone(scenario, cases, calls=150, rounds=10)


async def many_turns(stores: Stores) -> Scenario:
    """Hypothesis: with 32 callers the processor is the limit, and then a turn costs what Python does for it.
    The copy in Redis costs the hybrid store a third of PostgreSQL alone; the hand-written hybrid pays for
    the ORM and for the JSON of the whole session. Expected: at least 0.6 of PostgreSQL alone and 1.5 times
    the hand-written one. Redis alone commits nothing: it is there to show what durability costs.

    Control: callers that store nothing, to show that the harness is not the limit.
    """

    def of(store: ChatSessionStore) -> Callable[[UUID], Awaitable[object]]:
        return lambda session_id: store.append(turn_of(session_id))

    async def nothing(session_id: UUID) -> None:
        turn_of(session_id)
        await asyncio.sleep(0)

    async def by_hand(session_id: UUID) -> None:
        await stores.by_hand.add_messages(session_id, [("user", QUESTION), ("assistant", ANSWER)])

    sessions = await filled_sessions(stores.hybrid, SESSIONS)
    cases = {
        "hybrid": Load(of(stores.hybrid), sessions),
        "PostgreSQL only": Load(
            of(stores.postgres_only), await filled_sessions(stores.postgres_only, SESSIONS)
        ),
        "Redis only (not durable)": Load(
            of(stores.redis_only), await filled_sessions(stores.redis_only, SESSIONS)
        ),
        "hand-written hybrid": Load(by_hand, await filled_by_hand(stores.by_hand, SESSIONS)),
        "control: nothing stored": Load(nothing, sessions),
    }
    scenario = Scenario(
        name=f"durable turns, {CALLERS} callers",
        expected="hybrid at least 0.6 x PostgreSQL only, 1.5 x the hand-written hybrid",
        unit="turns a second",
        pairs=[
            ("hybrid / hand-written hybrid", "hybrid", "hand-written hybrid"),
            ("hybrid / PostgreSQL only", "hybrid", "PostgreSQL only"),
            ("hybrid / Redis only (not durable)", "hybrid", "Redis only (not durable)"),
            ("control: nothing stored / hybrid", "control: nothing stored", "hybrid"),
        ],
    )
    return await together(scenario, cases, seconds=0.8, rounds=5)


async def facts(stores: Stores, servers: EmbeddedServers) -> dict[str, str]:
    names = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
    shown = [f"{name}={await stores.conn.fetchval(f'SHOW {name}')}" for name in names]
    config = await stores.redis.config_get("append*")
    packages = ("asyncpg", "sqlalchemy", "redis", "hiredis", "uvloop", "chat-sessions")
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before",
        "python": f"{platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages),
        "servers": f"PostgreSQL {servers.postgres_version} ({', '.join(shown)}); "
        f"{servers.redis_version} (appendonly={config['appendonly']}, appendfsync={config['appendfsync']})",
        "data": f"sessions of {MESSAGES_BEFORE} messages; a turn is {len(QUESTION)} and {len(ANSWER)} characters "
        f"({len(QUESTION.encode())} and {len(ANSWER.encode())} bytes); 8 connections a store",
    }


def fdatasync_ms(folder: Path) -> list[float]:
    """What PostgreSQL waits for in each commit, alone: a page written over, and on disk."""
    file = os.open(folder / "fdatasync", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(file, bytes(8192), 0)
        os.fsync(file)
        times = []
        for _ in range(100):
            began = time.perf_counter_ns()
            os.pwrite(file, bytes(8192), 0)
            os.fdatasync(file)
            times.append((time.perf_counter_ns() - began) / 1e6)
        return times
    finally:
        os.close(file)


async def measure(servers: EmbeddedServers, folder: Path) -> tuple[dict[str, str], list[Scenario]]:
    async with opened_stores(servers) as stores:
        synced = fdatasync_ms(folder)
        known = await facts(stores, servers) | {
            "disk": f"fdatasync of 8 KiB takes {statistics.median(synced):.2f} ms (p50), "
            f"{min(synced):.2f} to {max(synced):.2f}"
        }
        for name, value in known.items():
            print(f"{name:<8} {value}")
        sessions = await filled_sessions(stores.hybrid, 64)
        scenarios = []
        # The hits first: bare appends leave rows that their entries in Redis do not equal.
        for scenario in (
            one_hit(stores, sessions),
            one_mark(stores, sessions),
            one_append(stores, sessions),
            many_turns(stores),
        ):
            scenarios.append(await scenario)
            print(f"\n{scenarios[-1].text()}")
        return known, scenarios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")
    wanted = parser.parse_args()
    began = time.monotonic()
    with (
        TemporaryDirectory(prefix="chat-bench-") as folder,
        embedded_servers(Path(folder), postgres_port=0, redis_port=0) as servers,
    ):
        assert servers.database_url is not None
        upgrade(servers.database_url)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            known, scenarios = runner.run(measure(servers, Path(folder)))
    if wanted.json is not None:
        results = [{**asdict(scenario), "ratios": scenario.ratios()} for scenario in scenarios]
        text = json.dumps({"facts": known, "scenarios": results}, indent=2, ensure_ascii=False)
        wanted.json.write_text(text + "\n", encoding="utf-8")
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()

"""The kinds of fault: what each does, to whom, and how often.

A fault ends healed: servers answer, links are ok. What it could not do (a server that another fault holds back)
it raises, and is not counted.
"""

import asyncio
import os
import random
import signal
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from redis.exceptions import RedisError

from app.embedded import EmbeddedServerError
from tests.failure.chaos.proxy import FAULTY, LOOPBACK, Mode
from tests.failure.chaos.servers import App, Postgres, RedisServer
from tests.failure.chaos.workload import Crowd

#: A start-up packet for protocol 3.0: who sends it is asked for a password, and takes a place meanwhile.
_PARAMETERS = b"user\0chat\0database\0chat\0\0"
_STARTUP = struct.pack("!ii", 8 + len(_PARAMETERS), 3 << 16) + _PARAMETERS

_REDIS_BYTES_MAX = "256mb"

_SNAPSHOTS = 8


@dataclass
class World:
    """What there is to disturb."""

    folder: Path
    chance: random.Random
    postgres: Postgres
    primary: RedisServer
    standby: RedisServer
    apps: Sequence[App]
    crowd: Crowd
    #: REPLICAOF there and back without ending the clients' connections.
    surgery: bool = False
    snapshots: deque[tuple[float, Path]] = field(default_factory=lambda: deque(maxlen=_SNAPSHOTS))
    standby_ready: bool = False
    rejoining: "asyncio.Task[None] | None" = None

    async def pause(self, seconds_min: float, seconds_max: float) -> float:
        seconds = self.chance.uniform(seconds_min, seconds_max)
        await asyncio.sleep(seconds)
        return seconds

    def some_apps(self, targets: frozenset[int]) -> list[App]:
        return [app for app in self.apps if app.index in targets]

    async def rejoin(self, old: RedisServer, *, restart: bool) -> None:
        """Makes what was the primary an empty replica of what is it now."""
        while not self.standby_ready:
            with suppress(RedisError, OSError, TimeoutError, EmbeddedServerError):
                if restart:
                    await old.kill()
                    await old.start_empty()
                else:
                    await old.command("FLUSHALL")
                await old.replicates(self.primary)
                await old.in_sync(5)
                self.standby_ready = True
                return
            await asyncio.sleep(0.1)

    async def take_snapshot(self) -> None:
        path = self.folder / f"dump-{time.monotonic_ns()}.rdb"
        await self.primary.save_to(path)
        if len(self.snapshots) == _SNAPSHOTS:
            self.snapshots[0][1].unlink(missing_ok=True)
        self.snapshots.append((time.monotonic(), path))


Scope = Literal["app", "clients", "redis", "postgres", "redis links", "postgres links", "both links"]
Run = Callable[[World, frozenset[int]], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """`loses`: Redis has less afterwards than before. `brief`: nobody waits for it by itself."""

    name: str
    scope: Scope
    weight: float
    run: Run
    loses: bool = False
    brief: bool = False
    ready: Callable[[World], bool] = lambda _: True


# Instances and clients


async def _app_kill(world: World, targets: frozenset[int]) -> str:
    [app] = world.some_apps(targets)
    await app.kill()
    await world.pause(0, 0.3)
    await app.start()
    return f"instance {app.index}"


async def _app_stop(world: World, targets: frozenset[int]) -> str:
    [app] = world.some_apps(targets)
    app.send(signal.SIGSTOP)
    try:
        seconds = await world.pause(0.2, world.chance.choice([1.0, 2.0, 4.0]))
    finally:
        app.send(signal.SIGCONT)
    return f"instance {app.index}, {seconds:.2f} s"


async def _client_disconnect(world: World, _: frozenset[int]) -> None:
    world.crowd.rude_until = time.monotonic() + world.chance.uniform(0.2, 0.5)
    await asyncio.sleep(world.crowd.rude_until - time.monotonic())


# Redis


async def _redis_kill_empty(world: World, _: frozenset[int]) -> None:
    await world.primary.kill()
    await world.pause(0, 0.3)
    await world.primary.start_empty()


async def _redis_old_rdb(world: World, _: frozenset[int]) -> str:
    taken, dump = world.chance.choice(list(world.snapshots))
    await world.primary.kill()
    await world.primary.start_from(dump)
    return f"{time.monotonic() - taken:.2f} s old"


async def _redis_truncated_aof(world: World, _: frozenset[int]) -> str:
    await world.primary.kill()
    keep = world.chance.uniform(0.3, 0.999)
    try:
        await world.primary.start_from_torn_file(keep)
    except EmbeddedServerError:
        # Killed before its first file was complete.
        await world.primary.start_empty()
        return "nothing kept"
    return f"{keep:.3f} kept"


async def _redis_stop(world: World, _: frozenset[int]) -> str:
    world.primary.send(signal.SIGSTOP)
    try:
        seconds = await world.pause(0.2, 2)
    finally:
        world.primary.send(signal.SIGCONT)
    return f"{seconds:.2f} s"


def _full(policy: str) -> Run:
    async def run(world: World, _: frozenset[int]) -> None:
        server = world.primary
        try:
            await server.command("CONFIG", "SET", "maxmemory-policy", policy, "maxmemory", "1")
            await world.pause(0.1, 0.8)
        finally:
            await server.command(
                *("CONFIG", "SET", "maxmemory-policy", server.policy, "maxmemory", _REDIS_BYTES_MAX)
            )

    return run


async def _redis_del(world: World, _: frozenset[int]) -> None:
    for session in world.chance.sample(world.crowd.live, min(2, len(world.crowd.live))):
        await world.primary.command("DEL", f"session:{session.session_id}")


def _command(*words: str) -> Run:
    async def run(world: World, _: frozenset[int]) -> None:
        await world.primary.command(*words)

    return run


async def _redis_client_kill(world: World, _: frozenset[int]) -> None:
    async with world.primary.admin() as redis:
        if world.chance.random() < 0.5:
            await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            return
        for client in await redis.client_list(_type="normal"):
            if client["name"] and world.chance.random() < 0.5:
                with suppress(RedisError):  # gone by itself
                    await redis.client_kill_filter(_id=client["id"])


async def _redis_client_pause(world: World, _: frozenset[int]) -> str:
    milliseconds = world.chance.randrange(50, 800)
    await world.primary.command("CLIENT", "PAUSE", milliseconds, world.chance.choice(["ALL", "WRITE"]))
    await asyncio.sleep(milliseconds / 1000)
    return f"{milliseconds} ms"


async def _redis_replicaof_round_trip(world: World, _: frozenset[int]) -> str:
    """The primary takes over an older copy and is a primary again: the same process, its connections alive.

    In the same step its clients are cut off, unless this is surgery: nothing tells them then that what they
    talk to has gone back, and no more is promised than a bound on for how long.
    """
    primary, standby = world.primary, world.standby
    world.standby_ready = False
    try:
        await standby.command("REPLICAOF", "NO", "ONE")
        seconds = await world.pause(0.05, 0.8)
        await primary.replicates(standby)
        in_sync = await primary.in_sync(2)
        async with primary.admin() as redis, redis.pipeline(transaction=True) as steps:
            steps.execute_command("REPLICAOF", "NO", "ONE")
            if not world.surgery:
                steps.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await steps.execute()
    finally:
        world.rejoining = asyncio.create_task(world.rejoin(standby, restart=False))
    return f"{seconds:.2f} s back, {'in sync' if in_sync else 'not in sync'}"


async def _redis_failover(world: World, _: frozenset[int]) -> str:
    """The replica that was cut off a moment ago is the primary. Some instances hear of it later than others."""
    old, new = world.primary, world.standby
    world.standby_ready = False
    try:
        # From here on it misses what is written.
        await new.command("REPLICAOF", "NO", "ONE")
        behind = await world.pause(0.005, world.chance.choice([0.1, 0.5, 1.0]))
        late: list[App] = []
        if world.chance.random() < 0.7:
            half = len(world.apps) // 2
            count = world.chance.choice([half, len(world.apps) - half])
            late = world.chance.sample(list(world.apps), count)
        world.primary, world.standby = new, old
        for app in world.apps:
            if app not in late:
                app.redis_link.repoint(lambda: new.port)
        split = await world.pause(0.05, world.chance.choice([0.3, 1.0, 2.0])) if late else 0.0
        for app in late:
            app.redis_link.repoint(lambda: new.port)
    finally:
        restart = world.chance.random() < 0.5
        world.rejoining = asyncio.create_task(world.rejoin(world.standby, restart=restart))
    return f"{behind:.2f} s behind, {len(late)} instances {split:.2f} s late"


# PostgreSQL


async def _postgres_immediate_restart(world: World, _: frozenset[int]) -> None:
    await world.postgres.restart_immediately()


async def _postgres_stop(world: World, _: frozenset[int]) -> str:
    pids = await world.postgres.pids()
    try:
        _signal_all(pids, signal.SIGSTOP)
        seconds = await world.pause(0.2, 2)
    finally:
        _signal_all(pids, signal.SIGCONT)
    return f"{seconds:.2f} s"


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def _postgres_terminate_backends(world: World, _: frozenset[int]) -> None:
    async with world.postgres.connection() as conn:
        await conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < $1",
            world.chance.choice([0.2, 0.5, 1.0]),
        )


async def _postgres_out_of_connections(world: World, _: frozenset[int]) -> str:
    """All places are taken by callers who never say their password; then the instances lose theirs."""
    taken: list[asyncio.StreamWriter] = []
    try:
        async with world.postgres.connection() as conn:
            await _take_places(world, taken)
            await conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND usename = 'chat'"
            )
        until = time.monotonic() + 1
        while time.monotonic() < until:
            await _take_places(world, taken)
            await asyncio.sleep(0.02)
    finally:
        for writer in taken:
            writer.transport.abort()
    return f"{len(taken)} taken"


async def _take_places(world: World, taken: list[asyncio.StreamWriter]) -> None:
    while True:
        reader, writer = await asyncio.open_connection(LOOPBACK, world.postgres.port)
        writer.write(_STARTUP)
        with suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(2):
                if await reader.readexactly(1) == b"R":
                    taken.append(writer)
                    continue
        writer.transport.abort()
        return


# Links


def _links(mode: Mode, which: Literal["redis", "postgres"]) -> Run:
    async def run(world: World, targets: frozenset[int]) -> str:
        return await _disturb(world, targets, {which: mode})

    return run


async def _both_links(world: World, targets: frozenset[int]) -> str:
    return await _disturb(
        world, targets, {"redis": world.chance.choice(FAULTY), "postgres": world.chance.choice(FAULTY)}
    )


async def _disturb(world: World, targets: frozenset[int], modes: dict[str, Mode]) -> str:
    links = [
        (app.redis_link if which == "redis" else app.postgres_link, mode)
        for app in world.some_apps(targets)
        for which, mode in modes.items()
    ]
    try:
        for link, mode in links:
            delay = world.chance.uniform(0.01, 0.2) if mode == "slow" else world.chance.uniform(0.02, 1)
            await link.change(mode, delay_seconds=delay)
        seconds = await world.pause(0.1, world.chance.choice([0.5, 1.0, 2.0]))
    finally:
        for link, _ in links:
            await link.change("ok")
    where = ", ".join(f"{which} {mode}" for which, mode in modes.items())
    return f"{where}, instances {sorted(targets)}, {seconds:.2f} s"


def _has_a_snapshot(world: World) -> bool:
    return bool(world.snapshots)


def _has_a_standby(world: World) -> bool:
    return world.standby_ready


KINDS: tuple[Kind, ...] = (
    Kind("app_kill", "app", 3, _app_kill),
    Kind("app_stop", "app", 4, _app_stop),
    Kind("client_disconnect", "clients", 4, _client_disconnect, brief=True),
    Kind("redis_failover", "redis", 45, _redis_failover, loses=True, ready=_has_a_standby),
    Kind("redis_old_rdb", "redis", 22, _redis_old_rdb, loses=True, ready=_has_a_snapshot),
    Kind("redis_kill_empty", "redis", 3, _redis_kill_empty, loses=True),
    Kind("redis_truncated_aof", "redis", 4, _redis_truncated_aof, loses=True),
    Kind("redis_stop", "redis", 3, _redis_stop),
    Kind("redis_full_noeviction", "redis", 2, _full("noeviction")),
    Kind("redis_full_lru", "redis", 2, _full("allkeys-lru"), loses=True),
    Kind("redis_del", "redis", 4, _redis_del, loses=True, brief=True),
    Kind("redis_flushdb", "redis", 2, _command("FLUSHDB"), loses=True, brief=True),
    Kind("redis_flushall", "redis", 2, _command("FLUSHALL"), loses=True, brief=True),
    Kind("redis_script_flush", "redis", 2, _command("SCRIPT", "FLUSH"), brief=True),
    Kind("redis_client_kill", "redis", 4, _redis_client_kill, brief=True),
    Kind("redis_client_pause", "redis", 3, _redis_client_pause),
    Kind(
        "redis_replicaof_round_trip",
        "redis",
        6,
        _redis_replicaof_round_trip,
        loses=True,
        ready=_has_a_standby,
    ),
    Kind("postgres_immediate_restart", "postgres", 2, _postgres_immediate_restart),
    Kind("postgres_stop", "postgres", 2, _postgres_stop),
    Kind("postgres_terminate_backends", "postgres", 5, _postgres_terminate_backends),
    Kind("postgres_out_of_connections", "postgres", 1.5, _postgres_out_of_connections),
    *(Kind(f"link_redis_{mode}", "redis links", 3, _links(mode, "redis")) for mode in FAULTY),
    *(Kind(f"link_postgres_{mode}", "postgres links", 2, _links(mode, "postgres")) for mode in FAULTY),
    Kind("links_redis_and_postgres", "both links", 3, _both_links),
)

"""One run: servers, instances, clients, a nemesis, and the verdict."""

import asyncio
import json
import math
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.failure.chaos.client import Caller, NoAnswer
from tests.failure.chaos.faults import World
from tests.failure.chaos.final import check_locks, check_redis, read_truth
from tests.failure.chaos.flips import Flipper
from tests.failure.chaos.nemesis import Nemesis
from tests.failure.chaos.proxy import LOOPBACK, Link
from tests.failure.chaos.record import AFTERMATH_SECONDS, READS, WRITES, Record, line_of
from tests.failure.chaos.servers import App, Postgres, RedisServer, command
from tests.failure.chaos.verdict import Verdict, judge
from tests.failure.chaos.workload import LIVE_SESSIONS, Client, Crowd

PROJECT = Path(__file__).parents[3]

#: Below the ports that the kernel gives to connections, so that a server finds its own free after a restart.
_PORTS = range(18_000, 32_000)

_HEAL_SECONDS_MAX = 40
_STOP_SECONDS_MAX = 8

#: Their names in a run's line, and at the start of a violation's text.
_VIOLATIONS = {
    "lost": "lost",
    "stale": "stale",
    "non_monotonic": "non-monotonic",
    "duplicates": "duplicate",
    "no_prefix": "no prefix",
    "resurrected": "resurrected",
    "wrong_session": "wrong session",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    seconds: float
    seed: int
    profile: str = "hybrid"
    instances: int = 2
    clients: int = 12
    surgery: bool = False
    #: Whose `app` is run.
    project: Path = PROJECT


@dataclass(frozen=True)
class Outcome:
    options: Options
    record: Record
    verdict: Verdict
    world_ended: float
    logs: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """The line of this run in `runs.jsonl`."""
        record, verdict = self.record, self.verdict
        faults = Counter(fault.kind for fault in record.faults if fault.done)
        seconds = record.ended - record.began
        return {
            "seed": self.options.seed,
            "version": version_of(self.options.project),
            "profile": self.options.profile,
            "instances": self.options.instances,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "operations": dict(sorted(verdict.operations.items())),
            "operations_a_second": round(verdict.operations.total() / seconds, 1),
            "faults": dict(sorted(faults.items())),
            "faults_a_second": round(faults.total() / seconds, 2),
            "faults_not_done": sum(not fault.done for fault in record.faults),
            **{name: verdict.kinds[kind] for name, kind in _VIOLATIONS.items()},
            "failed_reads": len(verdict.failed_reads),
            "violations": len(verdict.wrong),
            "retried_writes_acked": verdict.retried_writes_acked,
            "errors_logged": sum(text.count(" ERROR ") for name, text in self.logs.items() if "app" in name),
            "refused_writes_undisturbed": verdict.refused_writes_undisturbed,
            "longest_write_pause_seconds": {
                kind: round(seconds, 3) for kind, seconds in sorted(verdict.write_pauses.items())
            },
            "longest_read_seconds": round(verdict.longest_read_seconds, 3),
            "flips": record.flips,
            "flips_failed": len(record.flips_failed),
        }

    def timeline(self) -> dict[str, Any]:
        """A run second by second, for the picture."""
        record = self.record
        length = math.ceil(self.world_ended - record.began) + 1
        reads, writes, pauses = [0] * length, [0] * length, [0.0] * length
        for session in record.sessions.values():
            for operation in session.operations:
                at = min(max(int(operation.ended - record.began), 0), length - 1)
                if operation.kind in READS and operation.status in {200, 304}:
                    reads[at] += 1
                elif operation.kind in WRITES and operation.acked:
                    writes[at] += 1
                    pauses[at] = max(pauses[at], round(operation.seconds, 3))
        return {
            "seed": self.options.seed,
            "reads": reads,
            "writes": writes,
            "longest_write_seconds": pauses,
            "faults": [line_of(fault, record.began) for fault in record.faults if fault.done],
        }


def version_of(project: Path) -> str:
    said = subprocess.run(
        ["git", "-C", str(project), "describe", "--always", "--dirty", "--tags"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


async def run(options: Options) -> Outcome:
    """Raises where the harness or the service could not even start."""
    chance = random.Random(options.seed)
    async with _world(options, chance) as world:
        record, crowd = world.crowd.record, world.crowd
        # Of their own: how fast the clients are must not change what the nemesis chooses next.
        crowd.chance = random.Random(options.seed + 1)
        record.began = time.monotonic()
        crowd.until = record.began + options.seconds
        # Half of them stay with one instance: where another one hangs, not everybody hangs with it.
        homes = [index % options.instances for index in range(options.clients // 2)]
        clients = [
            *(Client(crowd, home=home) for home in homes),
            *(Client(crowd) for _ in range(options.clients - len(homes))),
        ]
        crowd.live = [session for _ in range(LIVE_SESSIONS) if (session := await clients[0].make())]
        nemesis = Nemesis(world, record, options.profile, crowd.until)
        flipper = Flipper(world, options.project, record, crowd.until)
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.live())
            tasks.create_task(nemesis.torment())
            if options.profile == "flips":
                tasks.create_task(flipper.flip())
        record.ended = time.monotonic()
        await _heal(world)
        if options.profile == "flips":
            await flipper.back_to_hybrid()
        await _look_at_everything(world, options)
        ended = time.monotonic()
        record.wrong += await check_locks(world.postgres)
        record.wrong += await check_redis(world.primary)
        record.wrong += [f"crash: {line}" for app in world.apps for line in app.crashes]
        truth, wrong = await read_truth(world.postgres)
        record.wrong += wrong
        logs = _logs(world.folder)
    verdict = judge(record, truth, instances=options.instances, reads_may_fail=options.profile == "flips")
    return Outcome(options, record, verdict, ended, logs)


@asynccontextmanager
async def _world(options: Options, chance: random.Random) -> AsyncIterator[World]:
    with _folder() as folder:
        async with AsyncExitStack() as stack:
            yield await _open(options, chance, folder, stack)


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="chat-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the servers' account has to get to its data
        yield folder


async def _open(options: Options, chance: random.Random, folder: Path, stack: AsyncExitStack) -> World:
    evicts = options.profile != "flips"
    postgres = Postgres(folder, free_port())
    redis = [RedisServer(f"redis-{letter}", folder, free_port(), evicts=evicts) for letter in "ab"]
    for server in (postgres, *redis):
        await server.start() if isinstance(server, Postgres) else await server.start_empty()
        stack.push_async_callback(_end, server)
    code, said = await command(options.project, folder, "migrate", DATABASE_URL=postgres.url())
    if code:
        raise RuntimeError(f"chat-sessions migrate: {said}")
    apps = []
    for index in range(options.instances):
        redis_link = Link(free_port(), lambda: redis[0].port)
        await redis_link.open()
        stack.callback(redis_link.abandon)
        postgres_link = Link(free_port(), lambda: postgres.port)
        await postgres_link.open()
        stack.callback(postgres_link.abandon)
        settings = {
            "DATABASE_URL": postgres.url(postgres_link.port),
            "REDIS_URL": f"redis://{LOOPBACK}:{redis_link.port}",
        }
        app = App(index, free_port(), folder, options.project, settings, redis_link, postgres_link)
        stack.push_async_callback(app.kill)
        apps.append(app)
        try:
            await app.start()
        except TimeoutError as exc:
            raise RuntimeError(f"the service did not start:\n{_logs(folder)[app.log_path.name]}") from exc
    crowd = Crowd([app.port for app in apps], chance, Record(), math.inf)
    world = World(folder, chance, postgres, redis[0], redis[1], apps, crowd, surgery=options.surgery)
    await world.rejoin(redis[1], restart=False)
    return world


async def _end(server: Postgres | RedisServer) -> None:
    if isinstance(server, Postgres):
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS_MAX):
                await server.end(signal.SIGINT)
    await server.end(signal.SIGKILL)


def free_port() -> int:
    """One that is free now, and that the kernel gives nobody else by itself."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


def _logs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in folder.glob("*.log")}


async def _heal(world: World) -> None:
    """Everything runs, every link is ok, and every instance says so."""
    if world.rejoining is not None:
        await asyncio.wait([world.rejoining], timeout=_HEAL_SECONDS_MAX)
    for app in world.apps:
        app.redis_link.upstream = lambda: world.primary.port
        await app.redis_link.change("ok")
        await app.postgres_link.change("ok")
        await app.ensure()
    caller = Caller([app.port for app in world.apps], patience_seconds=5)
    until = time.monotonic() + _HEAL_SECONDS_MAX
    said = ""
    try:
        for app in world.apps:
            while time.monotonic() < until:
                with suppress(NoAnswer):
                    reply = await caller.ask(app.index, "GET", "/health/ready")
                    said = reply.body.decode()
                    if reply.status == 200 and reply.json()["status"] == "pass":
                        break
                await asyncio.sleep(0.1)
            else:
                world.crowd.record.wrong.append(f"not healed: instance {app.index} says {said}")
    finally:
        caller.close()
    # What the last fault left behind excuses nobody any more.
    await asyncio.sleep(AFTERMATH_SECONDS)


async def _look_at_everything(world: World, options: Options) -> None:
    """Every session, through every instance."""
    crowd = world.crowd
    crowd.rude_until = 0.0
    left = [(session, app.index) for session in crowd.record.sessions.values() for app in world.apps]

    async def look() -> None:
        client = Client(crowd)
        while left:
            session, instance = left.pop()
            await client.history(session, instance)
        client.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(options.clients):
            tasks.create_task(look())


def keep_failure(outcome: Outcome, folder: Path) -> None:
    """The whole history of a run that failed, as lines of JSON, and what the processes logged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = outcome.record
    (folder / "verdict.txt").write_text("\n".join(outcome.verdict.wrong) + "\n")
    with (folder / "faults.jsonl").open("w") as faults:
        for fault in record.faults:
            faults.write(json.dumps(line_of(fault, record.began)) + "\n")
    with (folder / "operations.jsonl").open("w") as operations:
        for session in record.sessions.values():
            suspect = session.session_id in outcome.verdict.suspects
            for operation in session.operations:
                # Of the others the lengths tell enough: all lists would be gigabytes.
                ids = [str(one) for one in operation.message_ids] if suspect else len(operation.message_ids)
                line = line_of(operation, record.began, session_id=str(session.session_id), message_ids=ids)
                operations.write(json.dumps(line) + "\n")
    for name, text in outcome.logs.items():
        (folder / name).write_text(text)

"""What the end of Redis costs Redis-only mode with each persistence setting, and what the setting costs in speed.

Hypothesis, for `CALLERS` closed loops of appends through `RedisChatSessionStore`:

- none: every end takes everything, a graceful one too.
- RDB: a graceful end takes nothing; a kill and a power loss take the work since the last snapshot: with the
  server's own rules all of a run as short as this one, with `save 1 1` up to about 3 seconds.
- AOF everysec: a kill takes nothing, for what was acknowledged is in the kernel's hands; a power loss takes
  up to about a second. Where an fsync takes longer than that, Redis holds its writes back for up to 2 seconds
  and acknowledges them nevertheless: then a kill alone takes that.
- AOF always: no end takes anything. It costs an fsync a round of Redis' event loop, which the callers of that
  round share: at least a third of the speed of none. Every other setting: at least 0.8.

Controls: none again, against none; and the store that looks is the one that wrote, so it must come back by
itself. Each session must come back as a prefix of what was sent: a gap ends the run with an error.

Method: a server of its own for every run, with `SESSIONS` sessions that were written, and where there are
snapshots snapshotted, before the work begins. The work ends in the middle: by SIGTERM (the same as SHUTDOWN),
by SIGKILL, or by power loss, at a random moment. Then the same files are started again and every session is
read. Power loss is SIGKILL, after which each file is cut to what a completed fsync covers: what had been
written to it when the last fsync that came back began. strace sees that (and slows the server meanwhile).
It is the worst that a disk may do which keeps what it acknowledged; a kernel may have written more by itself.
`slow disk` is strace, too: each fdatasync is made to return `SLOW_SECONDS` later, but other than on a real
disk no write waits for it. Linux with strace; without it those rows are left out.

    python benchmarks/persistence.py [--repeats N] [--json FILE]
"""

import argparse
import asyncio
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from uuid import UUID

import uvloop
from harness import ANSWER, QUESTION, append_of, turn_of
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from stores import fdatasync_ms

from app.embedded import _find_valkey, _free_port
from app.errors import RedisUnavailable, SessionNotFound
from app.redis_sessions.store import RedisChatSessionStore

CALLERS = 8
SESSIONS = 1000
MESSAGES_BEFORE = 20
APPENDS_A_NEW_SESSION = 20
WORK_SECONDS = (1.5, 3.5)
SLOW_SECONDS = 3
RATE_SECONDS = 0.3
RATE_ROUNDS = 10
START_SECONDS_MAX = 60

End = Literal["graceful", "kill -9", "power loss"]
ENDS: tuple[End, ...] = ("graceful", "kill -9", "power loss")


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    options: tuple[str, ...]
    snapshots: bool = False
    slow_disk: bool = False


NONE = Setting(name="none", options=("--save", "", "--appendonly", "no"))
EVERYSEC = ("--appendonly", "yes", "--appendfsync", "everysec")
SETTINGS = (
    NONE,
    Setting(name="RDB, server's rules", options=("--appendonly", "no"), snapshots=True),
    Setting(name="RDB, `save 1 1`", options=("--save", "1 1", "--appendonly", "no"), snapshots=True),
    Setting(name="AOF everysec", options=("--save", "", *EVERYSEC)),
    Setting(name="AOF everysec and RDB", options=EVERYSEC, snapshots=True),
    Setting(name="AOF always", options=("--save", "", "--appendonly", "yes", "--appendfsync", "always")),
)
SLOW_DISK = Setting(name="AOF everysec, slow disk", options=("--save", "", *EVERYSEC), slow_disk=True)


@dataclass(kw_only=True)
class Server:
    """One valkey-server on its own folder and port, to be ended and started again."""

    folder: Path
    setting: Setting
    traced: bool = False
    port: int = field(default_factory=lambda: _free_port(0))
    pid: int = 0
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> dict[str, Any]:
        """Its INFO, once it has read its files."""
        programs = _find_valkey()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._strace() if self.traced else ()),
                    *(str(programs.path(programs.server)), "--dir", str(self.folder)),
                    *("--bind", "127.0.0.1", "--port", str(self.port), "--maxmemory-policy", "noeviction"),
                    *self.setting.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        info = self._until_loaded(self._process)
        self.pid = info["process_id"]
        return info

    def _strace(self) -> tuple[str, ...]:
        # Each thread in a file of its own, as a call that another one interrupts would be in two lines.
        calls = "trace=write,fsync,fdatasync,?rename,?renameat,?renameat2"
        base = ("strace", "-ff", "-ttt", "-T", "-y", "-s", "0", "-o", f"{self.folder}.trace", "-e", calls)
        # The first two of a thread are quick: the main one's are made while it starts.
        slow = f"inject=fdatasync:delay_exit={SLOW_SECONDS * 1_000_000}:when=3+"
        return (*base, "-e", slow) if self.setting.slow_disk else base

    def _until_loaded(self, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
        deadline = time.monotonic() + START_SECONDS_MAX
        with self.redis() as redis:
            while time.monotonic() < deadline and process.poll() is None:
                with suppress(RedisConnectionError):
                    info: dict[str, Any] = redis.info()
                    if not info["loading"]:
                        return info
                time.sleep(0.002)
        end = "\n".join(self.folder.with_suffix(".log").read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{self.setting.name}: the server did not start; the end of its log:\n{end}")

    def redis(self) -> "Redis":
        return Redis(port=self.port, db=1, retry=Retry(NoBackoff(), 0))

    def snapshot(self) -> None:
        with self.redis() as redis:
            redis.save()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> None:
        assert self._process is not None
        self._process.wait(START_SECONDS_MAX)

    def close(self) -> None:
        """By force, with the strace around it."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(START_SECONDS_MAX)

    def lose_power(self) -> None:
        """Cuts each file to what a completed fsync covers. The server has ended."""
        covered = synced_bytes(self.folder)
        for path in self.folder.rglob("*"):
            if path.is_file():
                os.truncate(path, covered.get(str(path), 0))


_ON_FILE = re.compile(r"([\d.]+) (write|fsync|fdatasync)\(\d+<(/.*?)>.*\) += (\d+)(?: \(\w+\))? <([\d.]+)>")
_RENAME = re.compile(r'([\d.]+) rename\w*\((?:AT\w+, )?"(.+?)", (?:AT\w+, )?"(.+?)".*\) += 0 <([\d.]+)>')


def synced_bytes(folder: Path) -> dict[str, int]:
    """How much of each file was on disk for certain, from what strace saw of a server that began with no files.

    A write counts from its return; an fsync covers what counted when it was called, from its return.
    """
    written: dict[str, int] = {}
    asked: dict[str, int] = {}
    synced: dict[str, int] = {}
    for _, what, call, path, size in sorted(traced_calls(folder)):
        match what:
            case "written":
                written[path] = written.get(path, 0) + size
            case "asked":
                asked[call] = written.get(path, 0)
            case "synced":
                synced[path] = max(synced.get(path, 0), asked[call])
            case "renamed":  # from what stands in the place of the call
                written[path], synced[path] = written.pop(call, 0), synced.pop(call, 0)
    return synced


def traced_calls(folder: Path) -> Iterator[tuple[float, str, str, str, int]]:
    """When, what, the call, the file, and for a write how many bytes."""
    for trace in folder.parent.glob(f"{folder.name}.trace.*"):
        for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
            call = f"{trace.name}:{number}"
            if found := _ON_FILE.match(line):
                began, name, path, got, took = found.groups()
                if name == "write":
                    yield float(began) + float(took), "written", call, path, int(got)
                else:
                    yield float(began), "asked", call, path, 0
                    yield float(began) + float(took), "synced", call, path, 0
            elif found := _RENAME.match(line):
                began, old, new, took = found.groups()
                yield float(began) + float(took), "renamed", str(folder / old), str(folder / new), 0


@dataclass(kw_only=True)
class Lost:
    """What one end cost."""

    setting: str
    end: End
    acknowledged: int
    appends_per_second: float
    messages: int
    sessions: int
    sessions_before: int
    seconds: float
    stored_unacknowledged: int
    restart_seconds: float
    sessions_after: int


class Work:
    """Callers that remember what was acknowledged when. A session belongs to one of them."""

    def __init__(self, store: RedisChatSessionStore) -> None:
        self._store = store
        self._acknowledged: dict[UUID, list[tuple[float, UUID]]] = {}
        self._created: dict[UUID, float] = {}
        self._sent: dict[UUID, list[UUID]] = {}
        self._ending = False
        self.appends = 0

    async def fill(self) -> None:
        async def caller(count: int) -> None:
            for _ in range(count):
                turns = [("user", QUESTION), ("assistant", ANSWER)] * (MESSAGES_BEFORE // 2)
                await self._append(await self._create(), *turns)

        await asyncio.gather(*(caller(SESSIONS // CALLERS) for _ in range(CALLERS)))

    async def go_on_until_redis_ends(self, server: Server, end: End, seconds: float) -> float:
        """When the end was asked for. What Redis still acknowledges after that counts, too."""
        owned = list(self._created)
        callers = asyncio.gather(*(self._caller(owned[index::CALLERS]) for index in range(CALLERS)))
        await asyncio.sleep(seconds)
        self._ending = True
        asked = time.perf_counter()
        server.signal(signal.SIGTERM if end == "graceful" else signal.SIGKILL)
        await callers
        server.wait()
        return asked

    async def _caller(self, sessions: list[UUID]) -> None:
        try:
            while True:
                if random.randrange(APPENDS_A_NEW_SESSION) == 0:
                    sessions.append(await self._create())
                    session_id = sessions[-1]
                else:
                    session_id = random.choice(sessions)
                await self._append(session_id, ("user", QUESTION), ("assistant", ANSWER))
        except RedisUnavailable:
            if not self._ending:
                raise

    async def _create(self) -> UUID:
        session_id = (await self._store.create_session("user")).session.session_id
        self._created[session_id] = time.perf_counter()
        self._sent[session_id], self._acknowledged[session_id] = [], []
        return session_id

    async def _append(self, session_id: UUID, *messages: tuple[str, str]) -> None:
        append = append_of(session_id, *messages)
        ids = [message.message_id for message in append.messages]
        self._sent[session_id] += ids
        await self._store.append(append)
        now = time.perf_counter()
        self._acknowledged[session_id] += [(now, message_id) for message_id in ids]
        self.appends += 1

    async def compare(self, asked: float) -> dict[str, Any]:
        """What was acknowledged and is not there now."""
        messages, sessions, unacknowledged = 0, 0, 0
        oldest = asked
        for session_id, acknowledged in self._acknowledged.items():
            try:
                history = await self._store.read_history(session_id, max_messages=1_000_000)
            except SessionNotFound:
                found: list[UUID] = []
                sessions += 1
                oldest = min(oldest, self._created[session_id])
            else:
                found = [message.message_id for message in history.messages]
            if found != self._sent[session_id][: len(found)]:
                raise SystemExit(f"session {session_id} came back with a gap")
            lost = acknowledged[len(found) :]
            messages += len(lost)
            unacknowledged += max(0, len(found) - len(acknowledged))
            oldest = min(oldest, *(moment for moment, _ in lost), asked)
        return {
            "acknowledged": sum(map(len, self._acknowledged.values())),
            "messages": messages,
            "sessions": sessions,
            "sessions_before": len(self._created),
            "seconds": asked - oldest,
            "stored_unacknowledged": unacknowledged,
        }


@asynccontextmanager
async def opened(server: Server, *, messages_max: int = 100) -> AsyncIterator[RedisChatSessionStore]:
    store = RedisChatSessionStore(redis_url=server.url, messages_max=messages_max)
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.close()


async def lose(folder: Path, setting: Setting, end: End) -> Lost:
    """One life of a server, its end, and what the next life knows of it."""
    traced = end == "power loss" or setting.slow_disk
    with serving(Server(folder=folder, setting=setting, traced=traced)) as server:
        async with opened(server, messages_max=1_000_000) as store:
            work = Work(store)
            await work.fill()
            if setting.snapshots:
                server.snapshot()
            filled, began = work.appends, time.perf_counter()
            seconds = random.uniform(*WORK_SECONDS) + (2 * SLOW_SECONDS if setting.slow_disk else 0)
            asked = await work.go_on_until_redis_ends(server, end, seconds)
            rate = (work.appends - filled) / (asked - began)
            if end == "power loss":
                server.lose_power()
            server.traced = False
            launched = time.perf_counter()
            info = server.start()
            restart_seconds = time.perf_counter() - launched
            while (await store.health())[0].status != "pass":  # noqa: ASYNC110  # it rests after an outage
                await asyncio.sleep(0.01)
            return Lost(
                setting=setting.name,
                end=end,
                appends_per_second=rate,
                restart_seconds=restart_seconds,
                sessions_after=info.get("db1", {}).get("keys", 0),
                **await work.compare(asked),
            )


async def rates(folder: Path, settings: list[Setting]) -> dict[str, list[float]]:
    """For each setting, its appends a second over those of none right before or after, in each round."""
    ratios: dict[str, list[float]] = {setting.name: [] for setting in settings}
    with serving(Server(folder=folder / "rate-none", setting=NONE)) as none:
        for number, setting in enumerate(settings):
            with serving(Server(folder=folder / f"rate-{number}", setting=setting)) as server:
                async with opened(none) as base, opened(server) as store:
                    loads = [await closed_loops(base), await closed_loops(store)]
                    for index in range(-2, RATE_ROUNDS):
                        order = (0, 1) if index % 2 == 0 else (1, 0)
                        got = {which: await loads[which](RATE_SECONDS) for which in order}
                        if index >= 0:  # the first were for connections and scripts
                            ratios[setting.name].append(got[1] / got[0])
                            ratios.setdefault("appends a second, none", []).append(got[0])
    return ratios


async def closed_loops(store: RedisChatSessionStore) -> Callable[[float], Awaitable[float]]:
    """`CALLERS` loops, each on sessions of its own; called with seconds, it gives appends a second."""
    made = [(await store.create_session("user")).session.session_id for _ in range(CALLERS * 5)]

    async def per_second(seconds: float) -> float:
        done = 0
        began = time.perf_counter()

        async def caller(owned: list[UUID]) -> None:
            nonlocal done
            for session_id in cycle(owned):
                if time.perf_counter() >= began + seconds:
                    return
                await store.append(turn_of(session_id))
                done += 1

        await asyncio.gather(*(caller(made[index::CALLERS]) for index in range(CALLERS)))
        return done / (time.perf_counter() - began)

    return per_second


def facts(folder: Path) -> dict[str, str]:
    synced = fdatasync_ms(folder)
    with serving(Server(folder=folder / "facts", setting=SETTINGS[1])) as server, server.redis() as redis:
        info, rules = redis.info("server"), redis.config_get("save")["save"]
    name = "Valkey" if "valkey_version" in info else "Redis"
    packages = ("redis", "hiredis", "uvloop", "chat-sessions")
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before",
        "python": f"{platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages),
        "server": f"{name} {info[f'{name.lower()}_version']}; the server's rules are `save {rules}`",
        "disk": f"fdatasync of 8 KiB takes {statistics.median(synced):.2f} ms (p50), "
        f"{min(synced):.2f} to {max(synced):.2f}",
        "data": f"{SESSIONS} sessions of {MESSAGES_BEFORE} messages, then {CALLERS} callers; an append is "
        f"{len(QUESTION.encode())} and {len(ANSWER.encode())} bytes, 1 in {APPENDS_A_NEW_SESSION} to a new session",
    }


def losses_table(results: list[Lost]) -> str:
    """The worst of each setting and end; of times the smallest, too."""
    head = (
        "setting",
        "end",
        "messages lost",
        "sessions lost",
        "seconds lost",
        "restart",
        "appends/s meanwhile",
    )
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for setting, end in dict.fromkeys((one.setting, one.end) for one in results):
        runs = [one for one in results if (one.setting, one.end) == (setting, end)]
        worst = max(runs, key=lambda one: one.messages)
        everything = worst.messages == worst.acknowledged
        restarts = [one.restart_seconds for one in runs]
        rows.append(
            f"| {setting} | {end} | {worst.messages:,} of {worst.acknowledged:,} | "
            f"{worst.sessions:,} of {worst.sessions_before:,} | "
            f"{'all' if everything else span([one.seconds for one in runs])} | "
            f"{span(restarts)} s, {worst.sessions_after:,} sessions | "
            f"{min(one.appends_per_second for one in runs):,.0f} |"
        )
    return "\n".join(rows)


def rates_table(ratios: dict[str, list[float]]) -> str:
    rows = ["| appends a second, over those of none | min | median | max |", "|---|---|---|---|"]
    for name, values in sorted(ratios.items(), key=lambda item: item[1][0] > 100):
        shown = (min(values), statistics.median(values), max(values))
        rows.append(f"| {name} | " + " | ".join(f"{one:,.{0 if one > 100 else 2}f}" for one in shown) + " |")
    return "\n".join(rows)


def span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


async def measure(folder: Path, repeats: int) -> dict[str, Any]:
    known = facts(folder)
    for name, value in known.items():
        print(f"{name:<8} {value}")
    ratios = await rates(folder, [Setting(name="control: none again", options=NONE.options), *SETTINGS[1:]])
    print(f"\n{rates_table(ratios)}\n")
    strace = shutil.which("strace") is not None
    cases = [(setting, end) for setting in SETTINGS for end in ENDS if strace or end != "power loss"]
    if strace:
        cases += [(SLOW_DISK, end) for end in ENDS[1:]]
    results = []
    for number, (setting, end) in enumerate(cases):
        # The moment matters where an end takes a part.
        for repeat in range(1 if end == "graceful" or setting is NONE else repeats):
            run = folder / f"run-{number}-{repeat}"
            results.append(await lose(run, setting, end))
            shutil.rmtree(run)
    print(losses_table(results))
    print(
        f"\nThe worst of {repeats} runs (graceful and none: 1). Messages that came back without having been "
        f"acknowledged: {sum(one.stored_unacknowledged for one in results)} in {len(results)} runs."
    )
    if not strace:
        print("strace is not installed: power loss and the slow disk were not measured.")
    return {"facts": known, "ratios": ratios, "losses": [asdict(one) for one in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each end whose moment matters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's numbers there")
    wanted = parser.parse_args()
    began = time.monotonic()
    logging.getLogger("chat_sessions").addHandler(logging.NullHandler())  # the store tells of each end
    # An end by SIGTERM removes everything, too.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(1))
    with (
        TemporaryDirectory(prefix="chat-bench-") as name,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        results = runner.run(measure(Path(name).resolve(), wanted.repeats))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()

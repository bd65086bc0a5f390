"""PostgreSQL, two Redis-compatible servers and the instances of the service, each to be killed and restarted.

The servers' binaries, accounts and folders are those of `app.embedded`. Whatever happens to this process, the
kernel ends its children with it (Linux); the temporary folder is removed by every end but a kill -9.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.embedded import _end_with_parent, _give, _launcher, _postgres, _Server, _valkey
from tests.failure.chaos.client import Caller, NoAnswer
from tests.failure.chaos.proxy import LOOPBACK, Link

#: What an instance, its rival instances and we need; few enough to be taken away.
POSTGRES_CONNECTIONS_MAX = 60

_START_SECONDS_MAX = 40
_POLL_SECONDS = 0.01


async def ended(process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:  # noqa: ASYNC110 - a process sets no event
        await asyncio.sleep(_POLL_SECONDS / 2)


class Server:
    """A server of `app.embedded` that we start and end ourselves, without blocking the proxies."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def pid(self) -> int:
        return self._server._process.pid

    async def start(self) -> None:
        server = self._server
        server.start()
        async with asyncio.timeout(_START_SECONDS_MAX):
            while not server.ready(self.pid, server.port):
                if server._process.poll() is not None:
                    raise server.launcher.failure("a server ended while it started")
                await asyncio.sleep(_POLL_SECONDS)

    def send(self, number: signal.Signals) -> None:
        self._server._process.send_signal(number)

    async def end(self, number: signal.Signals) -> None:
        self.send(number)
        await ended(self._server._process)


class Postgres(Server):
    def __init__(self, home: Path, port: int) -> None:
        server = _postgres(_launcher("postgres", home, []), port, durable=True)
        server.argv[-1:-1] = [
            f"--max_connections={POSTGRES_CONNECTIONS_MAX}",
            # A disk that is shared with others: a checkpoint in the middle measures them.
            "--checkpoint_timeout=30min",
        ]
        super().__init__(server)

    def url(self, port: int | None = None) -> str:
        password = (self._server.launcher.folder / "password").read_text().strip()
        return f"postgresql://chat:{password}@{LOOPBACK}:{port or self.port}/chat"

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Past the proxies."""
        conn = await asyncpg.connect(
            self.url(), timeout=3, command_timeout=10, server_settings={"application_name": "chaos"}
        )
        try:
            yield conn
        finally:
            conn.terminate()

    async def restart_immediately(self) -> None:
        """As `pg_ctl -m immediate`: nothing is written any more, recovery runs at the start."""
        await self.end(signal.SIGQUIT)
        # The pid file may stay, and would be read as the new one's.
        (self._server.launcher.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        await self.start()

    async def pids(self) -> list[int]:
        """The postmaster first: a backend that it starts meanwhile would run on."""
        async with self.connection() as conn:
            rows = await conn.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        return [self.pid, *(row["pid"] for row in rows)]


class RedisServer(Server):
    """Keeps an append-only file once it runs; can be started on any file, or on none."""

    def __init__(self, name: str, home: Path, port: int, *, evicts: bool) -> None:
        server = _valkey(_launcher(name, home, []), port, durable=False)
        self.policy = "volatile-ttl" if evicts else "noeviction"
        server.argv[-1:-1] = [
            *("--maxmemory-policy", self.policy),
            *("--repl-diskless-sync-delay", "0"),  # a replica is in sync at once
            *("--appendfsync", "everysec"),
        ]
        self._argv = list(server.argv)
        self.name = name
        super().__init__(server)

    @property
    def folder(self) -> Path:
        return self._server.launcher.folder

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Redis]:
        """Past the proxies, on the sessions' database."""
        redis = Redis(
            host=LOOPBACK,
            port=self.port,
            db=1,
            socket_timeout=5,
            socket_connect_timeout=2,
            retry=Retry(NoBackoff(), 0),
            single_connection_client=True,
        )
        try:
            yield redis
        finally:
            await redis.aclose()

    async def command(self, *words: object) -> object:
        async with self.admin() as redis:
            return await redis.execute_command(*words)

    async def kill(self) -> None:
        await self.end(signal.SIGKILL)

    async def start_empty(self) -> None:
        self._clear()
        await self._start(append_only=False)

    async def start_from(self, dump: Path) -> None:
        """From an RDB file that was put aside."""
        self._clear()
        shutil.copy(dump, self.folder / "dump.rdb")
        _give(self.folder / "dump.rdb", self._server.launcher.identity)
        await self._start(append_only=False)

    async def start_from_torn_file(self, keep: float) -> None:
        """From its append-only file, of whose newest part only a share is kept."""
        (self.folder / "dump.rdb").unlink(missing_ok=True)
        # Only the newest: a server refuses a file that is torn in the middle.
        parts = (self.folder / "appendonlydir").glob("*.incr.aof")
        if newest := max(parts, key=lambda part: part.stat().st_mtime_ns, default=None):
            os.truncate(newest, int(newest.stat().st_size * keep))
        await self._start(append_only=True)

    async def save_to(self, dump: Path) -> None:
        await self.command("SAVE")
        shutil.copy(self.folder / "dump.rdb", dump)

    def _clear(self) -> None:
        (self.folder / "dump.rdb").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    async def _start(self, *, append_only: bool) -> None:
        self._server.argv[:] = [*self._argv[:-1], "--appendonly", "yes" if append_only else "no", "--port"]
        await self.start()
        # An RDB file is only read by a server without an append-only file; now it may have one.
        await self.command("CONFIG", "SET", "appendonly", "yes")

    async def replicates(self, primary: "RedisServer") -> None:
        await self.command("REPLICAOF", LOOPBACK, primary.port)

    async def in_sync(self, seconds_max: float) -> bool:
        """Whether this replica has all of its primary, by then."""
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(seconds_max), self.admin() as redis:
                while (await redis.info("replication")).get("master_link_status") != "up":  # noqa: ASYNC110 - nor a server
                    await asyncio.sleep(_POLL_SECONDS)
                return True
        return False


@dataclass
class App:
    """One instance of the service, behind links of its own to both servers."""

    index: int
    port: int
    folder: Path
    project: Path
    settings: dict[str, str]
    redis_link: Link
    postgres_link: Link
    #: Exits that nobody asked for.
    crashes: list[str] = field(default_factory=list)
    _process: "subprocess.Popen[bytes] | None" = None
    _wanted: bool = False

    @property
    def log_path(self) -> Path:
        return self.folder / f"app-{self.index}.log"

    async def start(self) -> None:
        """Until it answers; a start that is refused, as during an outage of PostgreSQL, is repeated."""
        caller = Caller([self.port], patience_seconds=1)
        try:
            async with asyncio.timeout(_START_SECONDS_MAX):
                self._spawn()
                while True:
                    with suppress(NoAnswer):
                        await caller.ask(0, "GET", "/health/live")
                        break
                    if self._process is None or self._process.poll() is not None:
                        self._spawn()
                    await asyncio.sleep(0.05)
        finally:
            caller.close()
        self._wanted = True

    def _spawn(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                cwd=self.folder,
                env=environment(self.project, PORT=str(self.port), LOG_LEVEL="warning", **self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours, and we end it in order
                preexec_fn=_end_with_parent(signal.SIGKILL),  # noqa: PLW1509 - as `app.embedded` does it
            )

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def kill(self) -> None:
        self._wanted = False
        self.send(signal.SIGKILL)
        if self._process is not None:
            await ended(self._process)

    async def revive(self) -> None:
        """Notes an exit that nobody asked for, and starts the instance again."""
        if self._wanted and self._process is not None and (code := self._process.poll()) is not None:
            self._wanted = False
            self.crashes.append(f"instance {self.index} ended by itself with exit code {code}")
            await self.start()

    async def ensure(self) -> None:
        await self.revive()
        if not self._wanted:
            await self.start()


def environment(project: Path, **settings: str) -> dict[str, str]:
    """Nothing of our own environment but what a program needs to start."""
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(project), "PYTHONUTF8": "1", **settings}


async def command(
    project: Path, folder: Path, *words: str, seconds_max: float = 60, **settings: str
) -> tuple[int, str]:
    """One of our commands to its end: its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", *words),
        cwd=folder,
        env=environment(project, **settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds_max):
            said, _ = await process.communicate()
    except TimeoutError:
        return 124, f"not done after {seconds_max} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace").strip()

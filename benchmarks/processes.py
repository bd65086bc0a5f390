"""The processes of the HTTP scenarios: our service, the apps beside it, and the load generator."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from http_load import Order, Result
from stores import urls_of

from app.embedded import EmbeddedServers, _free_port

_HERE = Path(__file__).parent
_START_SECONDS_MAX = 60
_STOP_SECONDS_MAX = 30
_LINE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Served:
    """A process that answers on a port of this machine."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def service(servers: EmbeddedServers, folder: Path) -> Iterator[Served]:
    """`chat-sessions serve`, one worker, as a user starts it."""
    database_url, redis_url = urls_of(servers)
    port = _free_port(0)
    environment = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "PORT": str(port),
        "WORKERS": "1",
        "LOG_LEVEL": "warning",
    }
    program = Path(sys.executable).with_name("chat-sessions")
    with _serving([str(program), "serve"], port, "/health/ready", folder, environment) as served:
        yield served


@contextmanager
def compared_app(kind: str, answer: bytes, folder: Path) -> Iterator[Served]:
    """One of `http_apps`, answering these bytes."""
    port = _free_port(0)
    file = folder / f"answer-{kind}"
    file.write_bytes(answer)
    argv = [sys.executable, str(_HERE / "http_apps.py"), kind, str(port), str(file)]
    with _serving(argv, port, "/constant", folder, {}) as served:
        yield served


@contextmanager
def _serving(
    argv: list[str], port: int, path: str, folder: Path, environment: Mapping[str, str]
) -> Iterator[Served]:
    # Another folder than this one: a .env here would be read.
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, **environment},
    )
    try:
        served = Served(port=port, pid=process.pid)
        _wait_for(process, f"{served.url}{path}")
        yield served
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"nothing answers at {url}; it ended with status {process.poll()}")


@dataclass(frozen=True, kw_only=True)
class Generator:
    """`http_load` in a process of its own, one order after the other."""

    process: asyncio.subprocess.Process

    @classmethod
    async def started(cls) -> "Generator":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(_HERE / "http_load.py"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
        )
        return cls(process=process)

    async def carry_out(self, order: Order) -> Result:
        """Raises `RuntimeError` where an answer was no success: failing can be faster."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(asdict(order))}\n".encode())
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the load generator ended")
        result = Result(**json.loads(line))
        if result.failed:
            raise RuntimeError(f"{result.failed} answers were no success, {result.per_second:.0f} a second")
        return result

    async def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()

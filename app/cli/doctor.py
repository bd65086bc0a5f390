"""`chat-sessions doctor`: what is set up, what is wrong with it, and what to do about each finding."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import asyncpg
import typer

from app.chat import utc_now
from app.cli.output import Json, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, patient
from app.coherence.ports import PROTOCOL, CacheOutage, CacheState
from app.errors import ChatError
from app.postgres.cache_state import alive, read_state
from app.postgres.engine import Database
from app.postgres.partitions import existing_partitions, months_from, partition_name
from app.postgres.schema import REVISION, current_revision
from app.redis_sessions.inspect import ServerFacts, server_facts
from app.settings import Settings
from app.wiring import PULSE_CONNECTIONS, open_database, open_redis

#: Beyond it, `created_at` of two machines would confuse people; the stores order by seq and don't mind.
_CLOCK_SKEW_SECONDS_MAX = 1.0

_POSTGRES_OLDEST = 15
_REDIS_OLDEST = (6, 2)


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` says what to do; empty for what is well."""

    status: Literal["pass", "warn", "fail"]
    subject: str
    finding: str
    advice: str = ""


def doctor(json: Json = False) -> None:
    """Look at both stores and the settings. Ends with 1 where something fails, 0 with warnings or without."""
    with refusals_are_lines():
        findings = asyncio.run(_examine(command_settings()))
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            ["status", "subject", "finding", "what to do"],
            [(one.status, one.subject, one.finding, one.advice) for one in findings],
        )
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


async def _examine(settings: Settings) -> list[Finding]:
    findings: list[Finding] = []
    redis_only = bool(settings.redis_only_mode)
    era = None
    if settings.database_url is not None:
        mode = None
        try:
            async with open_database(settings) as database:
                async for finding in _postgres(settings, database):
                    findings.append(finding)  # noqa: PERF401 - what was found stays when the next one fails
                mode = await _mode(database)
                era = await _era(database)
                if era is not None:
                    findings += _coherence(settings, era)
        except (ChatError, asyncpg.PostgresError) as exc:
            findings.append(
                Finding("fail", "postgres", str(exc), "start PostgreSQL, or correct DATABASE_URL")
            )
        redis_only = mode == "redis-only" if mode else redis_only
    elif not redis_only:
        findings.append(
            Finding(
                "warn",
                "postgres",
                "DATABASE_URL is not set: `serve` starts an embedded PostgreSQL",
                "set DATABASE_URL for anything but a trial",
            )
        )
    if settings.redis_url is not None:
        try:
            async with open_redis(patient(settings)) as bounded:
                facts = await server_facts(bounded)
            findings += _redis(facts, redis_only=redis_only)
            if era is not None:
                findings += _identity(facts, era)
        except CacheOutage as exc:
            status: Literal["warn", "fail"] = "fail" if redis_only else "warn"
            findings.append(Finding(status, "redis", str(exc), "start Redis, or correct REDIS_URL"))
    elif settings.enable_redis_sessions:
        findings.append(
            Finding(
                "warn",
                "redis",
                "REDIS_URL is not set: `serve` starts an embedded Valkey",
                "set REDIS_URL for anything but a trial",
            )
        )
    return findings


async def _mode(database: Database) -> str | None:
    async with database.connection() as conn:
        if await conn.fetchval("SELECT to_regclass('chat.cache_state')") is None:
            return None
        mode: str | None = await conn.fetchval("SELECT mode FROM chat.cache_state WHERE id = 1")
    return mode


@dataclass(frozen=True, slots=True)
class _Era:
    """Who owns the data, whether Redis is trusted, and the (version, protocol) of each service that runs."""

    state: CacheState
    alive: list[tuple[str, int]]

    @property
    def trusts_redis(self) -> bool:
        return self.state.cache == "on" and self.state.mode != "redis-only"


async def _era(database: Database) -> _Era | None:
    if await current_revision(database) != REVISION:
        return None
    state = await read_state(database)
    return _Era(state, await alive(database)) if state is not None else None


def _coherence(settings: Settings, era: _Era) -> Iterator[Finding]:
    state = era.state
    if state.protocol != PROTOCOL:
        yield Finding(
            "fail",
            "protocol",
            f"the database is served by coherence protocol {state.protocol}, this version speaks {PROTOCOL}",
            "run the same version everywhere",
        )
    if era.trusts_redis:
        yield Finding("pass", "cache", f"on, epoch {state.epoch}")
    elif state.mode != "redis-only" and settings.enable_redis_sessions:
        yield Finding(
            "warn",
            "cache",
            "off: Redis can't be trusted, and PostgreSQL answers everything",
            "start Redis; a running service turns the cache on again by itself"
            if era.alive
            else "start the service: it turns the cache on where it finds Redis",
        )
    yield _instances(era.alive)


def _instances(services: list[tuple[str, int]]) -> Finding:
    if not services:
        return Finding("pass", "instances", "no service runs")
    versions = sorted({version for version, _ in services})
    protocols = sorted({protocol for _, protocol in services})
    said = f"{len(services)} alive, version {', '.join(versions)}, protocol {', '.join(str(one) for one in protocols)}"
    if protocols != [PROTOCOL]:
        return Finding("fail", "instances", said, f"run one version everywhere: this one speaks {PROTOCOL}")
    if len(versions) > 1:
        return Finding("warn", "instances", said, "end the roll-out: restart the older ones")
    return Finding("pass", "instances", said)


def _identity(facts: ServerFacts, era: _Era) -> Iterator[Finding]:
    if not era.trusts_redis or facts.identity is None:
        return
    if facts.identity == era.state.redis_identity:
        yield Finding("pass", "redis identity", "it is the one that is trusted")
    elif era.alive:
        yield Finding(
            "fail",
            "redis identity",
            "it is another one than the services trust",
            "correct REDIS_URL, here or there; if Redis was just restarted, look again",
        )
    else:
        yield Finding(
            "pass", "redis identity", "restarted since it was last trusted; the next start begins anew"
        )


async def _postgres(settings: Settings, database: Database) -> AsyncIterator[Finding]:
    async with database.connection() as conn:
        facts = await conn.fetchrow(
            "SELECT current_setting('server_version') AS version, "
            "current_setting('server_version_num')::int / 10000 AS major, "
            "current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes, "
            "current_setting('max_connections')::int AS connections_max, "
            "current_setting('superuser_reserved_connections')::int AS connections_reserved, "
            "pg_is_in_recovery() AS standby"
        )
        asked = time.time()
        clock: datetime = await conn.fetchval("SELECT clock_timestamp()")
    assert facts is not None  # noqa: S101 - a SELECT without FROM has a row
    yield Finding("pass", "postgres", f"version {facts['version']}")
    if facts["major"] < _POSTGRES_OLDEST:
        yield Finding("fail", "postgres", "is older than 15", "upgrade PostgreSQL: 15 to 18 are tested")
    if facts["standby"]:
        yield Finding(
            "fail", "postgres", "is a standby: it takes no writes", "point DATABASE_URL at the primary"
        )
    for name in ("fsync", "full_page_writes"):
        if facts[name] == "off":
            yield Finding(
                "fail", f"postgres {name}", "is off: a crash of the machine loses data", f"set {name} = on"
            )
    yield _connections(settings, facts["connections_max"], facts["connections_reserved"])
    yield _skew("postgres clock", clock.timestamp() - asked)
    revision = await current_revision(database)
    yield Finding(
        "pass" if revision == REVISION else "fail",
        "schema",
        f"revision {revision or 'none'}"
        + ("" if revision == REVISION else f", this version needs {REVISION}"),
        "" if revision == REVISION else "run `chat-sessions migrate`",
    )
    if revision is None:
        return
    present = await existing_partitions(database)
    missing = [
        partition_name(month)
        for month in months_from(utc_now().date(), 1)
        if partition_name(month) not in present
    ]
    yield Finding(
        "warn" if missing else "pass",
        "partitions",
        f"{', '.join(missing)} not made yet" if missing else f"{len(present)}, next month's is made",
        "run `chat-sessions partitions`; a running service makes them" if missing else "",
    )
    yield Finding("pass", "mode", await _mode(database) or "not set yet: the first `serve` decides")


def _connections(settings: Settings, connections_max: int, reserved: int) -> Finding:
    each = settings.database_pool_size + PULSE_CONNECTIONS
    fits = settings.workers * each <= connections_max - reserved
    return Finding(
        "pass" if fits else "warn",
        "postgres connections",
        f"WORKERS={settings.workers} use up to {settings.workers * each} ({each} each) "
        f"of max_connections = {connections_max}, {reserved} of them reserved",
        "" if fits else "lower WORKERS or DATABASE_POOL_SIZE, or raise max_connections",
    )


def _redis(facts: ServerFacts, *, redis_only: bool) -> Iterator[Finding]:
    info = facts.info
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info["redis_version"])
    yield Finding("pass", "redis", f"{name} {version}, {facts.session_count} sessions")
    compatible = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if compatible < _REDIS_OLDEST:
        yield Finding("fail", "redis", "is older than 6.2", "upgrade Redis")
    if info.get("role") != "master":
        yield Finding("fail", "redis", "is a replica: it takes no writes", "point REDIS_URL at the primary")
    yield _policy(info, redis_only=redis_only)
    yield _persistence(info, redis_only=redis_only)
    if int(info.get("evicted_keys", 0)) and redis_only:
        yield Finding(
            "warn",
            "redis evictions",
            f"{info['evicted_keys']} keys since it started: in Redis-only mode those sessions are gone",
            "raise maxmemory",
        )
    yield _skew("redis clock", facts.clock_seconds - datetime.now(UTC).timestamp())


def _policy(info: Mapping[str, Any], *, redis_only: bool) -> Finding:
    policy, limit = str(info.get("maxmemory_policy", "unknown")), int(info.get("maxmemory", 0))
    said = f"maxmemory {limit or 'unlimited'}, policy {policy}"
    if redis_only and policy.startswith("allkeys"):
        return Finding(
            "fail", "redis memory", f"{said}: evicts sessions at will", "use volatile-ttl or noeviction"
        )
    if redis_only and policy.startswith("volatile"):
        return Finding(
            "warn",
            "redis memory",
            f"{said}: a full Redis ends sessions early",
            "use noeviction, or watch memory",
        )
    if not redis_only and policy == "noeviction" and limit:
        return Finding(
            "warn",
            "redis memory",
            f"{said}: a full Redis stops caching",
            "CONFIG SET maxmemory-policy volatile-ttl",
        )
    if not limit:
        return Finding(
            "warn", "redis memory", said, "set maxmemory, so that Redis can't take the whole machine"
        )
    return Finding("pass", "redis memory", said)


def _persistence(info: Mapping[str, Any], *, redis_only: bool) -> Finding:
    aof = bool(int(info.get("aof_enabled", 0)))
    if redis_only and not aof:
        return Finding(
            "warn",
            "redis persistence",
            "AOF is off: a restart of Redis loses what its last snapshot has not",
            "CONFIG SET appendonly yes; or use hybrid mode",
        )
    return Finding(
        "pass",
        "redis persistence",
        f"AOF {'on' if aof else 'off'}" + ("" if redis_only else "; a cache needs none"),
    )


def _skew(subject: str, seconds: float) -> Finding:
    well = abs(seconds) <= _CLOCK_SKEW_SECONDS_MAX
    return Finding(
        "pass" if well else "warn",
        subject,
        f"{seconds:+.3f} s from this machine's",
        "" if well else "run NTP on both machines: times of messages come from the service's clock",
    )

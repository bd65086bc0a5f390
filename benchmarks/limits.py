"""What PostgreSQL and Redis can do at all on this machine, with the least possible client in front of them."""

import asyncio
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from harness import ANSWER, QUESTION, TURN, Load, Pace, Rate, Ratio, Scenario, filled_sessions, together
from stores import bare_connections, hybrid_of, opened_hybrid, urls_of
from turns import append_to

from app.chat import new_uuid, session_month, utc_now
from app.embedded import EmbeddedServers, _find_postgres
from app.store import ChatSessionStore

CALLERS = 256
SESSIONS = 1024
CLIENTS = (8, 16, 32, 64)
PGBENCH = "pgbench -M prepared"
COPY_ROWS = 2000

# The session's row is locked and counted, and both messages are inserted, in one statement: nothing is read
# before, and no mark and no copy is made for Redis.
_STATEMENT = """\
\\set n random(1, {sessions})
WITH moved AS (
    UPDATE chat.chat_sessions SET message_count = message_count + 2, last_activity = now()
    WHERE session_id = ('{prefix}' || lpad(:n::text, 12, '0'))::uuid
    RETURNING session_id, message_count
)
INSERT INTO chat.chat_messages (session_id, session_month, seq, message_id, role, content, created_at)
SELECT session_id, date '{month}', message_count - 1, gen_random_uuid(), 'user', '{question}', now() FROM moved
UNION ALL
SELECT session_id, date '{month}', message_count, gen_random_uuid(), 'assistant', '{answer}', now() FROM moved;
"""


class Pgbench:
    """PostgreSQL's own load, in a process of its own, written in C, on sessions of its own in our tables."""

    def __init__(self, program: str, url: str, script: Path) -> None:
        self._program = program
        self._url = url
        self._script = script

    async def per_second(self, clients: int, seconds: float) -> float:
        # Whole seconds are all that it knows.
        argv = ["-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-T", str(max(1, round(seconds)))]
        process = await asyncio.create_subprocess_exec(
            self._program,
            *argv,
            "-f",
            str(self._script),
            self._url,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        found = re.search(r"tps = ([\d.]+) \(without initial", out.decode())
        if process.returncode != 0:
            raise RuntimeError(f"pgbench failed: {err.decode().strip()}")
        # On a busy machine its clients may not all be connected before its time is over.
        return float(found[1]) if found is not None else 0.0


async def prepared_pgbench(servers: EmbeddedServers, folder: Path) -> Pgbench | None:
    """Its sessions and its script, or None where there is no pgbench."""
    beside = _find_postgres().path("pgbench")
    program = str(beside) if beside.exists() else shutil.which("pgbench")
    if program is None:
        return None
    # All ids are of this moment, so that they are in the partition that the store writes to, too.
    prefix = f"{str(new_uuid())[:13]}-7000-8000-"
    async with bare_connections(servers) as (conn, _):
        await conn.execute(
            "INSERT INTO chat.chat_sessions (session_id, user_id, created_at, last_activity) "
            "SELECT ($1::text || lpad(n::text, 12, '0'))::uuid, 'pgbench', now(), now() "
            "FROM generate_series(1, $2::int) AS n",
            prefix,
            SESSIONS,
        )
    month = session_month(UUID(f"{prefix}{1:012}"))
    script = folder / "turn.sql"
    text = _STATEMENT.format(sessions=SESSIONS, prefix=prefix, month=month, question=QUESTION, answer=ANSWER)
    script.write_text(text, encoding="utf-8")
    return Pgbench(program, urls_of(servers)[0], script)


async def against_pgbench(servers: EmbeddedServers, folder: Path, pace: Pace) -> Scenario:
    """Hypothesis: a commit, and the work around it, is what one turn a transaction costs PostgreSQL, whoever asks.
    With 256 callers the hybrid store commits dozens of turns at once, so one Python process that also keeps Redis
    right does more than PostgreSQL's own client in C, at the number of clients that is best for it. Expected: 2
    times as many.
    """
    scenario = Scenario(
        name=f"durable turns, {CALLERS} callers",
        hypothesis=against_pgbench.__doc__ or "",
        unit="turns a second",
        ratios=[Ratio(name=f"hybrid / {PGBENCH}", over="hybrid", under=PGBENCH, at_least=2)],
    )
    pgbench = await prepared_pgbench(servers, folder)
    async with opened_hybrid(servers) as stores:
        store = hybrid_of(stores)
        cases: dict[str, Rate] = {
            "hybrid": append_to(store, await filled_sessions(store, SESSIONS), CALLERS).per_second
        }
        if pgbench is None:
            scenario.notes.append("there is no pgbench here: PostgreSQL 18's wheel and packages have it")
        else:
            clients = await _best(pgbench, scenario)
            cases[PGBENCH] = lambda seconds: pgbench.per_second(clients, seconds)
        return await together(scenario, cases, pace)


async def _best(pgbench: Pgbench, scenario: Scenario) -> int:
    await pgbench.per_second(CLIENTS[0], 1)
    rates = {clients: await pgbench.per_second(clients, 1) for clients in CLIENTS}
    shown = ", ".join(f"{clients} clients {rate:,.0f}" for clients, rate in rates.items())
    best = max(rates, key=lambda clients: rates[clients])
    scenario.notes.append(f"pgbench in turns a second: {shown}; {best} are used")
    return best


async def bulk_copy(servers: EmbeddedServers, pace: Pace) -> Scenario:
    """Hypothesis: COPY of many messages in one transaction is the most that PostgreSQL takes in: no session is
    locked or counted, nobody waits for an answer. It shows what is left above the hybrid store's batches.
    """
    async with bare_connections(servers) as (conn, _), opened_hybrid(servers) as stores:
        store: ChatSessionStore = hybrid_of(stores)

        async def copied(seconds: float) -> float:
            return await _copied_turns(conn.copy_records_to_table, seconds)

        cases: dict[str, Rate] = {
            "hybrid": append_to(store, await filled_sessions(store, SESSIONS), CALLERS).per_second,
            "COPY": copied,
        }
        scenario = Scenario(
            name=f"limit: COPY of {COPY_ROWS} messages",
            hypothesis=bulk_copy.__doc__ or "",
            unit="turns a second",
            ratios=[Ratio(name="hybrid / COPY", over="hybrid", under="COPY")],
        )
        return await together(scenario, cases, pace)


async def _copied_turns(copy: Callable[..., object], seconds: float) -> float:
    columns = ("session_id", "session_month", "seq", "message_id", "role", "content", "created_at")

    def rows() -> list[tuple[object, ...]]:
        session_id, now = new_uuid(), utc_now()
        month = session_month(session_id)
        return [(session_id, month, seq, new_uuid(), *TURN[seq % 2], now) for seq in range(1, COPY_ROWS + 1)]

    async def one(_: None) -> None:
        result = copy("chat_messages", schema_name="chat", records=rows(), columns=columns)
        assert asyncio.iscoroutine(result)
        await result

    return await Load(one, [None], 1).per_second(seconds) * COPY_ROWS / len(TURN)


_BENCHMARKS = ("valkey-benchmark", "redis-benchmark")


async def redis_limits(servers: EmbeddedServers) -> list[str]:
    """Redis' own client on values of 4 kB, with and without pipelining, as lines for the report."""
    program = next(filter(None, map(shutil.which, _BENCHMARKS)), None)
    if program is None:
        return [f"limit of Redis: left out, neither {' nor '.join(_BENCHMARKS)} is installed"]
    port = urls_of(servers)[1].rpartition(":")[2]
    lines = []
    for pipeline in ("1", "16"):
        argv = ("-p", port, "-c", "32", "-n", "100000", "-d", "4000", "-t", "get", "-P", pipeline, "--csv")
        process = await asyncio.create_subprocess_exec(program, *argv, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        per_second = out.decode().strip().splitlines()[-1].split(",")[1].strip('"')
        lines.append(
            f"limit of Redis: GET of 4 kB, 32 clients, pipelined by {pipeline}: {per_second} a second"
        )
    return lines

"""The goals of "Fast", as ratios within one run: on embedded servers, fsync on, in under three minutes.

Only the docstrings of the scenarios say what is expected, and why. The exit status is 1 where a goal is missed.

    python benchmarks/quick.py [--json FILE] [--report DIR] [--seconds N] [--rounds N]
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import alone
import limits
import over_http
import peers
import turns
import uvloop
from harness import Pace
from report import Results, write_report
from stores import facts, urls_of

from app.embedded import EmbeddedServers, embedded_servers
from app.postgres.schema import upgrade

Measuring = Callable[[Results, EmbeddedServers, Path, Pace], Awaitable[None]]


async def measure(results: Results, servers: EmbeddedServers, folder: Path, pace: Pace) -> None:
    await in_process(results, servers, folder, pace, peers.WITH_GOALS)
    async with over_http.opened(servers, folder) as over:
        results.add(await over_http.http_reads(over, pace))
        results.add(await over_http.http_appends(over, pace))


async def in_process(
    results: Results,
    servers: EmbeddedServers,
    folder: Path,
    pace: Pace,
    openings: dict[str, peers.Opening],
) -> None:
    # The 100 connections of a PostgreSQL as it comes do not suffice for all of them at once.
    async with turns.opened(servers, openings) as compared:
        # In this order: turns make the sessions longer.
        results.add(await turns.many_reads(compared, pace))
        results.add(await turns.many_turns(compared, pace))
    results.add(await limits.against_pgbench(servers, folder, pace))
    results.add(await alone.one_append(servers, pace))
    results.add(await alone.long_session(servers, pace))
    results.measures += await alone.bytes_in_redis(servers)


@contextmanager
def started_servers() -> Iterator[tuple[EmbeddedServers, Path]]:
    """Of our own, in a temporary folder, with the schema. The folder is for scripts and logs, too."""
    with (
        TemporaryDirectory(prefix="chat-bench-", ignore_cleanup_errors=True) as name,
        embedded_servers(Path(name), postgres_port=0, redis_port=0) as servers,
    ):
        upgrade(urls_of(servers)[0])
        yield servers, Path(name)


async def _measured(measuring: Measuring, servers: EmbeddedServers, folder: Path, pace: Pace) -> Results:
    known = await facts(servers, folder) | {
        "peers": ", ".join(f"{name} {release}" for name, release in peers.peer_versions().items()) or "none",
        "load": "closed loops; over HTTP by a process of our own (benchmarks/http_load.py); "
        f"{pace.rounds} rounds of {pace.seconds:g} s a case, {pace.calls} calls a case with one caller",
    }
    for name, value in known.items():
        print(f"{name:<8} {value}", flush=True)
    results = Results(facts=known)
    await measuring(results, servers, folder, pace)
    return results


def run(measuring: Measuring, pace: Pace, *, report: Path | None, json: Path | None, command: str) -> None:
    """Measures, prints, writes, and ends with status 1 where a goal is missed."""
    began = time.monotonic()
    with (
        started_servers() as (servers, folder),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        results = runner.run(_measured(measuring, servers, folder, pace))
    print(f"{results.text()}\n\n{time.monotonic() - began:.0f} s in all")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(results.json(), encoding="utf-8")
    if report is not None:
        write_report(results, report, command)
    sys.exit(0 if results.met else 1)


def arguments(description: str, pace: Pace) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's numbers there")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a Markdown report with plots there")
    parser.add_argument("--seconds", type=float, default=pace.seconds, help="of a case in a round")
    parser.add_argument("--rounds", type=int, default=pace.rounds)
    return parser


def main() -> None:
    pace = Pace(seconds=0.5, rounds=6, calls=40)
    wanted = arguments((__doc__ or "").splitlines()[0], pace).parse_args()
    pace = Pace(seconds=wanted.seconds, rounds=wanted.rounds, calls=pace.calls)
    run(measure, pace, report=wanted.report, json=wanted.json, command="make bench-quick")


if __name__ == "__main__":
    main()

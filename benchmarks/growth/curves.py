"""How the hybrid store's calls behave as everything around them grows, on real servers with fsync on.

    python -m benchmarks.growth.curves [--data-dir DIR] [--up-to N] [--only NAME ...] [--json FILE] [--plots DIR]
                                       [--shared-buffers SIZE]

Along each axis the points take turns, call by call in a drawn order, in one process and on one server: archives
of different sizes are databases beside each other. A ratio is one of medians within a round; the median, the least
and the most of the rounds are reported. The smallest archive is measured twice: what "again" strays from 1 is what
the machine's noise is worth. With --data-dir the archives are kept there, and found by the next run.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import uvloop

from app.chat import utc_now
from app.embedded import SHARED_BUFFERS, EmbeddedServers
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions, months_from
from benchmarks.growth.archive import Section, sections_of_user
from benchmarks.growth.databases import archive_of, fresh_database, load_into_buffers, served
from benchmarks.growth.fill import MESSAGES, connected, fill
from benchmarks.growth.plots import svg_of
from benchmarks.growth.series import (
    Curve,
    Figure,
    Measure,
    Timed,
    digits,
    in_turns,
    milliseconds,
    short,
    table,
    text_of,
)
from benchmarks.growth.subjects import PAGE, Subject, append_of, opened, turns
from benchmarks.growth.texts import text_of_bytes

ARCHIVES = (10_000, 100_000, 1_000_000, MESSAGES)
SESSION_MESSAGES = {10: 64, 100: 64, 1_000: 16, 10_000: 6, 100_000: 2}
USER_SESSIONS = (10, 100, 1_000, 10_000, 100_000)
CALLERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PAYLOADS = (100, 1_000, 10_000, 64_000, 262_144)

AT_MOST = 1.15
LIVE_SESSIONS = 48

_DAY_MS = 86_400_000
#: Where the smallest archive's second measurement stands among the others.
_AGAIN = -1


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long it takes: calls a point in a round, rounds, and seconds of a round with many callers."""

    calls: int
    rounds: int
    seconds: float


@dataclass(kw_only=True)
class Results:
    figures: list[Figure] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a part measures on: URLs that were made before the event loop ran."""

    archives: Mapping[int, str]
    scratch: str
    redis_url: str
    pace: Pace


Part = Callable[[Given], Awaitable[Results]]


async def archives(given: Given) -> Results:
    """Hypothesis: an archive's size is felt by no call. A session's messages are in one month's partition and next
    to each other in its keys, so a larger archive is a level of a B-tree more, and pages that are not in
    PostgreSQL's own buffers. Expected: at most 1.15 times as long at any size. But `total` counts what a user has.
    """
    pace, sizes = given.pace, sorted(given.archives)
    async with AsyncExitStack() as stack:
        subjects = {
            size: await stack.enter_async_context(opened(given.archives[size], given.redis_url, number))
            for number, size in enumerate(sizes, start=3)
        }
        calls: dict[str, dict[int, Timed]] = {}
        for size in (*sizes, _AGAIN):
            subject = subjects[sizes[0] if size == _AGAIN else size]
            for name, call in (await _calls_on(subject)).items():
                calls.setdefault(name, {})[size] = call
        figure = Figure(
            name="archive", title="Calls by the size of the archive", axis="messages in the archive"
        )
        results = Results(figures=[figure])
        for name, cases in calls.items():
            curve = await in_turns(name, cases, calls=pace.calls, rounds=pace.rounds)
            results.measures += _against_the_smallest(curve, sizes, goal=name != _WITH_TOTAL)
            del curve.rounds[_AGAIN]
            figure.curves.append(curve)
    return results


_WITH_TOTAL = "list, with the total"


async def _calls_on(subject: Subject) -> dict[str, Timed]:
    live = [await subject.new_session() for _ in range(LIVE_SESSIONS)]
    archived, users = await subject.archived_sessions(), await subject.users()
    # The reads come first: they find what nobody has touched. And neither finds what the other has warmed.
    half = len(archived) // 2
    return {
        "history, cached": subject.cached_history(live[1::2]),
        "history, cold": subject.cold_history(archived[:half]),
        "append": subject.append(live[::2]),
        "append, session of the archive": subject.append_to_archived(archived[half:]),
        "list, without the total": subject.list_without_total(users),
        _WITH_TOTAL: subject.list_with_total(users),
        "create": subject.create(),
        "delete": subject.delete(),
    }


def _against_the_smallest(curve: Curve, sizes: Sequence[int], *, goal: bool) -> list[Measure]:
    least, most = sizes[0], sizes[-1]
    if least == most:
        return []
    return [
        Measure(
            name=f"{curve.name}: {short(most)} archived messages / {short(least)}",
            values=curve.ratios(most, least),
            at_most=AT_MOST if goal else None,
        ),
        Measure(name=f"{curve.name}: control, {short(least)} again", values=curve.ratios(_AGAIN, least)),
    ]


async def sessions(given: Given) -> Results:
    """Hypothesis: an append and a page cost the same wherever in a session they are: the seq is in the key, the
    window in Redis has an end. Expected: an append at message 10,000 at most 1.15 times one at message 100. Only
    a delete touches each message.
    """
    pace = given.pace
    async with opened(given.scratch, given.redis_url, 9) as subject:
        its = {count: await subject.sessions_of(_user_of_length(count)) for count in SESSION_MESSAGES}
        for ids in its.values():
            for session_id in ids:
                await subject.store.read_history(session_id, max_messages=PAGE)
        calls: dict[str, dict[int, Timed]] = {
            "append": {count: subject.append(ids) for count, ids in its.items()},
            "history, cached": {
                count: subject.cached_history(ids, messages=10) for count, ids in its.items()
            },
            "page in the middle": {
                count: subject.older_page(ids, before_seq=count // 2) for count, ids in its.items()
            },
            "history, cold": {count: subject.cold_history(ids, messages=10) for count, ids in its.items()},
        }
        figure = Figure(
            name="session", title="Calls by the length of the session", axis="messages in the session"
        )
        for name, cases in calls.items():
            figure.curves.append(await in_turns(name, cases, calls=pace.calls, rounds=pace.rounds))
        append, cold = figure.curves[0], figure.curves[-1]
        deleted = Curve(name="delete")
        for count, ids in its.items():
            deleted.rounds[count] = [[await milliseconds(subject.store.delete_session(one)) for one in ids]]
        figure.curves.append(deleted)
    measures = [
        Measure(
            name="append: at message 10 k of a session / at message 100",
            values=append.ratios(10_000, 100),
            at_most=AT_MOST,
        ),
        Measure(name="append: at message 100 k / at message 100", values=append.ratios(100_000, 100)),
        Measure(name="history, cold: session of 10 k / of 100", values=cold.ratios(10_000, 100)),
    ]
    return Results(figures=[figure], measures=measures)


async def users(given: Given) -> Results:
    """Hypothesis: the first page of a user's sessions is read from the end of one index range, so it costs the same
    with any number of them. Only counting them all does not.
    """
    pace = given.pace
    async with opened(given.scratch, given.redis_url, 9) as subject:
        figure = Figure(name="user", title="Lists by the user's sessions", axis="sessions of the user")
        for name, call in (
            ("list, without the total", subject.list_without_total),
            (_WITH_TOTAL, subject.list_with_total),
        ):
            cases = {count: call([_user_of_sessions(count)]) for count in USER_SESSIONS}
            figure.curves.append(await in_turns(name, cases, calls=pace.calls, rounds=pace.rounds))
    least, most = USER_SESSIONS[1], USER_SESSIONS[-1]
    measures = [
        Measure(
            name=f"{curve.name}: {short(most)} sessions of a user / {short(least)}",
            values=curve.ratios(most, least),
        )
        for curve in figure.curves
    ]
    return Results(figures=[figure], measures=measures)


async def concurrency(given: Given) -> Results:
    """Hypothesis: more callers share commits, so the turns a second grow until the processor is busy, and then a
    turn takes as much longer as there are more callers.
    """
    pace = given.pace
    async with opened(given.scratch, given.redis_url, 9) as subject:
        ids = [await subject.new_session(0) for _ in range(max(CALLERS) * 2)]
        rate, waits = Curve(name="turns", unit="a second"), Curve(name="a turn")
        order = list(CALLERS)
        for index in range(-1, max(1, pace.rounds // 3)):
            for callers in order:
                one = await _closed_loops(subject, ids, callers, pace.seconds)
                if index >= 0:
                    rate.rounds.setdefault(callers, []).append([len(one) / pace.seconds])
                    waits.rounds.setdefault(callers, []).append(one)
            order.reverse()
    measures = [
        Measure(name="turns a second: 512 callers / 32", values=rate.ratios(512, 32)),
        Measure(name="turns a second: 32 callers / 1", values=rate.ratios(32, 1)),
    ]
    return Results(
        figures=[
            Figure(name="throughput", title="Turns a second by callers", axis="callers", curves=[rate]),
            Figure(name="latency", title="Time of a turn by callers", axis="callers", curves=[waits]),
        ],
        measures=measures,
    )


async def _closed_loops(subject: Subject, ids: Sequence[UUID], callers: int, seconds: float) -> list[float]:
    """The milliseconds of each turn that was done in that time."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds

    async def caller(owned: Iterator[UUID]) -> None:
        while time.perf_counter() < deadline:
            times.append(await milliseconds(subject.store.append(turns(next(owned)))))

    await asyncio.gather(*(caller(cycle(ids[number::callers])) for number in range(callers)))
    return times


async def payloads(given: Given) -> Results:
    """Hypothesis: small messages cost their round trips, large ones their bytes: through the log of PostgreSQL, its
    compression, and the copy in Redis.
    """
    pace = given.pace
    async with opened(given.scratch, given.redis_url, 9) as subject:
        append: dict[int, Timed] = {}
        read: dict[int, Timed] = {}
        for size in PAYLOADS:
            ids = [await subject.new_session(0) for _ in range(8)]
            append[size] = _append_of_bytes(subject, ids, size)
            read[size] = subject.cached_history(ids, messages=1)
        figure = Figure(name="payload", title="Calls by the size of a message", axis="bytes of the message")
        for name, cases in (("append", append), ("history of one, cached", read)):
            figure.curves.append(await in_turns(name, cases, calls=pace.calls, rounds=pace.rounds))
    measures = [
        Measure(name=f"{curve.name}: 262,144 bytes / 1 k", values=curve.ratios(262_144, 1_000))
        for curve in figure.curves
    ]
    return Results(figures=[figure], measures=measures)


def _append_of_bytes(subject: Subject, ids: Sequence[UUID], size: int) -> Timed:
    its, text = cycle(ids), text_of_bytes(size)
    return lambda: milliseconds(subject.store.append(append_of(next(its), ("user", text))))


PARTS: dict[str, Part] = {
    "archives": archives,
    "sessions": sessions,
    "users": users,
    "concurrency": concurrency,
    "payloads": payloads,
}


def _user_of_length(count: int) -> str:
    return f"sessions of {count} messages"


def _user_of_sessions(count: int) -> str:
    return f"user of {count} sessions"


def scratch_sections() -> list[Section]:
    """Sessions of each length, begun just now; and users of each number of sessions, over two years."""
    until_ms = round(utc_now().timestamp() * 1000)
    sections = []
    for count, copies in SESSION_MESSAGES.items():
        begins = array("q", [until_ms - 1000] * copies)
        sections += sections_of_user(_user_of_length(count), array("I", [count] * copies), begins, until_ms)
    for count in USER_SESSIONS:
        begins = array("q", (until_ms - 730 * _DAY_MS * (count - index) // count for index in range(count)))
        sections += sections_of_user(_user_of_sessions(count), array("I", [2] * count), begins, until_ms)
    return sections


async def measure(
    servers: EmbeddedServers, given: Given, parts: Sequence[str]
) -> tuple[dict[str, str], Results]:
    assert servers.database_url is not None
    known = await facts(servers, given.pace)
    for name, value in known.items():
        print(f"{name:<8} {value}")
    for url in (*given.archives.values(), given.scratch):
        await _this_months_partition(url)
    everything = Results()
    for name in parts:
        results = await PARTS[name](given)
        everything.figures += results.figures
        everything.measures += results.measures
        for figure in results.figures:
            print(f"\n{text_of(figure)}", flush=True)
    return known | {"load after": f"{os.getloadavg()[0]:.1f}"}, everything


async def _this_months_partition(url: str) -> None:
    database = Database(create_engine(url, application_name="growth", pool_size=1))
    try:
        await make_partitions(database, months_from(utc_now().date(), 1))
    finally:
        await database.close()


async def facts(servers: EmbeddedServers, pace: Pace) -> dict[str, str]:
    assert servers.database_url is not None
    async with connected(servers.database_url) as conn:
        names = ("fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")
        shown = [f"{name}={await conn.fetchval(f'SHOW {name}')}" for name in names]
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} before",
        "servers": f"PostgreSQL {servers.postgres_version} ({', '.join(shown)}); {servers.redis_version}",
        "pace": f"{pace.rounds} rounds of {pace.calls} calls a point, {pace.seconds:g} s with many callers; "
        f"pages of {PAGE} messages and sessions",
    }


@contextmanager
def folder_of(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield data_dir
        return
    with TemporaryDirectory(prefix="chat-growth-") as name:
        yield Path(name)


def _pace(rounds: int) -> Pace:
    return Pace(calls=30, rounds=rounds, seconds=1.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth.curves", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="keep the archives there; default: nowhere"
    )
    parser.add_argument("--up-to", type=int, default=MESSAGES, metavar="N", help="leave larger archives out")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write a plot of each axis there, as SVG")
    parser.add_argument(
        "--shared-buffers",
        metavar="SIZE",
        help="PostgreSQL's, as 10GB, with the archives loaded into them first; default: 128MB, and nothing loaded",
    )
    wanted = parser.parse_args()
    began = time.monotonic()
    with (
        folder_of(wanted.data_dir) as folder,
        served(folder, shared_buffers=wanted.shared_buffers or SHARED_BUFFERS) as servers,
    ):
        assert servers.database_url is not None
        assert servers.redis_url is not None
        sizes = [size for size in ARCHIVES if size <= wanted.up_to] if "archives" in wanted.only else []
        given = Given(
            archives={size: archive_of(servers.database_url, size) for size in sizes},
            scratch=fresh_database(servers.database_url, "growth_scratch"),
            redis_url=servers.redis_url,
            pace=_pace(wanted.rounds),
        )
        fill(given.scratch, scratch_sections())
        if wanted.shared_buffers:
            for url in given.archives.values():
                asyncio.run(load_into_buffers(url))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            known, results = runner.run(measure(servers, given, wanted.only))
    print(f"\n{table([('measure', 'got', 'goal'), *(one.row() for one in results.measures)])}")
    _write(wanted.json, wanted.plots, known, results)
    print(f"\n{digits((time.monotonic() - began) / 60)} min in all")
    return 0 if all(one.met for one in results.measures) else 1


def _write(to_json: Path | None, plots: Path | None, known: dict[str, str], results: Results) -> None:
    if to_json is not None:
        figures = [
            {
                "name": figure.name,
                "title": figure.title,
                "axis": figure.axis,
                "curves": [curve.as_json() for curve in figure.curves],
            }
            for figure in results.figures
        ]
        content = {
            "facts": known,
            "measures": [one.as_json() for one in results.measures],
            "figures": figures,
        }
        to_json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for figure in results.figures:
            (plots / f"{figure.name}.svg").write_text(svg_of(figure), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

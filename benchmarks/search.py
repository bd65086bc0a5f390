"""A week's search against plain ILIKE over the same messages.

    .venv/bin/python -m benchmarks.search --data-dir DIR [--rounds N]

Hypothesis: without an index or an extension, a word that is nowhere costs at most twice a plain ILIKE (the control), which
knows neither accents nor words, and stays below a second; a word that is everywhere takes milliseconds.
The archive has the density of the last months of 10 M messages in 24 months, and is kept below `--data-dir`.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from app.analytics.search import Match, Place, parse_query, search
from app.postgres.engine import Database, create_engine
from benchmarks.growth.archive import Plan, sections_of
from benchmarks.growth.databases import fresh_database, served, url_of
from benchmarks.growth.fill import connected, fill, midnight

_MESSAGES, _MESSAGES_OF_SESSION, _MONTHS = 1_550_000, 20, 3
_CONTROL = "plain ILIKE, a word that is nowhere"

_SEARCHES: dict[str, tuple[str, Match]] = {
    "words, one nowhere": ("nhà thầu xyzzy", "words"),
    "one word, nowhere": ("xyzzy", "words"),
    "phrase without accents, nowhere": ('"hoc bong"', "words"),
    "substring, nowhere": ("học bổng", "substring"),
    "one word, everywhere": ("thầu", "words"),
    "phrase without accents, everywhere": ('"bao dam du thau"', "words"),
}


async def measure(url: str, rounds: int) -> None:
    database = Database(create_engine(url, application_name="benchmark", pool_size=1))
    try:
        async with connected(url) as conn:
            until = (await conn.fetchval("SELECT max(created_at) FROM chat.chat_messages")) + timedelta(
                milliseconds=1
            )
            since = until - timedelta(days=7)
            count = await conn.fetchval(
                "SELECT count(*) FROM chat.chat_messages WHERE created_at >= $1 AND created_at < $2",
                since,
                until,
            )

        async def ilike() -> None:
            async with database.core() as conn:
                await conn.execute(
                    text(
                        "SELECT count(*) FROM chat.chat_messages "
                        "WHERE created_at >= :since AND created_at < :until AND content ILIKE '%xyzzy%'"
                    ),
                    {"since": since, "until": until},
                )

        def searched(words: str, match: Match) -> Callable[[], Awaitable[None]]:
            async def run() -> None:
                page = await search(database, parse_query(words, match), since=since, before=Place(until))
                assert not page.partial, "the search was not done in its time"

            return run

        calls = {_CONTROL: ilike, **{name: searched(*one) for name, one in _SEARCHES.items()}}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                await call()
                # The first round loads the pages.
                if number:
                    taken[name].append(time.perf_counter() - began)
    finally:
        await database.close()
    print(f"{count:,} messages of a week, medians of {rounds} rounds")
    for name, seconds in taken.items():
        ratio = statistics.median(one / of for one, of in zip(seconds, taken[_CONTROL], strict=True))
        print(
            f"{name:<36}{statistics.median(seconds) * 1000:8.0f} ms"
            f"  ({min(seconds) * 1000:.0f} to {max(seconds) * 1000:.0f})  {ratio:5.2f} of ILIKE"
        )


def archive(server_url: str, data_dir: Path) -> str:
    made = data_dir / "search-archive-is-filled"
    if made.exists():
        return url_of(server_url, "search")
    url = fresh_database(server_url, "search")
    plan = Plan(
        messages=_MESSAGES, sessions=_MESSAGES // _MESSAGES_OF_SESSION, months=_MONTHS, until=midnight()
    )
    fill(url, sections_of(plan))
    made.write_text(f"{datetime.now(UTC):%Y-%m-%d}\n")
    return url


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    wanted = parser.parse_args()
    with served(wanted.data_dir) as servers:
        assert servers.database_url is not None
        asyncio.run(measure(archive(servers.database_url, wanted.data_dir), wanted.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Archives of several sizes as databases of one server: made when they are missing, kept with the data folder.

python -m benchmarks.growth.databases --data-dir DIR [--messages N]    # makes it, then serves until Ctrl-C
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from app.embedded import SHARED_BUFFERS, EmbeddedServers, embedded_servers
from app.postgres.schema import upgrade
from benchmarks.growth.archive import Plan, sections_of
from benchmarks.growth.fill import MESSAGES, MESSAGES_OF_SESSION, connected, fill, midnight

SEED = 1


@contextmanager
def served(data_dir: Path, *, shared_buffers: str = SHARED_BUFFERS) -> Iterator[EmbeddedServers]:
    """Durable servers on ports that are free."""
    with embedded_servers(data_dir, postgres_port=0, redis_port=0, shared_buffers=shared_buffers) as servers:
        yield servers


def archive_of(server_url: str, messages: int, *, say: Callable[[str], None] = print) -> str:
    """The URL of the archive with so many messages. Blocking, and not for a running event loop.

    What is found half made is made anew: the name is given to what is complete.
    """
    url = url_of(server_url, f"growth_{messages}")
    if not asyncio.run(_exists(server_url, url)):
        half = fresh_database(server_url, f"growth_{messages}_half")
        plan = Plan(messages=messages, sessions=messages // MESSAGES_OF_SESSION, seed=SEED, until=midnight())
        filled = fill(half, sections_of(plan), say=say)
        say(f"made {_name(url)} in {filled.seconds:,.0f} s: {filled.per_second:,.0f} rows a second")
        asyncio.run(_execute(server_url, f'ALTER DATABASE "{_name(half)}" RENAME TO "{_name(url)}"'))
    return url


def fresh_database(server_url: str, name: str) -> str:
    """An empty one with our schema."""
    url = url_of(server_url, name)
    asyncio.run(_execute(server_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
    asyncio.run(_execute(server_url, f'CREATE DATABASE "{name}" TEMPLATE template0'))
    upgrade(url)
    return url


async def load_into_buffers(url: str) -> None:
    """All tables and indexes of a database, as they come to be in the buffers of a server that has run for long."""
    async with connected(url) as conn:
        await conn.execute("CREATE EXTENSION IF NOT EXISTS pg_prewarm")
        await conn.execute("SELECT pg_prewarm(oid) FROM pg_class WHERE relkind IN ('r', 'i', 't')")


def url_of(server_url: str, name: str) -> str:
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def _name(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


async def _exists(server_url: str, url: str) -> bool:
    async with connected(server_url) as conn:
        found = await conn.fetchval("SELECT count(*) FROM pg_database WHERE datname = $1", _name(url))
    return bool(found)


async def _execute(url: str, statement: str) -> None:
    async with connected(url) as conn:
        await conn.execute(statement)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth.databases", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--messages", type=int, default=MESSAGES, metavar="N")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    with served(wanted.data_dir) as servers:
        assert servers.database_url is not None
        url = archive_of(servers.database_url, wanted.messages)
        print(f"DATABASE_URL={url}\nREDIS_URL={servers.redis_url}\nserving until Ctrl-C", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`chat-sessions serve`: the service, with servers of its own where none are given."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.output import fail, refusals_are_lines
from app.cli.targets import announced, revision_of
from app.cli.worker import loop_factory, serve_here, set_up_log
from app.cli.workers import serve_with_workers
from app.errors import StartRefused
from app.postgres.schema import REVISION, upgrade
from app.settings import Settings, read_settings

if TYPE_CHECKING:  # it needs a Unix
    from app.embedded import EmbeddedServers

_BACKLOG = 2048

Workers = Annotated[int | None, typer.Option(metavar="N", help="processes that serve; in place of WORKERS")]


def serve(workers: Workers = None) -> None:
    """Serve the API. Without DATABASE_URL or REDIS_URL, real servers are started here.

    Settings come from the environment and from .env; their list is in the README.
    """
    # Until the server takes over: an end by SIGTERM closes what was opened, like any other.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    with refusals_are_lines(), ExitStack() as stack:
        settings = read_settings() if workers is None else read_settings(workers=workers)
        if settings.workers > 1 and sys.platform == "win32":
            fail("Windows can't share a port between processes: set WORKERS=1")
        set_up_log(settings)
        # What a first start does to its own database is no news; `chat-sessions migrate` says it.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Before anything is started: a port that is taken is the most common reason not to.
        listener = stack.enter_context(_listen(settings.host, settings.port))
        embedded = _start_missing(settings, stack)
        if embedded is not None:
            settings = settings.model_copy(
                update={
                    "database_url": settings.database_url or embedded.database_url,
                    "redis_url": settings.redis_url or embedded.redis_url,
                }
            )
            if embedded.database_url is not None and revision_of(embedded.database_url) != REVISION:
                upgrade(embedded.database_url)
            stack.enter_context(announced(settings, embedded))
        announce = partial(_announce, settings, embedded, *listener.getsockname()[:2])
        if settings.workers == 1:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(serve_here(settings, listener, embedded=embedded is not None, on_start=announce))
        else:
            asyncio.run(
                serve_with_workers(settings, listener, embedded=embedded is not None, on_start=announce)
            )


def _start_missing(settings: Settings, stack: ExitStack) -> "EmbeddedServers | None":
    """Starts the servers that no URL is given for; a URL always wins."""
    postgres = settings.database_url is None and not settings.redis_only_mode
    redis = settings.redis_url is None and settings.enable_redis_sessions
    if not (postgres or redis):
        return None
    if sys.platform == "win32":
        fail("there are no embedded servers for Windows: set DATABASE_URL and REDIS_URL")
    from app.embedded import EmbeddedServerError, embedded_servers  # noqa: PLC0415 - it needs a Unix

    try:
        return stack.enter_context(embedded_servers(settings.data_dir, postgres=postgres, redis=redis))
    except EmbeddedServerError as exc:
        fail(str(exc))


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that can't be one of a host
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise StartRefused(
            f"can't listen on HOST={host}, PORT={port}: {reason}",
            hint="stop what listens there, or set PORT to a free one and HOST to an address of this machine",
        ) from exc
    with listener:
        yield listener


def _announce(settings: Settings, embedded: "EmbeddedServers | None", host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{'localhost' if host in {'127.0.0.1', '0.0.0.0', '::'} else shown}:{port}"  # noqa: S104 - compared, not bound
    lines = [
        *([("pages", address)] if settings.enable_pages else []),
        ("API", f"{address}/api/chat"),
        ("docs", f"{address}/docs"),
        ("health", f"{address}/health/ready"),
    ]
    if embedded is not None:
        if embedded.database_url is not None:
            lines.append((f"PostgreSQL {embedded.postgres_version}", embedded.psql_command or ""))
        if embedded.redis_url is not None:
            lines.append((embedded.redis_version or "Redis", embedded.redis_cli_command or ""))
        lines.append(("data", str(settings.data_dir.resolve())))
    if settings.workers > 1:
        lines.append(("workers", str(settings.workers)))
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)
    sys.stdout.write(f"\nchat-sessions is serving. Stop it with Ctrl-C.\n\n{text}\n\n")
    sys.stdout.flush()

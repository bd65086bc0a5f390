"""How commands speak: rich on a terminal, plain in a pipe, one line for what went wrong."""

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.coherence.ports import CacheOutage, CacheOutOfMemory
from app.errors import ChatError, DurableStoreUnavailable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

#: What the shell says of a command that Ctrl-C ended.
_EXIT_INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Says what was wrong on standard error and ends with `code`."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"error: {message}", markup=False, style="red"
    )
    raise typer.Exit(code)


@contextmanager
def refusals_are_lines(*, code: int = 1) -> Iterator[None]:
    """A condition that the operator can act on ends the command with its text, never with a traceback."""
    try:
        yield
    except (ChatError, CacheOutage) as exc:
        fail(_said(exc), code=code)


@contextmanager
def interruptible(said: str) -> Iterator[None]:
    """Ctrl-C ends the command with what it has left behind, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(f"\nstopped: {said}", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED) from None


def _said(exc: ChatError | CacheOutage) -> str:
    """What a request's caller can only wait for, who runs a command can do something about."""
    if isinstance(exc, DurableStoreUnavailable) and exc.hint is None:
        reached = "can't be reached" not in exc.detail
        return f"{exc} ({'look at PostgreSQL' if reached else 'start PostgreSQL'}, or correct DATABASE_URL)"
    if isinstance(exc, CacheOutage) and not isinstance(exc, CacheOutOfMemory):
        return f"{exc} (start Redis, or correct REDIS_URL)"
    return str(exc)


@contextmanager
def progress_of_unknown(what: str) -> Iterator[tuple[Callable[[int | None], None], Callable[[int], None]]]:
    """A bar whose total is found out on the way: call the first with it, the second with how much was done since."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as shown:
        task = shown.add_task(what, total=None)
        yield lambda total: shown.update(task, total=total), lambda count: shown.advance(task, count)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; in a pipe nothing. Call it with how much was done since."""
    with progress_of_unknown(what) as (begin, advance):
        begin(total)
        yield advance


def print_json(value: Any) -> None:
    # What escapes an emoji for a terminal without UTF-8 is no escape of JSON's.
    ascii_only = sys.stdout.encoding.lower() not in {"utf-8", "utf8"}
    sys.stdout.write(json.dumps(value, ensure_ascii=ascii_only, indent=2, default=str) + "\n")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> None:
    """A table on a terminal; in a pipe a line a row, tabs between the fields."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            sys.stdout.write("\t".join(_cell(value) for value in row) + "\n")
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(highlight=False, markup=False).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    # A message's own tabs and line breaks must not look like ours, and its escapes are not for the terminal.
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], str(value).replace("\t", " "))

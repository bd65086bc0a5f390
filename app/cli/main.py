"""`chat-sessions`: one file a command, named here, and read when its command is asked for."""

import importlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

COMMANDS = (
    "serve",
    "migrate",
    "partitions",
    "doctor",
    "show",
    "report",
    "search",
    "search-index",
    "rollup",
    "dictionary",
    "verify",
    "repair",
    "mode",
    "adopt",
    "export",
    "import",
    "analyst",
)


class _Commands(Mapping[str, Any]):
    """To import the files of all commands takes longer than most commands do; only a list of them needs all."""

    def __getitem__(self, command: str) -> Any:
        if command not in COMMANDS:
            raise KeyError(command)
        name = command.replace("-", "_")
        # `import` is a word of Python's.
        name = f"{name}_" if iskeyword(name) else name
        found = getattr(importlib.import_module(f"app.cli.{name}"), name)
        one = typer.Typer(rich_markup_mode="rich")
        if isinstance(found, typer.Typer):
            one.add_typer(found, name=command)
        else:
            one.command(command)(found)
        return get_group(one).commands[command]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        found: Any = _Commands()
        self.commands = found


app = typer.Typer(
    cls=_Group,
    name="chat-sessions",
    help="Chat sessions in Redis and PostgreSQL: serve them, look after them, ask about them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _chat_sessions() -> None:
    """Without it, Typer would find no command at all."""


def main() -> None:
    # A command says itself what it found out of order; `serve` sets up its log.
    logging.getLogger("chat_sessions").addHandler(logging.NullHandler())
    # What people wrote goes to terminals that can't show all of it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()

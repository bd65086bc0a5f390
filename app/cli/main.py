"""`chat-sessions`: one file a command, registered here."""

import importlib
import logging
from keyword import iskeyword
from typing import Any

import typer

app = typer.Typer(
    name="chat-sessions",
    help="Chat sessions in Redis and PostgreSQL: serve them, look after them, ask about them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (
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
):
    name = command.replace("-", "_")
    # `import` is a word of Python's.
    name = f"{name}_" if iskeyword(name) else name
    module: Any = importlib.import_module(f"app.cli.{name}")
    app.command(command)(getattr(module, name))

for group in ("analyst",):
    module = importlib.import_module(f"app.cli.{group}")
    app.add_typer(getattr(module, group), name=group)


def main() -> None:
    # A command says itself what it found out of order; `serve` sets up its log.
    logging.getLogger("chat_sessions").addHandler(logging.NullHandler())
    app()

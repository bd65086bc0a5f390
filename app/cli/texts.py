"""Texts on the command line."""

import typer


def text(typed: str) -> str:
    """What was typed, where it can stand in a database; a terminal may send other encodings than UTF-8."""
    try:
        typed.encode()
    except UnicodeEncodeError as exc:
        raise typer.BadParameter(
            f"{typed!r} holds bytes that are no UTF-8: type it in a terminal with UTF-8"
        ) from exc
    return typed

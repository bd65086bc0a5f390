"""The messages that the model's clients send: made once, told apart by their ids, with as little to say as possible."""

from datetime import UTC, datetime
from functools import cache
from uuid import UUID

from app.chat import NewMessage, line_prefix

THEN = datetime(2026, 1, 1, tzinfo=UTC)

_TAIL = ',"role":"user","content":"","timestamp":"2026-01-01T00:00:00.000Z","metadata":{}}'


@cache
def session_id(number: int) -> UUID:
    return UUID(int=(0x7 << 76) + (0b10 << 62) + (1 << 80) + number)


@cache
def message(number: int, *, keyed: bool) -> NewMessage:
    return NewMessage(
        message_id=UUID(int=(number << 1) + keyed + (1 << 100)),
        role="user",
        content="",
        created_at=THEN,
        request_digest="00" * 32 if keyed else None,
        request_size=1 if keyed else None,
    )


@cache
def _prefix(message_id: UUID) -> str:
    return line_prefix(message_id)


@cache
def _id(text: str) -> UUID:
    return UUID(text)


def line(message_id: UUID, seq: int) -> str:
    """As `NewMessage.line` makes it, without the request that began with it."""
    return f"{_prefix(message_id)}{seq}{_TAIL}"


def id_of(text: str) -> UUID:
    return _id(text[15:51])


def seq_of(text: str) -> int:
    return int(text[59 : text.index(",", 59)])

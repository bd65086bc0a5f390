"""Rows of the database to values of the domain, and back."""

import json
from collections.abc import Sequence
from typing import Any, Protocol
from uuid import UUID

from app.chat import ChatSession, Message, NewMessage, session_month
from app.coherence.ports import CacheState, Row

_SMALLINT_MAX = 2**15 - 1
_INTEGER_MAX = 2**31 - 1


class Record(Protocol):
    """A row of asyncpg or of SQLAlchemy: columns by name."""

    def __getitem__(self, key: str, /) -> Any: ...


def row_of(record: Record, *, created_at: str = "created_at") -> Row:
    return Row(
        session=ChatSession(
            session_id=record["session_id"],
            user_id=record["user_id"],
            created_at=record[created_at],
            last_activity=record["last_activity"],
            message_count=record["message_count"],
        ),
        chain=record["chain"],
        owner=record["owner"],
    )


def state_of(record: Record) -> CacheState:
    return CacheState(
        protocol=record["protocol"],
        epoch=record["epoch"],
        mode=record["mode"],
        cache=record["cache"],
        redis_identity=record["redis_identity"],
        settled=record["settled"],
    )


def message_of(record: Record) -> Message:
    digest = record["request_digest"]
    return Message(
        message_id=record["message_id"],
        seq=record["seq"],
        role=record["role"],
        content=record["content"],
        created_at=record["created_at"],
        metadata=record["metadata"],
        request_digest=digest.hex() if digest is not None else None,
        request_size=record["request_size"],
    )


_MESSAGE_COLUMNS = 12


class MessageColumns:
    """Messages as one array a column, in the order that `statements.APPEND` takes them."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []

    @property
    def arrays(self) -> tuple[tuple[Any, ...] | None, ...]:
        """None for a column that says nothing of any message: `unnest` makes up for what an array lacks with NULLs,
        and each value of an array costs the driver a look at what kind of thing it is.
        """
        columns = zip(*self._rows, strict=True) if self._rows else [()] * _MESSAGE_COLUMNS
        return tuple(column if column.count(None) < len(column) else None for column in columns)

    def add(self, session_id: UUID, messages: Sequence[NewMessage], *, first_seq: int) -> None:
        """Messages of one session, the first of them with `first_seq`."""
        month = session_month(session_id)
        for seq, message in enumerate(messages, first_seq):
            processing_time_ms, source_count = _facts(message)
            digest = message.request_digest
            self._rows.append(
                (
                    session_id,
                    month,
                    seq,
                    message.message_id,
                    message.role,
                    message.content,
                    message.created_at,
                    processing_time_ms,
                    source_count,
                    message.metadata,
                    bytes.fromhex(digest) if digest is not None else None,
                    message.request_size,
                )
            )


def _facts(message: NewMessage) -> tuple[int | None, int | None]:
    """What analytics asks of an assistant's answer, where its metadata says it in the usual way."""
    if message.role != "assistant":
        return None, None
    if message.metadata == "{}":
        return None, None
    metadata = json.loads(message.metadata)
    elapsed, sources = metadata.get("processing_time_ms"), metadata.get("sources")
    # A bool is an int to Python, not to a reader of the report.
    whole = isinstance(elapsed, int) and not isinstance(elapsed, bool) and 0 <= elapsed <= _INTEGER_MAX
    return (
        elapsed if whole else None,
        min(len(sources), _SMALLINT_MAX) if isinstance(sources, list) else None,
    )

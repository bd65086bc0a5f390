"""The values of the domain: sessions, messages, and what identifies them.

Frozen, standard library only. A message's JSON line is made here and nowhere else, so that the
same text stands in Redis, in PostgreSQL's `metadata`, and in an HTTP answer.
"""

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, get_args
from uuid import UUID, uuid5

Role = Literal["user", "assistant", "system", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
Source = Literal["redis", "postgres"]
SessionStatus = Literal["active", "archived", "all"]

#: The chain of a session without messages.
CHAIN_START = bytes(8)

#: Months of ids that carry no time (UUIDv4, a client's own ids): partition `legacy`.
LEGACY_MONTH = date(1, 1, 1)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS = 86_400_000
_FIRST_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)
_AHEAD_MAX = timedelta(days=1)
# The last millisecond that Python's calendar (and so asyncpg) can express: the end of the year 9999.
_CALENDAR_END_MS = 253_402_300_800_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSession:
    """A session without its messages, as its store knew it at one moment.

    `message_count` is the seq of its last message. `first_available_seq` is the oldest message that can
    still be read: 1, except in Redis-only mode once the window has dropped messages.
    """

    session_id: UUID
    user_id: str
    created_at: datetime
    last_activity: datetime
    message_count: int
    first_available_seq: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessage:
    """A message that has no place in its session yet.

    `metadata` is JSON text of an object: it is carried, never rewritten. `request_digest` and
    `request_size` stand on the first message of a request with an idempotency key.
    """

    message_id: UUID
    role: Role
    content: str
    created_at: datetime
    metadata: str = "{}"
    request_digest: str | None = None
    request_size: int | None = None

    def at(self, seq: int) -> "Message":
        """The message at its place."""
        return Message(
            message_id=self.message_id,
            role=self.role,
            content=self.content,
            created_at=self.created_at,
            metadata=self.metadata,
            request_digest=self.request_digest,
            request_size=self.request_size,
            seq=seq,
        )

    def line(self, seq: int) -> str:
        """The message as one line of JSON: no raw line break can occur in it."""
        return line_prefix(self.message_id) + str(seq) + self.line_tail()

    def line_tail(self) -> str:
        """Everything after the seq, for a store that assigns the seq itself."""
        return (
            f',"role":"{self.role}","content":{json_text(self.content)}'
            f',"timestamp":"{format_time(self.created_at)}","metadata":{self.metadata}{self.line_end()}'
        )

    def line_end(self) -> str:
        """How the line ends: with the request that it began, where that has an idempotency key."""
        if self.request_digest is None:
            return "}"
        return f',"request_digest":"{self.request_digest}","request_size":{self.request_size}}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Message(NewMessage):
    """A stored message: `seq` counts from 1 within its session, without gaps."""

    seq: int

    @classmethod
    def from_line(cls, line: str) -> "Message":
        """Reads back what `NewMessage.line` wrote.

        Raises `ValueError` or `KeyError` where the text is not such a line.
        """
        fields = json.loads(line)
        return cls(
            message_id=UUID(fields["message_id"]),
            seq=fields["seq"],
            role=fields["role"],
            content=fields["content"],
            created_at=parse_time(fields["timestamp"]),
            metadata=json_text(fields["metadata"]),
            request_digest=fields.get("request_digest"),
            request_size=fields.get("request_size"),
        )


def body_of(lines: Sequence[str]) -> bytes:
    """Lines as they stand in a store one after the other. No line has a line break of its own."""
    return ",\n".join(lines).encode()


def lines_of(body: bytes) -> tuple[str, ...]:
    """The lines that `body_of` has joined."""
    return tuple(body.decode().split(",\n")) if body else ()


def messages_of(body: bytes) -> tuple[Message, ...]:
    """The same, each read back. Raises `ValueError` or `KeyError` for a line that is no message."""
    return tuple(map(Message.from_line, lines_of(body)))


def line_prefix(message_id: UUID) -> str:
    """How a message's line begins, up to its seq: the same length for every message."""
    return f'{{"message_id":"{message_id}","seq":'


#: Where the seq stands in a line.
_SEQ_OFFSET = len(line_prefix(UUID(int=0)))


def is_line(line: bytes, seq: int) -> bool:
    """Whether it begins as the line of message `seq` does."""
    return line.startswith(b"%d," % seq, _SEQ_OFFSET)


def json_text(value: Any) -> str:
    """Compact JSON. Keys keep their order, text stays as typed, numbers keep their kind.

    Raises `ValueError` for NaN and infinities, which JSON cannot express.
    """
    return _encode_json(value)


# Made once: `json.dumps` makes one at every call with options, which takes half as long as most messages.
_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def utc_now() -> datetime:
    """Now, cut to milliseconds: no store ever sees a finer time, so that both keep the same."""
    return datetime.fromtimestamp(time.time_ns() // 1_000_000 / 1000, UTC)


def cut_to_milliseconds(moment: datetime) -> datetime:
    """The moment in UTC without its microseconds below one millisecond."""
    moment = moment.astimezone(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def is_plausible(moment: datetime) -> bool:
    """Whether a message can be of this moment: no chat of ours was had before 2000, and a clock is at most a day ahead."""
    return _FIRST_MOMENT <= moment <= datetime.now(UTC) + _AHEAD_MAX


def milliseconds_of(moment: datetime) -> int:
    """Since 1970, without loss for what `utc_now` gives."""
    return round(moment.timestamp() * 1000)


def from_milliseconds(milliseconds: int) -> datetime:
    """The moment that `milliseconds_of` was given. Not by a division: a float has not all of them."""
    seconds, rest = divmod(milliseconds, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


# Messages of one moment are written together, and each with its session's.
@lru_cache(maxsize=256)
def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds: always 24 characters."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="milliseconds")[:23] + "Z"


def parse_time(text: str) -> datetime:
    """Reads what `format_time` wrote."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


def session_month(session_id: UUID) -> date:
    """The first day of the UTC month in which a UUIDv7 was made, `LEGACY_MONTH` for every other id.

    A pure function of the id, the twin of `chat.session_month(uuid)` in SQL: it is how every statement
    finds the one partition that holds a session's messages.
    """
    # Versions are only defined for the RFC 9562 variant; `UUID.version` is None for the others.
    milliseconds = session_id.int >> 80
    if session_id.version != 7 or milliseconds >= _CALENDAR_END_MS:  # noqa: PLR2004 - the version's number
        return LEGACY_MONTH
    return _month_of(milliseconds // _DAY_MS)


@lru_cache(maxsize=1024)
def _month_of(day: int) -> date:
    """The first of the month of a day counted from 1970."""
    return (_EPOCH + timedelta(days=day)).date().replace(day=1)


def next_chain(chain: bytes, message_ids: Sequence[UUID]) -> bytes:
    """Extends a session's chain by messages: two histories of equal length but other messages differ.

    BLAKE2b-64 over the previous 8 bytes and the message id's 16, message by message.
    """
    for message_id in message_ids:
        chain = hashlib.blake2b(chain + message_id.bytes, digest_size=8).digest()
    return chain


def keyed_message_id(session_id: UUID, key: str, index: int) -> UUID:
    """The id of message `index` of a request with an idempotency key: the same for every retry."""
    return uuid5(session_id, f"{key}\n{index}")


class UuidV7Generator:
    """UUIDv7 (RFC 9562, 6.2 method 1): each id sorts after the one before it, within one process.

    42 bits of counter start at random below half their range in every millisecond, and count up; a clock
    that steps back does not: the last millisecond is kept until it is passed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._milliseconds = 0
        self._counter = 0
        self._random = io.BytesIO()

    def __call__(self) -> UUID:
        with self._lock:
            now = time.time_ns() // 1_000_000
            if now > self._milliseconds:
                self._milliseconds = now
                self._counter = self._random_bytes(6) >> 7
            else:
                self._counter += 1
                if self._counter >> 42:
                    self._milliseconds += 1
                    self._counter = self._random_bytes(6) >> 7
            milliseconds, counter, tail = self._milliseconds, self._counter, self._random_bytes(4)
        value = milliseconds << 80 | 0x7 << 76 | (counter >> 30) << 64 | 0b10 << 62
        return UUID(int=value | (counter & 0x3FFF_FFFF) << 32 | tail)

    def _random_bytes(self, count: int) -> int:
        """Out of the kernel's, a page at a time: a call for each id costs more than the id."""
        if len(found := self._random.read(count)) < count:
            self._random = io.BytesIO(os.urandom(4096))
            found = self._random.read(count)
        return int.from_bytes(found)


new_uuid = UuidV7Generator()

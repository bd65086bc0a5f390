"""A session's value in Redis: the guide's JSON, laid out so that a script can append without decoding.

    {"_c":"<version><owner><epoch><seq><chain><pending><token><first_seq><first_offset>",
     "session_id":"...","created_at":"...","last_activity":"...","user_id":...,"messages":[
    {...},
    {...}]}

(The head is one line in fact.) Everything before the user id has a fixed width, so a script finds each
field by its offset; numbers are zero-padded. One message a line: a raw line break cannot occur inside a
JSON string, so a script finds the borders by a plain search. A line that fell out of the window is blanks:
`first_offset` is where the live ones begin, always right after a line break.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import MAXYEAR, MINYEAR, UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid5

from app.chat import (
    ROLES,
    ChatSession,
    NewMessage,
    cut_to_milliseconds,
    format_time,
    is_line,
    json_text,
    parse_time,
    utc_now,
)
from app.coherence.ports import TOKEN_ZERO, CachedValue, Entry, GuideEntry, Owner, Row, Unreadable

VERSION = "1"
_OWNER_LETTER: dict[Owner, Literal["p", "r"]] = {"postgres": "p", "redis": "r"}
_LETTER_OWNER: dict[str, Owner] = {"p": "postgres", "r": "redis"}

_START = '{"_c":"'
#: The fixed part of the head: (name, width) of a field, or the text between two fields.
_LAYOUT: tuple[tuple[str, int] | str, ...] = (
    _START,
    ("version", 1),
    ("owner", 1),
    ("epoch", 16),
    ("seq", 10),
    ("chain", 16),
    ("pending", 10),
    ("token", 16),
    ("first_seq", 10),
    ("first_offset", 10),
    '","session_id":"',
    ("session_id", 36),
    '","created_at":"',
    ("created_at", 24),
    '","last_activity":"',
    ("last_activity", 24),
    '","user_id":',
)
_BEFORE_MESSAGES = b',"messages":[\n'
_END = b"]}"


def _offsets() -> tuple[dict[str, tuple[int, int]], int]:
    at, fields = 0, {}
    for part in _LAYOUT:
        if isinstance(part, str):
            at += len(part)
        else:
            name, width = part
            fields[name] = (at, width)
            at += width
    return fields, at


#: name -> (offset, width), and the offset of the user id.
FIELDS, USER_ID_OFFSET = _offsets()

#: The pending of an entry that no publish makes clean: one that was set outside a row lock may come late, after
#: the first message was committed, and the publish of that one later still (found by the model).
PENDING_MAX = 10 ** FIELDS["pending"][1] - 1

#: Bytes from the start of a value that reach past the head: a user id has at most 256 characters, 1,536
#: bytes when each is escaped.
HEAD_BYTES_MAX = USER_ID_OFFSET + 2048

#: A head as a whole: fields of their widths, the text between them, and the user id, which is JSON. One look by the
#: regular expressions' C takes a third of the same look in Python.
_HEAD = re.compile(
    b"".join(re.escape(part.encode()) if isinstance(part, str) else b"(.{%d})" % part[1] for part in _LAYOUT)
    # Most are what stands between their two quotes.
    + b'(?:"([^"\\\\\n]*)"|([^\n]*))'
    + re.escape(_BEFORE_MESSAGES),
    re.DOTALL,
)


class _Head(NamedTuple):
    """The fields of a head, as bytes, in the order of `_LAYOUT`. The user id stands in one of the last two."""

    version: bytes
    owner: bytes
    epoch: bytes
    seq: bytes
    chain: bytes
    pending: bytes
    token: bytes
    first_seq: bytes
    first_offset: bytes
    session_id: bytes
    created_at: bytes
    last_activity: bytes
    user_id: bytes | None
    user_id_json: bytes | None


def _head(value: bytes) -> _Head | None:
    """The head that a value begins with; None where it does not begin with a whole one."""
    match = _HEAD.match(value)
    return _Head._make(match.groups()) if match is not None else None


def with_layout(lua: str) -> str:
    """A script with the layout written out in it, the only place where offsets are computed: `at.seq` and `width.seq` are
    numbers, `field(head, 'seq')` and `between(head, 'seq', 'pending')` what they cut out.

    Redis runs all of a script at each call: tables and functions that say the same took a tenth of its time.
    """
    at = {name: offset for name, (offset, _) in FIELDS.items()} | {"user_id": USER_ID_OFFSET}
    width = {name: its for name, (_, its) in FIELDS.items()}

    def cut(head: str, begin: int, end: int) -> str:
        return f"string.sub({head}, {begin + 1}, {end})"

    lua = re.sub(r"\bfield\((\w+), '(\w+)'\)", lambda m: cut(m[1], at[m[2]], at[m[2]] + width[m[2]]), lua)
    lua = re.sub(r"\bbetween\((\w+), '(\w+)', '(\w+)'\)", lambda m: cut(m[1], at[m[2]], at[m[3]]), lua)
    lua = re.sub(r"\bat\.(\w+)", lambda m: str(at[m[1]]), lua)
    return re.sub(r"\bwidth\.(\w+)", lambda m: str(width[m[1]]), lua)


def encode(row: Row, *, epoch: str, lines: Sequence[str], pending: int = 0, token: str = TOKEN_ZERO) -> bytes:
    """The value for a session whose newest messages are `lines`."""
    session = row.session
    user_id = json_text(session.user_id).encode()
    first_seq = session.message_count - len(lines) + 1
    values = {
        "version": VERSION,
        "owner": _OWNER_LETTER[row.owner],
        "epoch": epoch,
        "seq": f"{session.message_count:010d}",
        "chain": row.chain.hex(),
        "pending": f"{pending:010d}",
        "token": token,
        "first_seq": f"{first_seq:010d}",
        "first_offset": f"{USER_ID_OFFSET + len(user_id) + len(_BEFORE_MESSAGES):010d}",
        "session_id": str(session.session_id),
        "created_at": format_time(session.created_at),
        "last_activity": format_time(session.last_activity),
    }
    head = "".join(part if isinstance(part, str) else values[part[0]] for part in _LAYOUT)
    return b"".join((head.encode(), user_id, _BEFORE_MESSAGES, ",\n".join(lines).encode(), _END))


def decode(value: bytes, session_id: UUID, *, counts: bool = True) -> CachedValue:
    """Takes a value apart. None where it is not a session's value, or another session's.

    The last is what a socket that carries somebody else's reply looks like (OpenAI, 20 March 2023). Without `counts`
    the lines of what PostgreSQL owns are not counted, which takes longer than all the rest: the last one is looked at,
    and `Entry.newest` looks at those that it gives.
    """
    if value.startswith(_START.encode()):
        try:
            entry = _decode_entry(value, session_id)
        except (ValueError, KeyError, OverflowError):
            return _torn(value, session_id)
        if entry is not None and (counts or entry.owner == "redis") and not entry.counts():
            return _torn(value, session_id)
        return entry
    return _decode_guide(value, session_id)


def _torn(value: bytes, session_id: UUID) -> Unreadable | None:
    """What PostgreSQL owns is made anew; what Redis owns is nowhere else."""
    name_at, width = FIELDS["session_id"]
    owner_at = FIELDS["owner"][0]
    if value[owner_at : owner_at + 1] != b"r" or value[name_at : name_at + width] != str(session_id).encode():
        return None
    return Unreadable(why="its head and its lines don't agree")


def decode_head(value: bytes, session_id: UUID) -> ChatSession | None:
    """The session out of the first bytes of its value, which must reach past the user id."""
    if (head := _head(value)) is None or head.session_id != str(session_id).encode():
        return None
    try:
        return _session(head, session_id)
    except (ValueError, OverflowError):
        return None


def _session(head: _Head, session_id: UUID) -> ChatSession:
    return ChatSession(
        session_id=session_id,
        user_id=head.user_id.decode() if head.user_id is not None else json.loads(head.user_id_json or b""),
        created_at=parse_time(head.created_at.decode()),
        last_activity=parse_time(head.last_activity.decode()),
        message_count=int(head.seq),
        first_available_seq=int(head.first_seq) if head.owner == b"r" else 1,
    )


def _decode_entry(value: bytes, session_id: UUID) -> Entry | None:
    """None where it is another session's."""
    head = _head(value)
    if head is None or head.version != VERSION.encode():
        raise ValueError("head")
    # As a number: a UUID takes longer to write than to read.
    if int(head.session_id.replace(b"-", b""), 16) != session_id.int:
        return None
    session = _session(head, session_id)
    first_seq, first_offset = int(head.first_seq), int(head.first_offset)
    body = value[first_offset : -len(_END)]
    # A torn or hand-edited value is no session: its head and its lines must agree.
    if (
        value[first_offset - 1 : first_offset] != b"\n"
        or not value.endswith(_END)
        or (body and not is_line(body[body.rfind(b"\n") + 1 :], session.message_count))
        or bool(body) != (session.message_count >= first_seq)
    ):
        raise ValueError("body")
    return Entry(
        owner=_LETTER_OWNER[head.owner.decode()],
        epoch=head.epoch.decode(),
        chain=bytes.fromhex(head.chain.decode()),
        pending=int(head.pending),
        token=head.token.decode(),
        first_seq=first_seq,
        session=session,
        body=body,
    )


def _decode_guide(value: bytes, session_id: UUID) -> GuideEntry | Unreadable | None:
    """The guide's own format. Its messages have no ids: they get ones made from what they say and from how often
    it was said before, so that a second look at an entry that has grown or lost its oldest gives the same ones.
    """
    try:
        fields = json.loads(value)
        if UUID(fields["session_id"]) != session_id or not isinstance(fields["messages"], list):
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    try:
        created_at = _guide_time(fields.get("created_at"), utc_now())
        ids = _GuideIds(session_id)
        messages = tuple(_guide_message(ids, message, created_at) for message in fields["messages"])
        session = ChatSession(
            session_id=session_id,
            user_id=_text(fields["user_id"]),
            created_at=created_at,
            last_activity=_guide_time(fields.get("last_activity"), created_at),
            message_count=len(messages),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        # This one's own words quote what was written.
        surrogate = isinstance(exc, UnicodeEncodeError)
        why = "holds a lone surrogate, which is no Unicode text" if surrogate else repr(exc)
        return (
            Unreadable(why=f"it is in the guide's format, but {why}", guides=True)
            if fields["messages"]
            else None
        )
    return GuideEntry(session=session, messages=messages)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("the user's id is no text")
    return value


class _GuideIds:
    def __init__(self, session_id: UUID) -> None:
        self._session_id = session_id
        self._said: Counter[str] = Counter()
        self._given: set[UUID] = set()

    def id_of(self, fields: dict[str, Any]) -> UUID:
        """A message of ours keeps its id: the guide's program, where it is still running, carries it along."""
        text = json.dumps(fields, ensure_ascii=False, sort_keys=True)
        self._said[text] += 1
        message_id = uuid5(self._session_id, f"guide\n{self._said[text]}\n{text}")
        with suppress(ValueError, TypeError, AttributeError):
            own = UUID(fields.get("message_id"))
            message_id = message_id if own in self._given else own
        self._given.add(message_id)
        return message_id


def _guide_message(ids: _GuideIds, fields: dict[str, Any], created_at: datetime) -> NewMessage:
    role, content, metadata = fields["role"], fields["content"], fields.get("metadata") or {}
    # What is not as we keep it is kept beside it: no word is lost for its form.
    if not isinstance(metadata, dict):
        metadata = {"metadata": metadata}
    if role not in ROLES:
        role, metadata = "system", {**metadata, "role": role}
    if not isinstance(content, str):
        content = json_text(content)
    return NewMessage(
        message_id=ids.id_of(fields),
        role=role,
        content=content,
        created_at=_guide_time(fields.get("timestamp"), created_at),
        metadata=json_text(metadata),
    )


def _guide_time(text: object, otherwise: datetime) -> datetime:
    """A time as Python's isoformat wrote it; one without an offset is UTC."""
    if not isinstance(text, str):
        return otherwise
    moment = datetime.fromisoformat(text)
    # At the ends of the calendar an offset leads out of it.
    if not MINYEAR < moment.year < MAXYEAR:
        return otherwise
    return cut_to_milliseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))

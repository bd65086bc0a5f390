"""Sessions out of files, piece by piece, and what could not be read of them: by file, line and reason.

Nothing is guessed. What is not as the service would have taken it is reported, and the rest goes on.
"""

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import UUID

from app import strict_json
from app.archive import parquet
from app.chat import (
    CHAIN_START,
    ROLES,
    ChatSession,
    NewMessage,
    cut_to_milliseconds,
    is_plausible,
    json_text,
    next_chain,
)
from app.coherence.ports import Entry, GuideEntry, Piece
from app.errors import ArchiveRefused
from app.redis_sessions.codec import decode
from app.strict_json import NotStorable

#: A piece of a session that is longer: it is taken over in several, one after the other.
_PIECE_MESSAGES_MAX = 1000
_PIECE_BYTES_MAX = 4 * 2**20

#: A line, or one value of a backup. More is no session of ours.
_VALUE_BYTES_MAX = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is kept of a message and of a user's id, as the API has it."""

    content_bytes_max: int
    metadata_bytes_max: int
    metadata_levels_max: int
    user_id_characters_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What was left out, and why. `line` counts from 1: a line of text, a row of Parquet; None: all of the file."""

    path: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f':{self.line}'}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A piece of a session, and where it begins."""

    path: Path
    line: int
    piece: Piece


class _Flawed(Exception):
    """Why a value can't be taken."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a file; `fields` is the flaw where it is none."""

    line: int
    fields: dict[str, Any] | _Flawed


def pair_of(sessions: Path, messages: Path, bounds: Bounds) -> Iterator[Found | Problem]:
    """The sessions of a month, out of its two files. Memory does not grow with them."""
    groups = _Groups(messages, _rows(messages))
    last: UUID | None = None
    for row in _rows(sessions):
        try:
            fields = _fields(row)
            session, metadata = _session(fields, bounds)
            _follows(last, session.session_id)
        except _Flawed as flaw:
            yield Problem(path=sessions, line=row.line, reason=str(flaw))
            continue
        last = session.session_id
        yield from groups.before(session.session_id)
        yield from _pieces(sessions, row.line, session, metadata, groups, bounds)
    yield from groups.before(None)


def _follows(last: UUID | None, session_id: UUID) -> None:
    if last is not None and session_id <= last:
        raise _Flawed(f"session {session_id} does not follow {last}: the file is not in its order")


class _Groups:
    """The messages' file beside its sessions': rows come in the order of the session's id."""

    def __init__(self, path: Path, rows: Iterator[_Row]) -> None:
        self.path = path
        self._rows = rows
        self._next = next(rows, None)
        self._flaws: list[Problem] = []

    def of(self, session_id: UUID) -> Iterator[_Row]:
        while (row := self._next) is not None:
            its = _id_of(row)
            if its is not None and its != session_id:
                return
            self._next = next(self._rows, None)
            yield row

    def before(self, session_id: UUID | None) -> Iterator[Problem]:
        """Passes messages by whose session is not there, and names each session once."""
        named: UUID | None = None
        while (row := self._next) is not None:
            its = _id_of(row)
            if its is not None and session_id is not None and its >= session_id:
                return
            self._next = next(self._rows, None)
            if isinstance(row.fields, _Flawed):
                yield Problem(path=self.path, line=row.line, reason=str(row.fields))
            elif its is None:
                yield Problem(path=self.path, line=row.line, reason="session_id: should be a UUID")
            elif its != named:
                named = its
                yield Problem(
                    path=self.path,
                    line=row.line,
                    reason=f"session {its} has messages here, and no row that could be read",
                )


def _id_of(row: _Row) -> UUID | None:
    if isinstance(row.fields, _Flawed):
        return None
    try:
        return UUID(row.fields["session_id"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _pieces(
    path: Path, line: int, session: ChatSession, metadata: str, groups: _Groups, bounds: Bounds
) -> Iterator[Found | Problem]:
    """The session up to its first message that can't be taken: what follows that would leave a gap."""
    gathered, size, first_seq, chain = list[NewMessage](), 0, 1, CHAIN_START
    stopped_at: int | None = None

    def piece() -> Found:
        found = Piece(
            session=session, metadata=metadata, first_seq=first_seq, chain=chain, messages=tuple(gathered)
        )
        return Found(path=path, line=line, piece=found)

    for row in groups.of(session.session_id):
        seq = first_seq + len(gathered)
        if stopped_at is not None:
            if isinstance(row.fields, _Flawed):
                yield Problem(path=groups.path, line=row.line, reason=str(row.fields))
            continue
        try:
            message = _message(_fields(row), seq, bounds)
        except _Flawed as flaw:
            stopped_at = seq
            yield Problem(
                path=groups.path,
                line=row.line,
                reason=f"{flaw} (session {session.session_id} is taken up to the message before)",
            )
            continue
        if len(gathered) >= _PIECE_MESSAGES_MAX or size > _PIECE_BYTES_MAX:
            yield piece()
            chain = next_chain(chain, [one.message_id for one in gathered])
            first_seq, gathered, size = seq, [], 0
        gathered.append(message)
        size += len(message.content) + len(message.metadata)
    if gathered or first_seq == 1:
        yield piece()
    count = first_seq + len(gathered) - 1
    if stopped_at is None and count != session.message_count:
        yield Problem(
            path=path,
            line=line,
            reason=f"session {session.session_id} should have {session.message_count} messages, {count} are here",
        )


def _fields(row: _Row) -> dict[str, Any]:
    if isinstance(row.fields, _Flawed):
        raise row.fields
    return row.fields


# Rows of a file


def _rows(path: Path) -> Iterator[_Row]:
    """The rows; where the file breaks off, a last one that says so."""
    line = 0
    try:
        if path.suffix == ".parquet":
            for line, fields in enumerate(parquet.read_rows(path), 1):
                yield _Row(line, fields)
            return
        for line, text in _lines(path):
            yield _Row(line, _object(text))
    except ArchiveRefused as exc:
        yield _Row(line + 1, _Flawed(exc.detail))


def _object(text: bytes) -> dict[str, Any] | _Flawed:
    try:
        value = _strict(text)
    except _Flawed as flaw:
        return flaw
    return value if isinstance(value, dict) else _Flawed("should be a JSON object")


def opened(path: Path) -> BinaryIO:
    """A text file, unpacked where its name ends in .gz."""
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with opened(path) as file:
            line = 0
            while text := file.readline(_VALUE_BYTES_MAX):
                line += 1
                yield line, text
    except (OSError, EOFError, gzip.BadGzipFile) as exc:
        raise ArchiveRefused(f"the file breaks off here: {exc}") from exc


def _strict(text: bytes) -> Any:
    try:
        return strict_json.parse(text)
    except NotStorable as exc:
        raise _Flawed(str(exc)) from exc


# Values


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise _Flawed(f"{name}: should be a text, {'is missing' if value is None else f'is {_shown(value)}'}")
    if flaw := strict_json.text_flaw(value):
        raise _Flawed(f"{name}: {flaw}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."  # noqa: PLR2004 - enough to find it


def _uuid(fields: Mapping[str, Any], name: str) -> UUID:
    text = _text(fields, name)
    try:
        return UUID(text)
    except ValueError as exc:
        raise _Flawed(f"{name}: should be a UUID, is {_shown(text)}") from exc


def _whole(fields: Mapping[str, Any], name: str, *, least: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise _Flawed(f"{name}: should be a whole number from {least} on, is {_shown(value)}")
    return value


def _time(fields: Mapping[str, Any], name: str) -> datetime:
    value = fields.get(name)
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value or "")
        # The guide's own program writes times without an offset, and means UTC.
        moment = cut_to_milliseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError) as exc:
        raise _Flawed(
            f"{name}: should be a time such as 2025-11-14T10:30:00.123Z, is {_shown(value)}"
        ) from exc
    if not is_plausible(moment):
        raise _Flawed(f"{name}: should lie between the year 2000 and a day ahead, is {_shown(value)}")
    return moment


def _metadata(fields: Mapping[str, Any], bounds: Bounds) -> str:
    """Its text: as it is where it came as text (Parquet), else written as the API writes it."""
    value = fields.get("metadata")
    text = None
    if isinstance(value, str):
        text, value = value, _strict(value.encode(errors="surrogatepass"))
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise _Flawed(f"metadata: should be a JSON object, is {_shown(value)}")
    text = json_text(value) if text is None else text
    if (size := len(text.encode())) > bounds.metadata_bytes_max:
        raise _Flawed(f"metadata: has {size} bytes as JSON, at most {bounds.metadata_bytes_max} are kept")
    if (depth := strict_json.levels(value)) > bounds.metadata_levels_max:
        raise _Flawed(
            f"metadata: is nested {depth} levels deep, at most {bounds.metadata_levels_max} are kept"
        )
    return text


def _user_id(fields: Mapping[str, Any], bounds: Bounds) -> str:
    user_id = _text(fields, "user_id")
    if not 1 <= len(user_id) <= bounds.user_id_characters_max:
        raise _Flawed(
            f"user_id: has {len(user_id)} characters, should have 1 to {bounds.user_id_characters_max}"
        )
    return user_id


def _session(fields: Mapping[str, Any], bounds: Bounds) -> tuple[ChatSession, str]:
    created_at, last_activity = _time(fields, "created_at"), _time(fields, "last_activity")
    session = ChatSession(
        session_id=_uuid(fields, "session_id"),
        user_id=_user_id(fields, bounds),
        created_at=created_at,
        last_activity=last_activity,
        message_count=_whole(fields, "message_count", least=0),
    )
    return session, _metadata(fields, bounds)


_DIGEST = re.compile(r"(?:[0-9a-f]{2}){1,64}")


def _message(fields: Mapping[str, Any], seq: int, bounds: Bounds) -> NewMessage:
    if (its := _whole(fields, "seq", least=1)) != seq:
        raise _Flawed(f"seq: is {its}, {seq} should follow here")
    role, content = _role_and_content(fields, bounds)
    digest, size = fields.get("request_digest"), None
    if digest is not None:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _Flawed(f"request_digest: should be hex digits, is {_shown(digest)}")
        size = _whole(fields, "request_size", least=1)
    return NewMessage(
        message_id=_uuid(fields, "message_id"),
        role=role,
        content=content,
        created_at=_time(fields, "created_at"),
        metadata=_metadata(fields, bounds),
        request_digest=digest,
        request_size=size,
    )


def _role_and_content(fields: Mapping[str, Any], bounds: Bounds) -> tuple[Any, str]:
    role, content = _text(fields, "role"), _text(fields, "content")
    if role not in ROLES:
        raise _Flawed(f"role: should be one of {', '.join(ROLES)}, is {_shown(role)}")
    if (size := len(content.encode())) > bounds.content_bytes_max:
        raise _Flawed(f"content: has {size} bytes, at most {bounds.content_bytes_max} are kept")
    return role, content


# The guide's backup


def backup(path: Path, bounds: Bounds) -> Iterator[Found | Problem]:
    """The sessions of a `sessions_backup.json`: values of `GET`, one after the other, each on a line or on many.

    The session's id stands inside of the value. Values of ours (`_c`) are taken as well, where they begin with the
    session's first message.
    """
    line = 0
    try:
        for line, text in _values(path):
            try:
                yield Found(path=path, line=line, piece=_backed_up(text, bounds))
            except _Flawed as flaw:
                yield Problem(path=path, line=line, reason=str(flaw))
    except ArchiveRefused as exc:
        yield Problem(path=path, line=line + 1, reason=exc.detail)


#: How a value begins, where the one before it has no end: pretty-printed, the guide's, ours.
_BEGINS = re.compile(rb'\{\s*$|\{"(?:session_id|user_id|_c)"')


def _values(path: Path) -> Iterator[tuple[int, bytes]]:
    """The values with the lines that they begin on. An empty line stands between two, never inside of one."""
    began, gathered, size = 0, list[bytes](), 0
    for line, text in _lines(path):
        blank = not text.strip()
        if gathered and (blank or _BEGINS.match(text)):
            yield began, b"".join(gathered)
            gathered, size = [], 0
        if blank:
            continue
        if not gathered:
            began = line
        gathered.append(text)
        size += len(text)
        ends = text.rstrip()
        # The last line of a value: alone on it, pretty-printed, or of ours.
        alone = len(gathered) == 1 and not (ends == b"{" or ends.startswith(b'{"_c"'))
        if alone or ends == b"}" or ends.endswith(b"]}") or size > _VALUE_BYTES_MAX:
            yield began, b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield began, b"".join(gathered)


def _backed_up(text: bytes, bounds: Bounds) -> Piece:
    value = _strict(text)
    if not isinstance(value, dict):
        raise _Flawed(f"should be a session as `GET session:...` answers it, is {_shown(value)}")
    session_id = _uuid(value, "session_id")
    user_id = _user_id(value, bounds)
    created_at, last_activity = _time(value, "created_at"), _time(value, "last_activity")
    messages = value.get("messages")
    if not isinstance(messages, list):
        raise _Flawed("messages: should be a list")
    for index, message in enumerate(messages):
        _check(message, index, bounds)
    decoded = decode(text.strip(), session_id)
    if not isinstance(decoded, Entry | GuideEntry):
        raise _Flawed("can't be read as a session of Redis")
    return Piece(
        session=ChatSession(
            session_id=session_id,
            user_id=user_id,
            created_at=created_at,
            last_activity=last_activity,
            message_count=len(messages),
        ),
        metadata="{}",
        first_seq=1,
        chain=CHAIN_START,
        messages=tuple(decoded.messages),
    )


def _check(message: object, index: int, bounds: Bounds) -> None:
    try:
        _check_message(message, index + 1, bounds)
    except _Flawed as flaw:
        raise _Flawed(f"messages.{index}.{flaw}") from flaw


def _check_message(message: object, seq: int, bounds: Bounds) -> None:
    if not isinstance(message, dict):
        raise _Flawed(f"should be an object, is {_shown(message)}")
    _role_and_content(message, bounds)
    _time(message, "timestamp")
    if isinstance(message.get("metadata"), str):
        raise _Flawed("metadata: should be a JSON object, is a text")
    _metadata(message, bounds)
    # Ours count: a window that has lost its oldest messages is not the session.
    if message.get("seq", seq) != seq:
        raise _Flawed(f"seq: is {_shown(message['seq'])}, {seq} should stand here: older ones are missing")

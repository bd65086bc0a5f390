"""Chats as the product would have written them, as rows of PostgreSQL's binary COPY.

A `Plan` says how many, its `Section`s are what is generated and copied in one go. The same plan gives the same bytes,
in whatever process a section is generated. What holds for the product's rows holds for these: the seq counts from 1,
`message_count` and `chain` are those of the messages (`app.chat.next_chain`), ids are UUIDv7s of the moments that
the rows name, and what analytics asks of an answer stands in its columns and in its metadata.

Realistic: users are drawn by Zipf's law, lengths of sessions and of messages are log-normal, sessions begin mostly
in working hours and more and more often, and messages of sessions that overlap lie among each other.
"""

import random
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from itertools import accumulate, pairwise
from uuid import UUID

from app.chat import CHAIN_START, json_text, next_chain, session_month
from benchmarks.growth.texts import Language, languages, sources

SESSION_COLUMNS = ("session_id", "user_id", "created_at", "last_activity", "message_count", "chain")
MESSAGE_COLUMNS = (
    *("session_id", "session_month", "seq", "message_id", "role", "content", "created_at"),
    *("processing_time_ms", "source_count", "metadata"),
)

#: What begins and ends a binary COPY: no flags, no extension.
COPY_BEGIN = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_END = b"\xff\xff"

SECTION_MESSAGES = 50_000
#: Sessions whose messages are put in the order of their times: about as many as are under way in an hour or more.
_PIECE_MESSAGES = 10_000

_DAY_MS = 86_400_000
_POSTGRES_EPOCH_MS = 946_684_800_000
_POSTGRES_DAY_ZERO = date(2000, 1, 1)

_SESSIONS_OF_USER = 10
_ZIPF_EXPONENT = 0.8
_SESSION_SIGMA = 1.0
#: Below 1: more sessions begin in later months.
_GROWTH_EXPONENT = 0.8
#: Which part of a day's sessions has begun when which part of the day (UTC) has passed: 8 to 18 h in Vietnam.
_HOURS = ((0.0, 0.0), (0.05, 1 / 24), (0.85, 11 / 24), (1.0, 1.0))

_VIETNAMESE_SHARE = 0.8
_PLAIN_ANSWER_SHARE = 0.1
_DRAWN = 4_096

_SESSION_HEAD = struct.Struct(">hi16si")
_SESSION_TAIL = struct.Struct(">iqiqiii8s")
_MESSAGE_HEAD = struct.Struct(">hi16siiiii16s")
_LENGTH = struct.Struct(">i")
_TIME = struct.Struct(">iq")
_FACTS = struct.Struct(">iiih")
_NO_FACTS = struct.pack(">ii", -1, -1)
_NULL_FACTS_AND_METADATA = _NO_FACTS + struct.pack(">i2s", 2, b"{}")
_USER = struct.pack(">i4s", 4, b"user")
_ASSISTANT = struct.pack(">i9s", 9, b"assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """So many messages in so many sessions, in the `months` before `until`."""

    messages: int
    sessions: int
    seed: int = 1
    months: int = 24
    until: datetime

    def __post_init__(self) -> None:
        if not 0 < self.sessions <= self.messages:
            raise ValueError(f"{self.messages} messages can't be in {self.sessions} sessions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Sessions of one month, by when they begin, in milliseconds since 1970. `key` is what is drawn from."""

    key: str
    month: date
    begins_ms: "array[int]"
    counts: "array[int]"
    until_ms: int
    users: int = 1
    user_id: str | None = None

    @property
    def messages(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of both tables, without the begin and the end of a COPY."""

    sessions: bytes
    messages: bytes


def sections_of(plan: Plan) -> list[Section]:
    """Everything of the plan, oldest first."""
    rnd = random.Random(f"{plan.seed}")
    counts = _counts(rnd, plan.messages, plan.sessions)
    until_ms = round(plan.until.timestamp() * 1000)
    begins_ms = _begins(rnd, plan.sessions, _months_before(plan.until, plan.months), until_ms)
    users = max(1, plan.sessions // _SESSIONS_OF_USER)
    return list(_sections(f"{plan.seed}", begins_ms, counts, until_ms, users=users))


def sections_of_user(
    user_id: str, counts: "array[int]", begins_ms: "array[int]", until_ms: int
) -> list[Section]:
    """Sessions that are all one user's, with these numbers of messages. `begins_ms` must ascend."""
    return list(_sections(user_id, begins_ms, counts, until_ms, user_id=user_id))


def pieces_of(section: Section) -> Iterator[Piece]:
    """The rows of the section, some sessions at a time."""
    rnd = random.Random(section.key)
    if section.user_id is None:
        ranks = rnd.choices(range(section.users), cum_weights=_zipf(section.users), k=len(section.counts))
        user_ids = [f"user{rank + 1:06}" for rank in ranks]
    else:
        user_ids = [section.user_id] * len(section.counts)
    sessions: list[bytes] = []
    messages: list[tuple[int, bytes]] = []
    for begin_ms, count, user_id in zip(section.begins_ms, section.counts, user_ids, strict=True):
        sessions.append(_session(rnd, begin_ms, count, user_id, section.until_ms, messages))
        if len(messages) >= _PIECE_MESSAGES:
            yield _piece(sessions, messages)
            sessions, messages = [], []
    if sessions:
        yield _piece(sessions, messages)


def _piece(sessions: list[bytes], messages: list[tuple[int, bytes]]) -> Piece:
    messages.sort(key=lambda row: row[0])
    return Piece(sessions=b"".join(sessions), messages=b"".join(row for _, row in messages))


def _session(
    rnd: random.Random, begin_ms: int, count: int, user_id: str, until_ms: int, rows: list[tuple[int, bytes]]
) -> bytes:
    """Adds the messages of one session to `rows`, and returns its own row."""
    draw, bits, drawn = rnd.random, rnd.getrandbits, _drawn()
    language = languages()[draw() > _VIETNAMESE_SHARE]
    session_id = _uuid7(begin_ms, bits(74))
    head = session_id.bytes
    day = (session_month(session_id) - _POSTGRES_DAY_ZERO).days
    ids: list[UUID] = []
    now = begin_ms
    for seq in range(1, count + 1):
        if seq % 2:
            now = min(until_ms, now + drawn.pauses_ms[int(draw() * _DRAWN)])
            rest = _question(language, draw(), now)
        else:
            elapsed_ms = drawn.elapsed_ms[int(draw() * _DRAWN)]
            now = min(until_ms, now + elapsed_ms)
            rest = _answer(language, draw(), draw(), now, elapsed_ms)
        message_id = _uuid7(now, bits(74))
        ids.append(message_id)
        rows.append((now, _MESSAGE_HEAD.pack(10, 16, head, 4, day, 4, seq, 16, message_id.bytes) + rest))
    user = user_id.encode()
    return (
        _SESSION_HEAD.pack(6, 16, head, len(user))
        + user
        + _SESSION_TAIL.pack(8, _us(begin_ms), 8, _us(now), 4, count, 8, next_chain(CHAIN_START, ids))
    )


def _question(language: Language, draw: float, now: int) -> bytes:
    content = language.questions[int(draw * len(language.questions))]
    return b"".join(
        (_USER, _LENGTH.pack(len(content)), content, _TIME.pack(8, _us(now)), _NULL_FACTS_AND_METADATA)
    )


def _answer(language: Language, draw: float, draw_sources: float, now: int, elapsed_ms: int) -> bytes:
    content = language.answers[int(draw * len(language.answers))]
    head = (_ASSISTANT, _LENGTH.pack(len(content)), content, _TIME.pack(8, _us(now)))
    if draw_sources < _PLAIN_ANSWER_SHARE:
        return b"".join((*head, _NULL_FACTS_AND_METADATA))
    cited = _drawn().cited
    source_count, text = cited[int(draw_sources * len(cited))]
    metadata = b"%b%d}" % (text, elapsed_ms)
    return b"".join(
        (*head, _FACTS.pack(4, elapsed_ms, 2, source_count), _LENGTH.pack(len(metadata)), metadata)
    )


def _uuid7(milliseconds: int, bits: int) -> UUID:
    return UUID(int=milliseconds << 80 | 0x7 << 76 | (bits >> 62) << 64 | 0b10 << 62 | bits & (1 << 62) - 1)


def _us(milliseconds: int) -> int:
    return (milliseconds - _POSTGRES_EPOCH_MS) * 1000


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Drawn once: before a question, how long until an answer, and the beginnings of metadata by their sources."""

    pauses_ms: list[int]
    elapsed_ms: list[int]
    cited: list[tuple[int, bytes]]


@lru_cache(maxsize=1)
def _drawn() -> _Drawn:
    rnd = random.Random("drawn")
    named = sources()
    weights = _zipf(len(named))
    cited = []
    for _ in range(_DRAWN):
        # A document once each, in the order in which they were drawn.
        its = list(dict.fromkeys(rnd.choices(named, cum_weights=weights, k=rnd.randint(0, 5))))
        metadata = json_text({"sources": its, "processing_time_ms": 0})
        cited.append((len(its), metadata.removesuffix("0}").encode()))
    return _Drawn(
        pauses_ms=[round(45_000 * rnd.lognormvariate(0, 1)) + 500 for _ in range(_DRAWN)],
        elapsed_ms=[round(1_400 * rnd.lognormvariate(0, 0.6)) + 80 for _ in range(_DRAWN)],
        cited=cited,
    )


@lru_cache(maxsize=4)
def _zipf(count: int) -> list[float]:
    """Cumulative weights of ranks."""
    return list(accumulate((rank + 1) ** -_ZIPF_EXPONENT for rank in range(count)))


def _counts(rnd: random.Random, messages: int, sessions: int) -> "array[int]":
    """Log-normal, none empty, and exactly `messages` in all."""
    weights = list(accumulate(rnd.lognormvariate(0, _SESSION_SIGMA) for _ in range(sessions)))
    least = min(2, messages // sessions)
    shared = messages - least * sessions
    ends = [round(weight * shared / weights[-1]) for weight in weights]
    return array("I", (least + end - before for before, end in zip([0, *ends], ends, strict=False)))


def _begins(rnd: random.Random, sessions: int, begin_ms: int, until_ms: int) -> "array[int]":
    """When sessions begin, ascending."""
    begins = array("q")
    for index in range(sessions):
        part = ((index + rnd.random()) / sessions) ** _GROWTH_EXPONENT
        day, of_day = divmod(begin_ms + part * (until_ms - begin_ms), _DAY_MS)
        begins.append(min(until_ms, int(day * _DAY_MS + _hour(of_day / _DAY_MS) * _DAY_MS)))
    return begins


def _hour(part: float) -> float:
    for (part_from, hour_from), (part_to, hour_to) in pairwise(_HOURS):
        if part <= part_to:
            return hour_from + (part - part_from) / (part_to - part_from) * (hour_to - hour_from)
    return 1.0


def _months_before(moment: datetime, months: int) -> int:
    years, month = divmod(moment.year * 12 + moment.month - 1 - months, 12)
    return round(datetime(years, month + 1, 1, tzinfo=UTC).timestamp() * 1000)


def _sections(
    key: str,
    begins_ms: "array[int]",
    counts: "array[int]",
    until_ms: int,
    *,
    users: int = 1,
    user_id: str | None = None,
) -> Iterator[Section]:
    first, messages, month = 0, 0, _month(begins_ms[0])

    def section(end: int) -> Section:
        return Section(
            key=f"{key} {first}",
            month=month,
            begins_ms=begins_ms[first:end],
            counts=counts[first:end],
            until_ms=until_ms,
            users=users,
            user_id=user_id,
        )

    for index, (begin_ms, count) in enumerate(zip(begins_ms, counts, strict=True)):
        if messages >= SECTION_MESSAGES or _month(begin_ms) != month:
            yield section(index)
            first, messages, month = index, 0, _month(begin_ms)
        messages += count
    yield section(len(counts))


def _month(milliseconds: int) -> date:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).date().replace(day=1)

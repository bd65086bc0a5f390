"""Every number of every report, as plain Python counts it over one random history."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from app.analytics.reports import REPORTS, run
from app.analytics.rollups import Rollups
from app.postgres.cache_state import claim_state
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from tests.databases import migrate, new_database
from tests.factories import new_message
from tests.integration.test_rollups import count_all
from tests.servers import Servers

pytestmark = pytest.mark.anyio

ZONE = ZoneInfo("Asia/Ho_Chi_Minh")

#: From a Wednesday on, over the end of a month; the history is wider on both sides.
FIRST, END = date(2026, 2, 18), date(2026, 3, 25)
DAYS = [FIRST + timedelta(days=ahead) for ahead in range((END - FIRST).days)]
#: For what is read from the messages themselves.
LAST_WEEK = END - timedelta(days=7)

Rows = Iterable[tuple[Any, ...]]


@dataclass(frozen=True)
class Line:
    role: str
    at: datetime
    text: str
    metadata: dict[str, Any]

    @property
    def day(self) -> date:
        return self.at.astimezone(ZONE).date()

    @property
    def sources(self) -> list[str] | None:
        return self.metadata.get("sources")

    @property
    def ms(self) -> int | None:
        return self.metadata.get("processing_time_ms")

    @property
    def is_fallback(self) -> bool:
        return self.sources == [] or self.metadata.get("fallback") is True


@dataclass(frozen=True)
class Session:
    session_id: UUID
    user: str
    created_at: datetime
    lines: tuple[Line, ...]

    @property
    def day(self) -> date:
        return self.created_at.astimezone(ZONE).date()

    @property
    def turns(self) -> int:
        return sum(line.role == "user" for line in self.lines)

    @property
    def is_abandoned(self) -> bool:
        return self.lines[-1].role == "user"

    @property
    def duration_ms(self) -> int:
        moments = [line.at for line in self.lines]
        return (max(moments) - min(moments)) // timedelta(milliseconds=1)

    @property
    def first_response_ms(self) -> int | None:
        asked = next((place for place, line in enumerate(self.lines) if line.role == "user"), None)
        if asked is None:
            return None
        answer = next((line for line in self.lines[asked:] if line.role == "assistant"), None)
        if answer is None:
            return None
        return max(0, (answer.at - self.lines[asked].at) // timedelta(milliseconds=1))


class History:
    """What was written, asked by days of the zone."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.all = sessions

    def sessions(self, days: Iterable[date] = DAYS) -> list[Session]:
        wanted = set(days)
        return [one for one in self.all if one.day in wanted]

    def lines(self, days: Iterable[date] = DAYS, role: str | None = None) -> list[Line]:
        wanted = set(days)
        return [
            line for one in self.all for line in one.lines if line.day in wanted and role in {None, line.role}
        ]

    def turns(self, days: Iterable[date] = DAYS) -> Iterator[tuple[Session, Line, Line | None]]:
        """Each question with the answer that is the very next message."""
        wanted = set(days)
        for one in self.all:
            for line, after in pairwise((*one.lines, None)):
                if line is not None and line.role == "user" and line.day in wanted:
                    yield one, line, after if after and after.role == "assistant" else None

    def writers(self, days: Iterable[date]) -> set[str]:
        wanted = set(days)
        return {
            one.user for one in self.all for line in one.lines if line.role == "user" and line.day in wanted
        }

    def took(self, days: Iterable[date] = DAYS) -> list[int]:
        return [line.ms for line in self.lines(days, "assistant") if line.ms is not None]

    def unanswered(self, days: Iterable[date] = DAYS) -> int:
        return sum(answer is None for _, _, answer in self.turns(days))

    def is_repeat(self, session: Session) -> bool:
        return any(
            one.user == session.user
            and session.created_at - timedelta(days=1) < one.created_at < session.created_at
            for one in self.all
        )

    def first_writing(self, user: str) -> date:
        return min(
            line.day for one in self.all if one.user == user for line in one.lines if line.role == "user"
        )


def ratio(part: float, whole: float) -> Any:
    return pytest.approx(part / whole, rel=1e-9) if whole else None


def mean(values: Sequence[float]) -> Any:
    return ratio(sum(values), len(values))


def quantiles(values: Sequence[int], shares: Sequence[float], error: float = 0.025) -> list[Any]:
    """Of each share, the value that so many do not exceed."""
    ordered = sorted(values)
    return [
        pytest.approx(ordered[math.ceil(share * len(ordered)) - 1], rel=error, abs=1e-9) for share in shares
    ]


FIVE = (0.5, 0.75, 0.9, 0.95, 0.99)


def begin(day: date, step: str) -> date:
    if step == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if step == "month" else day


def before(period: date, step: str) -> date:
    return begin(period - timedelta(days=1), step)


def by_period(step: str, days: Iterable[date] = DAYS) -> dict[date, list[date]]:
    periods: dict[date, list[date]] = defaultdict(list)
    for day in days:
        periods[begin(day, step)].append(day)
    return periods


# By name: what the rows are. `step` is the length of a period.


def summary(history: History, _step: str) -> Rows:
    spans = DAYS, [day - (END - FIRST) for day in DAYS]

    def figures(days: list[date]) -> dict[str, Any]:
        return {
            "sessions": len(history.sessions(days)),
            "active_users": len(history.writers(days)),
            "messages": len(history.lines(days)),
            "response_time_p95_ms": quantiles(history.took(days), [0.95])[0],
            "unanswered_rate": history.unanswered(days) / len(list(history.turns(days))),
        }

    now, then = map(figures, spans)
    for name in now:
        if name == "response_time_p95_ms":
            yield (
                name,
                now[name],
                then[name],
                pytest.approx(now[name].expected / then[name].expected - 1, abs=0.06),
            )
        else:
            yield (
                name,
                pytest.approx(now[name]),
                pytest.approx(then[name]),
                pytest.approx(now[name] / then[name] - 1),
            )


def sessions_per_day(history: History, _step: str) -> Rows:
    return ((day, len(history.sessions([day]))) for day in DAYS)


def traffic(history: History, step: str) -> Rows:
    for period, days in by_period(step).items():
        lines = history.lines(days)
        roles = Counter(line.role for line in lines)
        yield period, len(history.sessions(days)), len(lines), roles["user"], roles["assistant"]


def traffic_heatmap(history: History, _step: str) -> Rows:
    created, written = (
        Counter((at.astimezone(ZONE).isoweekday(), at.astimezone(ZONE).hour) for at in moments)
        for moments in (
            [one.created_at for one in history.sessions()],
            [line.at for line in history.lines()],
        )
    )
    return ((*place, created[place], written[place]) for place in sorted(created | written))


def messages_by_role(history: History, _step: str) -> Rows:
    roles = Counter(line.role for line in history.lines())
    ordered = sorted(roles.items(), key=lambda item: (-item[1], item[0]))
    return ((role, count, ratio(100 * count, roles.total())) for role, count in ordered)


def response_time(history: History, _step: str) -> Rows:
    took = history.took()
    answers = len(history.lines(role="assistant"))
    return [(answers, len(took), mean(took), *quantiles(took, (0.5, 0.95)))]


def response_time_percentiles(history: History, step: str) -> Rows:
    for period, days in by_period(step).items():
        if took := history.took(days):
            yield period, len(took), *quantiles(took, FIVE)


def response_time_histogram(history: History, _step: str) -> Rows:
    buckets = Counter(math.floor(math.log(ms, 1.05)) if ms else -1 for ms in history.took())
    for bucket, answers in sorted(buckets.items()):
        yield pytest.approx(1.05 ** (bucket + 0.5) if bucket >= 0 else 0), answers


def unanswered_rate(history: History, step: str) -> Rows:
    for period, days in by_period(step).items():
        asked, answers = len(list(history.turns(days))), history.lines(days, "assistant")
        unanswered, fallbacks = history.unanswered(days), sum(line.is_fallback for line in answers)
        if asked or answers:
            yield (
                *(period, asked, unanswered, ratio(unanswered, asked)),
                *(len(answers), fallbacks, ratio(fallbacks, len(answers))),
            )


def session_outcomes(history: History, step: str) -> Rows:
    for period, days in by_period(step).items():
        if sessions := history.sessions(days):
            counts = (
                sum(one.turns > 0 for one in sessions),
                sum(one.turns == 1 for one in sessions),
                sum(one.is_abandoned for one in sessions),
                sum(history.is_repeat(one) for one in sessions),
            )
            yield period, len(sessions), counts[0], *(ratio(count, len(sessions)) for count in counts)


def measured(measure: Callable[[Session], int | None], *, error: float) -> Callable[[History, str], Rows]:
    def rows(history: History, _step: str) -> Rows:
        values = [value for one in history.sessions() if (value := measure(one)) is not None]
        return [(len(values), mean(values), *quantiles(values, FIVE, error))]

    return rows


def drop_off(history: History, _step: str) -> Rows:
    sessions = history.sessions()
    for turns in sorted({one.turns for one in sessions}):
        reach = sum(one.turns >= turns for one in sessions)
        left = sum(one.turns == turns and one.is_abandoned for one in sessions)
        yield turns, reach, ratio(reach, len(sessions)), left


def active_users(history: History, _step: str) -> Rows:
    for day in DAYS:
        yield (
            day,
            *(
                len(history.writers(day - timedelta(days=back) for back in range(width)))
                for width in (1, 7, 28)
            ),
        )


def stickiness(history: History, step: str) -> Rows:
    return ((day, dau, mau, ratio(dau, mau)) for day, dau, _, mau in active_users(history, step) if mau)


def new_users(history: History, step: str) -> Rows:
    year = by_period(step, (date(2026, 1, 1) + timedelta(days=ahead) for ahead in range(365)))
    for period, days in year.items():
        if FIRST <= period < END:
            users = history.writers(days)
            earlier = history.writers(year.get(before(period, step), []))
            new = {user for user in users if history.first_writing(user) >= period}
            if users | earlier:
                yield (
                    *(period, len(users), len(new), len(users & earlier)),
                    *(len(users - new - earlier), len(earlier - users)),
                )


def sessions_per_user(history: History, _step: str) -> Rows:
    sessions, users = len(history.sessions()), len(history.writers(DAYS))
    return [(sessions, users, ratio(sessions, users))]


def retention(history: History, _step: str) -> Rows:
    cohorts: dict[date, set[str]] = defaultdict(set)
    for one in history.all:
        if one.turns:
            cohorts[begin(history.first_writing(one.user), "week")].add(one.user)
    for week, users in sorted(cohorts.items()):
        for later in range(20):
            days = (week + timedelta(days=7 * later + ahead) for ahead in range(7))
            if (stayed := users & history.writers(days)) and FIRST <= week < END:
                yield week, later, len(users), len(stayed), ratio(len(stayed), len(users))


def citations(history: History, days: Iterable[date]) -> list[tuple[str, UUID, date]]:
    wanted = set(days)
    return [
        (source, one.session_id, line.day)
        for one in history.all
        for line in one.lines
        if line.role == "assistant" and line.day in wanted
        for source in set(line.sources or ())
    ]


def top_sources(history: History, _step: str) -> Rows:
    cited = citations(history, DAYS)
    counts = Counter(source for source, _, _ in cited)
    for source, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield source, count, len({session for its, session, _ in cited if its == source})


def uncited_sources(history: History, _step: str) -> Rows:
    earlier = citations(history, (FIRST - timedelta(days=back) for back in range(1, 200)))
    counts = Counter(source for source, _, _ in earlier)
    for source, _, _ in citations(history, DAYS):
        counts.pop(source, None)
    for source, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield source, max(day for its, _, day in earlier if its == source), count


def sources_per_answer(history: History, step: str) -> Rows:
    for period, days in by_period(step).items():
        listed = [line for line in history.lines(days, "assistant") if line.sources is not None]
        if listed:
            cited = sum(len(set(line.sources or ())) for line in listed)
            sourced = sum(bool(line.sources) for line in listed)
            yield period, len(listed), ratio(cited, len(listed)), ratio(sourced, len(listed))


def longest_sessions(history: History, _step: str) -> Rows:
    for one in sorted(history.sessions(), key=lambda one: (-len(one.lines), one.session_id))[:50]:
        yield (
            *(one.session_id, one.user, one.created_at),
            *(len(one.lines), one.turns, one.duration_ms),
        )


def slowest_sessions(history: History, _step: str) -> Rows:
    timed = [
        (max(took), one)
        for one in history.sessions()
        if (took := [line.ms for line in one.lines if line.role == "assistant" and line.ms is not None])
    ]
    for ms, one in sorted(timed, key=lambda item: (-item[0], item[1].session_id))[:50]:
        yield one.session_id, one.user, one.created_at, ms


def words(text: str) -> str:
    return {"Học phí?": "hoc phi", "HỌC  PHÍ!": "hoc phi", "Học phí là gì?": "hoc phi la gi"}.get(
        text, {"học bổng": "hoc bong"}.get(text, text)
    )


def asked(history: History, *, unanswered: bool) -> Rows:
    week = [day for day in DAYS if day >= LAST_WEEK]
    spellings: dict[str, list[tuple[str, Session, Line]]] = defaultdict(list)
    for session, question, answer in history.turns(week):
        if not unanswered or answer is None or answer.is_fallback:
            spellings[words(question.text)].append((question.text, session, question))
    for _, same in sorted(spellings.items(), key=lambda item: (-len(item[1]), item[0])):
        counts = Counter(text for text, _, _ in same)
        yield (
            min(counts, key=lambda text: (-counts[text], text.encode())),
            len(same),
            max(line.at for _, _, line in same),
            max(str(session.session_id) for _, session, _ in same),
        )


NUMBERS: dict[str, Callable[[History, str], Rows]] = {
    "summary": summary,
    "sessions_per_day": sessions_per_day,
    "traffic": traffic,
    "traffic_heatmap": traffic_heatmap,
    "messages_by_role": messages_by_role,
    "response_time": response_time,
    "response_time_percentiles": response_time_percentiles,
    "response_time_histogram": response_time_histogram,
    "unanswered_rate": unanswered_rate,
    "session_outcomes": session_outcomes,
    "session_duration": measured(lambda one: one.duration_ms, error=0.025),
    "first_response_time": measured(lambda one: one.first_response_ms, error=0.025),
    "turns_per_session": measured(lambda one: one.turns, error=0),
    "messages_per_session": measured(lambda one: len(one.lines), error=0),
    "drop_off": drop_off,
    "active_users": active_users,
    "stickiness": stickiness,
    "new_users": new_users,
    "sessions_per_user": sessions_per_user,
    "retention": retention,
    "top_sources": top_sources,
    "uncited_sources": uncited_sources,
    "top_questions": lambda history, _: asked(history, unanswered=False),
    "unanswered_questions": lambda history, _: asked(history, unanswered=True),
    "sources_per_answer": sources_per_answer,
    "longest_sessions": longest_sessions,
    "slowest_sessions": slowest_sessions,
}


def random_line(numbers: random.Random, at: datetime) -> Line:
    role = numbers.choice(["user", "user", "user", "assistant", "assistant", "assistant", "system", "tool"])
    metadata: dict[str, Any] = {}
    if numbers.random() < 0.8:
        # A source of the first weeks is cited no more.
        known = ["a", "b", "c", "đ"] + [f"old {n}" for n in range(4)] * (
            at < datetime(2026, 2, 10, tzinfo=UTC)
        )
        metadata = {"sources": numbers.choices(known, k=numbers.randrange(4))}
    if numbers.random() < 0.8:
        metadata["processing_time_ms"] = int(numbers.lognormvariate(6, 2))
    if numbers.random() < 0.2:
        metadata["fallback"] = numbers.choice([True, True, False, "true"])
    text = numbers.choice(["Học phí?", "hoc phi", "HỌC  PHÍ!", "học bổng", "…", "Học phí là gì?"])
    return Line(role, at, text, metadata)


@pytest.fixture(scope="module")
async def database(servers: Servers, anyio_backend: str) -> AsyncIterator[Database]:
    """Of this module: what is in it is written once."""
    async with new_database(servers, "chat_numbers") as url:
        await migrate(url)
        database = Database(create_engine(url, application_name="tests"))
        await claim_state(database, redis_only=None)
        yield database
        await database.close()


@pytest.fixture(scope="module")
async def history(database: Database) -> History:
    """Three months of some twenty users, with clocks that disagree and sessions that last over midnight."""
    numbers = random.Random(8)
    store = PostgresChatSessionStore(database, ttl_seconds=3600)
    written = []
    for number in range(300):
        # Every other one over the range's edges, where a day too many or too few shows.
        first, days = [(date(2026, 1, 10), 95), (FIRST - timedelta(days=2), 3), (LAST_WEEK, 1), (END, 1)][
            numbers.choice([1, 2, 3]) * (number % 2)
        ]
        began = datetime(*first.timetuple()[:3], tzinfo=UTC) - timedelta(days=1)
        began += timedelta(seconds=numbers.randrange((days + 1) * 86_400))
        lines = tuple(
            random_line(
                numbers, began + timedelta(minutes=numbers.choice([0, 1, 7, 60, 1500]), milliseconds=place)
            )
            for place in range(numbers.randrange(1, 9))
        )
        # New ones come all the time.
        user = f"user {began.timetuple().tm_yday // 7 + int(numbers.triangular(0, 9, 0))}"
        session = (await store.create_session(user)).session.session_id
        messages = tuple(
            new_message(line.text, role=line.role, created_at=line.at, metadata=line.metadata)
            for line in lines
        )
        await store.append(Append(session_id=session, messages=messages))
        async with database.connection() as conn:
            await conn.execute(
                "UPDATE chat.chat_sessions SET created_at = $2 WHERE session_id = $1", session, began
            )
        written.append(Session(session, user, began, lines))
    await count_all(Rollups(database, timezone="Asia/Ho_Chi_Minh"))
    return History(written)


def test_every_report_is_here() -> None:
    assert set(NUMBERS) == set(REPORTS)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        (name, step)
        for name, one in REPORTS.items()
        for step in ("day", "week", "month")[: 3 if one.by_period else 1]
    ],
)
async def test_a_report_has_the_numbers_of_the_messages(
    database: Database, history: History, name: str, step: str
) -> None:
    expected = tuple(NUMBERS[name](history, step))

    since, source = (LAST_WEEK, "messages") if REPORTS[name].folded else (FIRST, "roll-ups")

    found = await run(database, name, since=since, until=END, granularity=step, limit=1000)

    assert found.rows == expected
    assert found.source == source
    assert found.rows

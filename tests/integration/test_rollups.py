"""Roll-ups are what the plain queries over all messages would have found: after any history, whoever wrote it."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.analytics import rollups
from app.analytics.rollups import Rollups
from app.chat import ChatSession, NewMessage, Role, new_uuid, utc_now
from app.coherence.ports import RowBusy
from app.errors import DurableStoreUnavailable, SessionNotFound, StartRefused
from app.postgres.cache_state import claim_state
from app.postgres.engine import Database, create_engine
from app.postgres.partitions import make_partitions
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from tests.databases import empty
from tests.factories import new_message

pytestmark = pytest.mark.anyio

# Each view over roll-ups as a plain query over all sessions and messages. $1 is the time zone.

_SAID = r"CASE WHEN strpos(replace(m.metadata::text, '\\', ''), '\u0000') = 0 THEN m.metadata::jsonb END"

_CITED = f"""
SELECT DISTINCT m.session_id, m.seq, m.created_at, (m.created_at AT TIME ZONE $1)::date AS day, source #>> '{{}}' AS source
FROM chat.chat_messages m
CROSS JOIN LATERAL jsonb_path_query({_SAID}, 'strict $.sources[*] ? (@.type() == "string")', silent => true) source
WHERE m.role = 'assistant' AND m.source_count > 0
"""


def _times(bucket: str) -> str:
    return f"""
    WITH cited AS ({_CITED}), parts AS (
        SELECT created_at AS at, 1 AS sessions, 0 AS users, 0 AS answers, 0 AS others, 0 AS answered, 0 AS timed,
               0 AS ms, 0 AS listed, 0 AS unsourced, 0 AS fallback, 0 AS citations
        FROM chat.chat_sessions
        UNION ALL
        SELECT m.created_at, 0, (role = 'user')::int, (role = 'assistant')::int,
               (role NOT IN ('user', 'assistant'))::int,
               (role = 'user' AND EXISTS (SELECT FROM chat.chat_messages a WHERE a.session_id = m.session_id
                                          AND a.seq = m.seq + 1 AND a.role = 'assistant'))::int,
               (role = 'assistant' AND processing_time_ms IS NOT NULL)::int,
               CASE role WHEN 'assistant' THEN coalesce(processing_time_ms, 0) ELSE 0 END,
               (role = 'assistant' AND source_count IS NOT NULL)::int,
               (role = 'assistant' AND coalesce(source_count = 0, false))::int,
               (role = 'assistant' AND (coalesce(source_count = 0, false)
                   OR coalesce(({_SAID}) @> '{{"fallback": true}}', false)))::int,
               (SELECT count(*) FROM cited c WHERE (c.session_id, c.seq) = (m.session_id, m.seq))
        FROM chat.chat_messages m
    )
    SELECT {bucket} AS bucket, sum(sessions), sum(users) + sum(answers) + sum(others), sum(users), sum(answers),
           sum(others), sum(answered), sum(timed), sum(ms), sum(listed), sum(unsourced), sum(fallback), sum(citations)
    FROM parts GROUP BY 1
    """


_SESSIONS = """
SELECT s.session_id, s.user_id, s.created_at, (s.created_at AT TIME ZONE $1)::date AS day,
       min(m.created_at) AS first_message_at, max(m.created_at) AS last_message_at,
       (extract(epoch FROM max(m.created_at) - min(m.created_at)) * 1000)::bigint AS duration_ms,
       count(m.seq) AS messages, count(*) FILTER (WHERE m.role = 'user') AS turns,
       count(*) FILTER (WHERE m.role = 'assistant') AS answers,
       (SELECT count(*) FROM analytics.turns t WHERE t.session_id = s.session_id AND t.answer_seq IS NOT NULL)
           AS answered_turns,
       count(m.processing_time_ms) FILTER (WHERE m.role = 'assistant') AS timed_answers,
       coalesce(sum(m.processing_time_ms) FILTER (WHERE m.role = 'assistant'), 0) AS processing_ms,
       max(m.processing_time_ms) FILTER (WHERE m.role = 'assistant') AS slowest_ms,
       (SELECT greatest(0, (extract(epoch FROM a.created_at - q.created_at) * 1000)::bigint)
        FROM chat.chat_messages q JOIN chat.chat_messages a USING (session_id)
        WHERE session_id = s.session_id AND q.role = 'user' AND a.role = 'assistant' AND a.seq > q.seq
        ORDER BY q.seq, a.seq LIMIT 1) AS first_response_ms,
       (array_agg(m.role ORDER BY m.seq DESC))[1] AS last_role,
       EXISTS (SELECT FROM chat.chat_sessions e WHERE e.user_id = s.user_id
               AND (e.created_at, e.session_id) < (s.created_at, s.session_id)
               AND e.created_at > s.created_at - interval '24 hours') AS is_repeat
FROM chat.chat_sessions s LEFT JOIN chat.chat_messages m USING (session_id)
GROUP BY s.session_id
"""

_MEASURES = f"""
WITH sessions AS ({_SESSIONS})
SELECT measure, day, value AS value, count(*)::bigint AS sessions
FROM sessions CROSS JOIN LATERAL (VALUES
    ('turns', turns), ('messages', messages), ('duration', chat.rollup_bucket(duration_ms)),
    ('abandoned_turns', CASE WHEN last_role = 'user' THEN turns END),
    ('first_response', chat.rollup_bucket(first_response_ms))
) v(measure, value)
WHERE value IS NOT NULL
GROUP BY 1, 2, 3
"""

_ACTIVE = """
SELECT DISTINCT s.user_id, (m.created_at AT TIME ZONE $1)::date AS day
FROM chat.chat_messages m JOIN chat.chat_sessions s USING (session_id) WHERE m.role = 'user'
"""

_PERIODS = f"""
SELECT DISTINCT grain, user_id, date_trunc(grain, day)::date AS period
FROM ({_ACTIVE}) a CROSS JOIN (VALUES ('day'), ('week'), ('month')) g(grain)
"""

PLAIN = {
    "messages_5_minutes": _times("date_bin('5 minutes', at, timestamptz '2000-01-01 00:00+00')"),
    "messages_hourly": _times("date_trunc('hour', at, 'UTC')"),
    "messages_daily": _times("(at AT TIME ZONE $1)::date"),
    "response_times": "SELECT date_trunc('hour', created_at, 'UTC'), chat.rollup_bucket(processing_time_ms) b, "
    "chat.rollup_value(chat.rollup_bucket(processing_time_ms)), count(*) FROM chat.chat_messages "
    "WHERE role = 'assistant' AND processing_time_ms IS NOT NULL AND $1 <> '' GROUP BY 1, 2",
    "response_times_daily": "SELECT (created_at AT TIME ZONE $1)::date, chat.rollup_bucket(processing_time_ms) b, "
    "chat.rollup_value(chat.rollup_bucket(processing_time_ms)), count(*) FROM chat.chat_messages "
    "WHERE role = 'assistant' AND processing_time_ms IS NOT NULL GROUP BY 1, 2",
    "sessions_daily": f"""
        SELECT day, count(*), count(*) FILTER (WHERE turns > 0), count(*) FILTER (WHERE turns = 1),
               count(*) FILTER (WHERE last_role = 'user'), count(*) FILTER (WHERE is_repeat), sum(messages),
               sum(turns), sum(answered_turns), count(duration_ms), coalesce(sum(duration_ms), 0),
               count(first_response_ms), coalesce(sum(first_response_ms), 0)
        FROM ({_SESSIONS}) s GROUP BY day""",
    "session_measures_daily": f"""
        SELECT measure, day, value, CASE WHEN measure IN ('duration', 'first_response')
               THEN chat.rollup_value(value::int) ELSE value END, sessions FROM ({_MEASURES}) m""",
    "session_turns_daily": f"""
        SELECT day, turns, count(*), count(*) FILTER (WHERE last_role = 'user')
        FROM ({_SESSIONS}) s GROUP BY day, turns""",
    "users_daily": f"""
        WITH active AS ({_ACTIVE}), counts AS (
            SELECT d.day, (SELECT count(*) FROM active a WHERE a.day = d.day) AS dau,
                   (SELECT count(*) FROM (SELECT min(day) AS day FROM active GROUP BY user_id) f
                    WHERE f.day = d.day) AS new,
                   (SELECT count(DISTINCT user_id) FROM active a WHERE a.day BETWEEN d.day - 6 AND d.day) AS wau,
                   (SELECT count(DISTINCT user_id) FROM active a WHERE a.day BETWEEN d.day - 27 AND d.day) AS mau
            FROM (SELECT DISTINCT day + n AS day FROM active, generate_series(0, 27) n) d
        )
        SELECT day, dau, new, dau - new, wau, mau, dau::float8 / mau FROM counts""",
    "user_visits": f"""
        WITH visits AS (
            SELECT *, lag(period) OVER (PARTITION BY grain, user_id ORDER BY period) AS previous FROM ({_PERIODS}) p
        )
        SELECT grain, period, gap, previous, count(*), coalesce(gap, 0)
        FROM visits CROSS JOIN LATERAL (
            SELECT CASE grain WHEN 'day' THEN period - previous WHEN 'week' THEN (period - previous) / 7
                   ELSE (extract(year FROM age(period, previous)) * 12 + extract(month FROM age(period, previous)))::int
                   END AS gap
        ) g
        GROUP BY grain, period, gap, previous""",
    "users_lifecycle": f"""
        WITH periods AS ({_PERIODS}), steps AS (
            SELECT grain, user_id, period, 'active' AS what FROM periods
            UNION ALL
            SELECT grain, user_id, (period + ('1 ' || grain)::interval)::date, 'before' FROM periods
        ), states AS (
            SELECT s.grain, s.user_id, s.period, bool_or(what = 'active') AS active, bool_or(what = 'before') AS before,
                   EXISTS (SELECT FROM periods e WHERE e.grain = s.grain AND e.user_id = s.user_id
                           AND e.period < s.period) AS earlier
            FROM steps s GROUP BY 1, 2, 3
        )
        SELECT grain, period, count(*) FILTER (WHERE active), count(*) FILTER (WHERE active AND NOT earlier),
               count(*) FILTER (WHERE active AND before),
               count(*) FILTER (WHERE active AND earlier AND NOT before),
               count(*) FILTER (WHERE before AND NOT active)
        FROM states GROUP BY 1, 2""",
    "retention_weekly": f"""
        WITH weeks AS (SELECT user_id, period FROM ({_PERIODS}) p WHERE grain = 'week'),
             cohorts AS (SELECT user_id, min(period) AS cohort FROM weeks GROUP BY 1),
             sizes AS (SELECT cohort, count(*) AS size FROM cohorts GROUP BY 1)
        SELECT cohort, (period - cohort) / 7, size, count(*), count(*)::float8 / size
        FROM weeks JOIN cohorts USING (user_id) JOIN sizes USING (cohort) GROUP BY cohort, period, size""",
    "sources_cited": f"SELECT day, source, count(*), count(DISTINCT session_id) FROM ({_CITED}) c GROUP BY 1, 2",
    "sources_cited_again": f"""
        SELECT day, previous, source, count(*)
        FROM (SELECT *, lag(day) OVER (PARTITION BY session_id, source ORDER BY day) AS previous
              FROM (SELECT DISTINCT session_id, source, day FROM ({_CITED}) c) d) p
        WHERE previous IS NOT NULL GROUP BY 1, 2, 3""",
    "longest_sessions": f"SELECT day, session_id, user_id, created_at, messages, turns, duration_ms FROM ({_SESSIONS}) s",
    "slowest_sessions": f"SELECT day, session_id, user_id, created_at, slowest_ms FROM ({_SESSIONS}) s "
    "WHERE slowest_ms IS NOT NULL",
    "sessions": f"""
        SELECT session_id, day, first_message_at, last_message_at, duration_ms, turns, answered_turns, answers,
               timed_answers, processing_ms, slowest_ms, first_response_ms, last_role, is_repeat
        FROM ({_SESSIONS}) s""",
}
_COLUMNS = {
    "sessions": "session_id, day, first_message_at, last_message_at, duration_ms, turns, answered_turns, answers, "
    "timed_answers, processing_ms, slowest_ms, first_response_ms, last_role, is_repeat",
}


async def differences(conn: asyncpg.Connection, timezone: str) -> dict[str, Any]:
    """By view: what only it has, and what only the plain query has."""
    found = {}
    for view, plain in PLAIN.items():
        rolled = {
            tuple(row) for row in await conn.fetch(f"SELECT {_COLUMNS.get(view, '*')} FROM analytics.{view}")
        }
        expected = {
            tuple(row) for row in await conn.fetch(f"SELECT * FROM ({plain}) p WHERE $1 <> ''", timezone)
        }
        if rolled != expected:
            found[view] = (rolled - expected, expected - rolled)
    return found


async def count_all(counting: Rollups) -> None:
    while (now := await counting.pending()).marks or now.backfills:
        with suppress(DurableStoreUnavailable):
            await counting.round()


# Random histories

_ANCHOR = datetime(2026, 3, 1, tzinfo=UTC)
_USERS = ("an", "Bình", "chị")

_minutes = st.sampled_from([0, 4, 5, 59, 17 * 60 - 1, 17 * 60, 21 * 60 + 59, 22 * 60, 23 * 60 + 59])
_days = st.sampled_from([0, 0, 0, 1, 2, 6, 7, 8, 27, 28, 31, 61, -9555])
_moments = st.builds(lambda day, minute: _ANCHOR + timedelta(days=day, minutes=minute), _days, _minutes)
_sources = st.lists(st.sampled_from(["Luật.pdf", "b.pdf", "x" * 3000, 7, None]), max_size=3)
_metadata = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"sources": _sources},
        optional={
            "processing_time_ms": st.sampled_from([0, 1, 99, 100, 2_000_000_000, -1]),
            "fallback": st.sampled_from([True, False, "true"]),
            "a\\u0000": st.just("\0"),
        },
    ),
)
_messages = st.lists(
    st.builds(
        lambda role, at, metadata: new_message("x", role=role, created_at=at, metadata=metadata),
        st.sampled_from(["user", "user", "assistant", "assistant", "system"]),
        _moments,
        _metadata,
    ),
    min_size=1,
    max_size=4,
)


@dataclass(frozen=True)
class Create:
    user_id: str


@dataclass(frozen=True)
class AppendTo:
    session: int
    messages: list[NewMessage]


@dataclass(frozen=True)
class Adopt:
    """A session from Redis, with times of its own; its id may be that of one that was deleted."""

    session: int
    user_id: str
    created_at: datetime
    messages: list[NewMessage]


@dataclass(frozen=True)
class Delete:
    session: int


@dataclass(frozen=True)
class Count:
    pass


@dataclass(frozen=True)
class Forget:
    pass


Step = Create | AppendTo | Adopt | Delete | Count | Forget

_which = st.integers(0, 4)
_steps = st.one_of(
    st.builds(Create, st.sampled_from(_USERS)),
    st.builds(AppendTo, _which, _messages),
    st.builds(AppendTo, _which, _messages),
    st.builds(Adopt, _which, st.sampled_from(_USERS), _moments, _messages),
    st.builds(Adopt, _which, st.sampled_from(_USERS), _moments, _messages),
    st.builds(Delete, _which),
    st.just(Count()),
    st.just(Count()),
)
_histories = st.lists(st.lists(_steps, max_size=8), min_size=2, max_size=4)


class Player:
    """Takes steps on a database. Sessions are known to all writers by their numbers."""

    def __init__(self, database: Database, timezone: str) -> None:
        self.store = PostgresChatSessionStore(database, ttl_seconds=3600)
        self.counting = Rollups(database, timezone=timezone)
        self.sessions = [new_uuid() for _ in range(5)]
        self.created: list[UUID] = []

    async def play(self, steps: Sequence[Step]) -> None:
        for step in steps:
            # Of a session that is not there, one that another has locked, and a round that lost to another.
            with suppress(SessionNotFound, RowBusy, DurableStoreUnavailable):
                await self.take(step)

    async def take(self, step: Step) -> None:
        match step:
            case Create():
                self.created.append((await self.store.create_session(step.user_id)).session.session_id)
            case AppendTo():
                at = [*self.created, *self.sessions][step.session]
                await self.store.append(Append(session_id=at, messages=tuple(fresh(step.messages))))
            case Adopt():
                await self.adopt(step)
            case Delete():
                await self.store.delete_session([*self.created, *self.sessions][step.session])
            case Count():
                await self.counting.round()
            case Forget():
                await self.counting.forget()

    async def adopt(self, step: Adopt) -> None:
        session = ChatSession(
            session_id=self.sessions[step.session],
            user_id=step.user_id,
            created_at=step.created_at,
            last_activity=step.created_at,
            message_count=len(step.messages),
        )
        async with self.store.locked(session.session_id) as locked:
            await locked.adopt(session, fresh(step.messages))
            await locked.give_to("postgres")


def fresh(messages: Sequence[NewMessage]) -> list[NewMessage]:
    """The same under new ids: a step may be drawn twice."""
    return [
        NewMessage(
            message_id=new_uuid(),
            role=one.role,
            content=one.content,
            created_at=one.created_at,
            metadata=one.metadata,
        )
        for one in messages
    ]


@hypothesis_settings(
    deadline=None,
    print_blob=True,
    max_examples=60,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)
@given(
    writers=_histories,
    timezone=st.sampled_from(
        ["UTC", "Asia/Ho_Chi_Minh", "Asia/Kathmandu", "Asia/Beirut", "America/St_Johns"]
    ),
    rounds=st.sampled_from([(1, 1, 1), (3, 2, 2), (2000, 500, 20_000)]),
)
def test_roll_ups_are_what_plain_queries_find_after_any_history(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    writers: list[list[Step]],
    timezone: str,
    rounds: tuple[int, int, int],
) -> None:
    async def run() -> dict[str, Any]:
        database = Database(create_engine(database_url, application_name="tests"))
        try:
            await empty(database)
            await claim_state(database, redis_only=None)
            await make_partitions(database, [utc_now().date().replace(day=1)])
            player = Player(database, timezone)
            await asyncio.gather(*map(player.play, writers))
            await count_all(player.counting)
            async with database.connection() as conn:
                found = await differences(conn, timezone)
                assert await conn.fetchval("SELECT count(*) FROM chat.rollup_gone") == 0
            return found
        finally:
            await database.close()

    for name, value in zip(("_MARKS", "_BACKFILLED_SESSIONS", "_MESSAGES"), rounds, strict=True):
        monkeypatch.setattr(rollups, name, value)
    monkeypatch.setattr(rollups, "_MESSAGES_OF_SESSION_MIN", min(2, rounds[2]))

    assert asyncio.run(run()) == {}


@pytest.fixture
async def database(database: Database) -> Database:
    # The first of a month is adopted in two attempts.
    await make_partitions(database, [utc_now().date().replace(day=1)])
    return database


# Histories that a random one meets too rarely. Each is played by one writer.

_AT = _ANCHOR + timedelta(hours=3)


def _asked(*roles: Role, at: datetime = _AT, **metadata: object) -> list[NewMessage]:
    return [new_message("x", role=role, created_at=at, metadata=metadata) for role in roles]


HISTORIES: dict[str, list[Step]] = {
    "an id that was deleted and is there again, longer": [
        Adopt(0, "an", _AT, _asked("user", "assistant", sources=["a"])),
        Count(),
        Delete(0),
        Adopt(0, "Bình", _AT, _asked("system", "user", "user", "assistant", at=_AT + timedelta(days=1))),
    ],
    "an id that was deleted twice": [
        Adopt(0, "an", _AT, _asked("user", "assistant", sources=["a"], processing_time_ms=7)),
        Count(),
        Delete(0),
        Adopt(0, "an", _AT, _asked("user", "assistant", at=_AT + timedelta(days=3), sources=["b"])),
        Delete(0),
    ],
    "an empty session that follows another is appended to": [
        Create("an"),
        Create("an"),
        Count(),
        AppendTo(1, _asked("user", "assistant")),
    ],
    "a session in between goes": [
        Adopt(0, "an", _AT, _asked("user")),
        Adopt(1, "an", _AT + timedelta(hours=20), _asked("user")),
        Adopt(2, "an", _AT + timedelta(hours=40), _asked("user")),
        Count(),
        Delete(1),
    ],
    "a source is cited on two days, the later one first": [
        Adopt(0, "an", _AT, _asked("assistant", sources=["a"], at=_AT + timedelta(days=2))),
        Count(),
        AppendTo(0, _asked("assistant", sources=["a"])),
    ],
    "a user's first week goes": [
        Adopt(0, "an", _AT, _asked("user")),
        Adopt(1, "an", _AT, _asked("user", at=_AT + timedelta(days=10))),
        Count(),
        Delete(0),
    ],
    "everything goes while it is counted anew": [
        Adopt(0, "an", _AT, _asked("user", "assistant")),
        Adopt(1, "an", _AT, _asked("user", "assistant")),
        Count(),
        Forget(),
        Delete(0),
        Count(),
    ],
}


@pytest.mark.parametrize("history", HISTORIES)
async def test_roll_ups_are_exact_after(database: Database, history: str) -> None:
    player = Player(database, "Asia/Ho_Chi_Minh")

    await player.play(HISTORIES[history])
    await count_all(player.counting)

    async with database.connection() as conn:
        assert await differences(conn, "Asia/Ho_Chi_Minh") == {}


async def test_a_round_on_an_older_snapshot_than_the_last_one_counts_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is held by now, and was not when the snapshot was taken: what it shows has been counted."""
    player = Player(database, "UTC")
    await player.play([Adopt(0, "an", _AT, _asked("user", "assistant"))])
    gate = 7311520269999
    async with database.transaction() as holding:
        await holding.execute("SELECT pg_advisory_xact_lock($1)", gate)
        with monkeypatch.context() as patch:
            patch.setattr(rollups, "_BEGIN", f"{rollups._BEGIN}; SELECT pg_advisory_xact_lock({gate})")
            late = asyncio.create_task(player.counting.round())
            while not await holding.fetchval(  # noqa: ASYNC110 - nobody tells
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            ):
                await asyncio.sleep(0.01)
        assert await player.counting.round() is not None

    with pytest.raises(DurableStoreUnavailable, match="could not serialize"):
        await late
    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}


async def test_of_two_rounds_at_once_one_counts(database: Database) -> None:
    counting = Rollups(database, timezone="UTC")
    async with database.transaction() as conn:
        await conn.execute("SELECT pg_advisory_xact_lock($1)", rollups._LOCK)

        assert await counting.round() is None


async def test_a_round_that_is_broken_off_leaves_its_marks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(database, "UTC")
    await player.play([Adopt(0, "an", _AT, _asked("user", "assistant"))])
    with monkeypatch.context() as patch:
        patch.setitem(
            rollups._SQL, "count_users", "SELECT lost FROM unnest($1::text[], $2::int[], $3::int[])"
        )
        # Not about one of the sessions: none is set aside for it.
        with pytest.raises(asyncpg.UndefinedColumnError):
            await player.counting.round()

    await count_all(player.counting)

    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}


@asynccontextmanager
async def uncountable(database: Database, session_id: UUID) -> AsyncIterator[None]:
    """Inside it, counting this session fails."""
    async with database.connection() as conn:
        await conn.execute(
            "ALTER TABLE chat.rollup_sessions "
            f"ADD CONSTRAINT never_this_one CHECK (session_id <> '{session_id}') NOT VALID"
        )
    try:
        yield
    finally:
        async with database.connection() as conn:
            await conn.execute("ALTER TABLE chat.rollup_sessions DROP CONSTRAINT never_this_one")


_FIVE: list[Step] = [
    Adopt(which, user, _AT + timedelta(hours=which), _asked("user", "assistant", sources=["a"]))
    for which, user in enumerate(["an", "an", "an", "Bình", "chị"])
]


async def counted(database: Database) -> set[UUID]:
    async with database.connection() as conn:
        found = await conn.fetch("SELECT session_id FROM analytics.sessions WHERE day IS NOT NULL")
    return {record["session_id"] for record in found}


@pytest.mark.parametrize(
    ("then", "failures"),
    [([AppendTo(2, _asked("user", "assistant"))], 1), ([Delete(2)], 1), ([Forget()], 2)],
    ids=["appended to", "deleted", "all counted anew"],
)
@pytest.mark.parametrize("was_counted", [True, False])
async def test_a_session_that_can_not_be_counted_holds_up_no_other(
    database: Database, caplog: pytest.LogCaptureFixture, then: list[Step], failures: int, was_counted: bool
) -> None:
    player = Player(database, "UTC")
    bad = player.sessions[2]
    await count_all(player.counting)
    await player.play(_FIVE)
    if was_counted:
        await count_all(player.counting)
    async with uncountable(database, bad):
        await player.play([AppendTo(which, _asked("user")) for which in range(5)])
        done = await player.counting.round()

        assert done is not None
        assert done.sessions == 4
        [aside] = await player.counting.set_aside(10)
        assert (aside.session_id, aside.failures) == (bad, 1)
        assert "never_this_one" in aside.error
        # PostgreSQL's second line has the row.
        assert "an" not in aside.error.split()
        assert str(bad) in caplog.text
        now = await player.counting.pending()
        assert (now.marks, now.set_aside, now.retries, now.waits) == (0, 1, False, False)
        assert await counted(database) >= {*player.sessions} - {bad}
        async with database.connection() as conn:
            state = await conn.fetchrow("SELECT complete, set_aside FROM analytics.rollup_state")
        assert tuple(state) == (False, 1)

        # It waits for its time, whatever is written to it.
        await player.play(then)
        await count_all(player.counting)
        assert [one.failures for one in await player.counting.set_aside(10)] == [failures]
    await player.counting.retry()
    await player.counting.round()

    assert await player.counting.set_aside(10) == []
    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}
        assert await conn.fetchval("SELECT count(*) FROM chat.rollup_gone") == 0
        assert await conn.fetchval("SELECT complete FROM analytics.rollup_state")


async def test_a_session_that_fails_again_is_tried_more_and_more_rarely(database: Database) -> None:
    player = Player(database, "UTC")
    pauses = []
    async with uncountable(database, player.sessions[0]), database.connection() as conn:
        await player.play([Adopt(0, "an", _AT, _asked("user"))])
        for failures in (1, 2, 3, 50):
            await conn.execute("UPDATE chat.rollup_set_aside SET failures = $1", failures - 1)
            await player.counting.retry()
            before = await conn.fetchval("SELECT clock_timestamp()")
            await player.counting.round()
            [aside] = await player.counting.set_aside(10)
            assert aside.failures == failures
            pauses.append(aside.retry_at - before)

    for pause, at_least in zip(pauses, (10, 20, 40, 3600), strict=True):
        assert timedelta(seconds=at_least) <= pause < timedelta(seconds=at_least + 600)


async def test_a_round_with_failures_leaves_what_it_has_no_time_for_to_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(database, "UTC")
    monkeypatch.setattr(rollups, "_FAILING_ROUND_SECONDS", 0)
    async with uncountable(database, player.sessions[2]):
        await player.play(_FIVE)
        await player.counting.round()
        left = await player.counting.pending()
        await count_all(player.counting)

        assert left.marks > 0
        assert await counted(database) == {*player.sessions} - {player.sessions[2]}
    await player.counting.retry()
    await count_all(player.counting)
    await player.counting.round()

    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}


async def test_an_error_that_postgresql_can_not_store_is_told_as_far_as_it_can(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(database, "UTC")
    await player.play([Adopt(0, "an", _AT, _asked("user"))])

    async def fails(*_: object) -> None:
        raise ValueError("a\0b" + "c" * 1000)

    monkeypatch.setattr(rollups, "_count", fails)
    await player.counting.round()

    [aside] = await player.counting.set_aside(10)
    assert aside.error.startswith("ValueError: abccc")
    assert len(aside.error) == 500


async def test_fresh_marks_do_not_wait_for_all_the_old_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(database, "UTC")
    await count_all(player.counting)
    await player.play([Create("an") for _ in range(20)])
    monkeypatch.setattr(rollups, "_MARKS", 4)

    await player.counting.round()

    async with database.connection() as conn:
        counted = {record[0] for record in await conn.fetch("SELECT session_id FROM chat.rollup_sessions")}
    assert counted == {*player.created[:2], *player.created[-2:]}


async def test_a_round_counts_a_piece_of_a_long_session(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(database, "UTC")
    await count_all(player.counting)
    await player.play([Adopt(0, "an", _AT, _asked(*["user"] * 25))])
    monkeypatch.setattr(rollups, "_MESSAGES", 10)

    counted = []
    for _ in range(3):
        await player.counting.round()
        async with database.connection() as conn:
            counted.append(await conn.fetchval("SELECT sum(messages) FROM chat.rollup_sessions"))

    assert counted == [10, 20, 25]


async def test_nothing_is_written_where_nothing_was_marked(database: Database) -> None:
    counting = Rollups(database, timezone="UTC")
    await count_all(counting)

    now = await counting.pending()

    assert (now.marks, now.backfills, now.lag_seconds) == (0, False, 0)


async def test_a_day_beyond_pythons_calendar_is_counted(database: Database) -> None:
    player = Player(database, "Asia/Ho_Chi_Minh")
    last = datetime(9999, 12, 31, 23, 59, tzinfo=UTC)
    await player.play([Adopt(0, "an", _AT, _asked("user")), Adopt(1, "an", last, _asked("user", at=last))])

    await count_all(player.counting)

    async with database.connection() as conn:
        days = await conn.fetch("SELECT day::text, mau FROM analytics.users_daily WHERE active_users > 0")
        # The days on which nobody had written for long are not there.
        count = await conn.fetchval("SELECT count(*) FROM analytics.users_daily")
    assert [tuple(day) for day in days] == [("2026-03-01", 1), ("10000-01-01", 1)]
    assert count == 2 * 28


async def test_another_time_zone_counts_all_anew(database: Database) -> None:
    player = Player(database, "UTC")
    await player.play([Adopt(0, "an", _ANCHOR - timedelta(hours=1), _asked("user", at=_ANCHOR))])
    await count_all(player.counting)
    elsewhere = Rollups(database, timezone="Asia/Ho_Chi_Minh")

    await count_all(elsewhere)
    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}
    await elsewhere.forget()
    async with database.connection() as conn:
        begun = await conn.fetchrow("SELECT timezone, complete FROM analytics.rollup_state")
    await count_all(elsewhere)

    assert tuple(begun) == ("Asia/Ho_Chi_Minh", False)
    async with database.connection() as conn:
        assert await differences(conn, "Asia/Ho_Chi_Minh") == {}


async def test_a_time_zone_that_postgresql_does_not_know_is_refused_and_nothing_forgotten(
    database: Database,
) -> None:
    player = Player(database, "UTC")
    await player.play([Create("an")])
    await count_all(player.counting)

    with pytest.raises(StartRefused, match="Mars/Olympus"):
        await Rollups(database, timezone="Mars/Olympus").forget()

    assert not (await player.counting.pending()).backfills


async def test_rows_that_somebody_writes_and_deletes_by_hand_are_counted(database: Database) -> None:
    player = Player(database, "UTC")
    await player.play([Adopt(0, "an", _AT, _asked("user")), Adopt(1, "an", _AT, _asked("user"))])
    await count_all(player.counting)
    async with database.connection() as conn:
        await conn.execute(
            "INSERT INTO chat.chat_messages (session_id, session_month, seq, message_id, role, content, created_at) "
            "SELECT session_id, session_month, 2, gen_random_uuid(), 'assistant', 'x', created_at "
            "FROM chat.chat_messages WHERE session_id = $1",
            player.sessions[0],
        )
        await conn.execute(
            "UPDATE chat.chat_sessions SET message_count = 2 WHERE session_id = $1", player.sessions[0]
        )
        await conn.execute("DELETE FROM chat.chat_messages WHERE session_id = $1", player.sessions[1])
        await conn.execute("DELETE FROM chat.chat_sessions WHERE session_id = $1", player.sessions[1])

    await count_all(player.counting)

    async with database.connection() as conn:
        assert await differences(conn, "UTC") == {}
        assert await conn.fetchval("SELECT sum(messages) FROM analytics.messages_daily") == 2


@pytest.mark.parametrize("seed", range(3))
async def test_percentiles_are_within_two_and_a_half_percent(database: Database, seed: int) -> None:
    draw = random.Random(seed)
    player = Player(database, "UTC")
    times = [round(draw.lognormvariate(7, 1)) for _ in range(300)]
    answers = [message for ms in times for message in _asked("assistant", processing_time_ms=ms)]
    await player.play([Adopt(0, "an", _AT, answers)])
    await count_all(player.counting)

    async with database.connection() as conn:
        estimated = await conn.fetchrow("SELECT * FROM analytics.response_time_percentiles_daily")
        exact = await conn.fetchval(
            "SELECT percentile_disc('{0.5, 0.75, 0.9, 0.95, 0.99}'::float8[]) "
            "WITHIN GROUP (ORDER BY processing_time_ms) FROM chat.chat_messages"
        )

    assert estimated["timed_answers"] == 300
    for got, wanted in zip(tuple(estimated)[2:], exact, strict=True):
        assert abs(got - wanted) <= 0.025 * wanted + 0.5

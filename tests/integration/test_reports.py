"""The reports and the views under them, on a real PostgreSQL, with numbers that a person can check."""

import math
import random
import re
import statistics
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text

from app.analytics import reports
from app.analytics.reports import RANGE_DAYS_MAX, REPORTS, Query, Report, run
from app.analytics.rollups import Rollups
from app.chat import NewMessage
from app.errors import (
    DurableStoreUnavailable,
    GranularityRefused,
    RangeRefused,
    TimezoneRefused,
    UnknownReport,
    UnknownTimezone,
    UserRefused,
)
from app.postgres.cache_state import claim_state
from app.postgres.engine import Database, create_engine
from app.postgres.store import PostgresChatSessionStore
from app.store import Append
from tests.databases import empty, new_database, shrink
from tests.factories import new_message

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
SINCE = datetime(2026, 3, 10, tzinfo=UTC)
UNTIL = datetime(2026, 3, 13, tzinfo=UTC)
MOMENT = timedelta(milliseconds=1)


#: Those that can be read from the messages, too.
PLAIN = [name for name, one in REPORTS.items() if one.plain]


FOLDED = [name for name, one in REPORTS.items() if one.folded]


async def count_all(database: Database, timezone: str = "UTC") -> None:
    counting = Rollups(database, timezone=timezone)
    while (now := await counting.pending()).marks or now.backfills:
        await counting.round()


@pytest.fixture
def store(database: Database) -> PostgresChatSessionStore:
    return PostgresChatSessionStore(database, ttl_seconds=3600)


async def record(store: PostgresChatSessionStore, *messages: NewMessage, user_id: str = "an") -> UUID:
    """A session with these messages."""
    session = (await store.create_session(user_id)).session
    await store.append(Append(session_id=session.session_id, messages=messages))
    return session.session_id


async def create_at(store: PostgresChatSessionStore, database: Database, *moments: datetime) -> None:
    """Sessions that were created then."""
    for moment in moments:
        session = (await store.create_session("an")).session
        async with database.connection() as conn:
            await conn.execute(
                "UPDATE chat.chat_sessions SET created_at = $2 WHERE session_id = $1",
                session.session_id,
                moment,
            )


def said(at: datetime = NOON, **fields: object) -> NewMessage:
    return new_message(created_at=at, **fields)


def answered(metadata: object = None, *, at: datetime = NOON) -> NewMessage:
    return new_message("Có ba điều kiện.", role="assistant", metadata=metadata, created_at=at)


def cited(*sources: object) -> NewMessage:
    return answered({"sources": list(sources)})


async def report(
    database: Database, name: str, *, since: datetime = SINCE, until: datetime = UNTIL, **asked: Any
) -> Report:
    """From the messages, unless it is asked for from roll-ups."""
    return await run(database, name, since=since, until=until, **{"limit": 100, "plain": True, **asked})


async def fetch(database: Database, sql: str) -> list[tuple[object, ...]]:
    async with database.connection() as conn:
        return [tuple(row) for row in await conn.fetch(sql)]


class TestSessionsPerDay:
    async def test_a_session_counts_on_the_utc_day_of_its_creation(self, store, database):
        await create_at(
            store,
            database,
            datetime(2026, 3, 10, 23, 59, 59, 999_000, tzinfo=UTC),
            datetime(2026, 3, 11, tzinfo=UTC),
            datetime.fromisoformat("2026-03-11T06:30:00+07:00"),
        )

        found = await report(database, "sessions_per_day")

        assert found.columns == ("day", "sessions")
        assert found.rows == ((date(2026, 3, 10), 2), (date(2026, 3, 11), 1), (date(2026, 3, 12), 0))

    async def test_the_range_has_its_begin_and_not_its_end(self, store, database):
        await create_at(store, database, SINCE - MOMENT, SINCE, UNTIL - MOMENT, UNTIL)

        found = await report(database, "sessions_per_day")

        assert found.rows == ((date(2026, 3, 10), 1), (date(2026, 3, 11), 0), (date(2026, 3, 12), 1))

    async def test_a_range_within_a_day_has_that_day_and_only_its_own_sessions(self, store, database):
        await create_at(store, database, NOON - timedelta(hours=2), NOON)

        found = await report(database, "sessions_per_day", since=NOON, until=NOON + MOMENT)

        assert found.rows == ((NOON.date(), 1),)

    async def test_an_empty_database_has_days_without_sessions(self, database):
        found = await report(database, "sessions_per_day")

        assert [count for _, count in found.rows] == [0, 0, 0]


class TestMessagesByRole:
    async def test_roles_are_counted_most_first(self, store, database):
        await record(store, said(), answered(), said(role="system"), said(role="tool"))
        await record(store, said(), said(), said(), answered(), user_id="bình")

        found = await report(database, "messages_by_role")

        assert found.columns == ("role", "messages", "percent")
        assert found.rows == (
            ("user", 4, 50.0),
            ("assistant", 2, 25.0),
            ("system", 1, 12.5),
            ("tool", 1, 12.5),
        )

    async def test_equal_counts_are_in_the_order_of_the_names(self, store, database):
        await record(store, said(), said(role="tool"), answered())

        found = await report(database, "messages_by_role")

        assert [role for role, _, _ in found.rows] == ["assistant", "tool", "user"]

    async def test_the_range_has_its_begin_and_not_its_end(self, store, database):
        await record(store, said(SINCE - MOMENT), said(SINCE), said(UNTIL - MOMENT), said(UNTIL))

        assert (await report(database, "messages_by_role")).rows == (("user", 2, 100.0),)

    async def test_an_empty_database_has_no_roles(self, database):
        assert (await report(database, "messages_by_role")).rows == ()


class TestResponseTime:
    async def test_median_and_95th_percentile_are_interpolated(self, store, database):
        times = [120, 3500, 80, 950, 41, 7000, 1600]
        await record(store, *(answered({"processing_time_ms": time}) for time in times))

        found = await report(database, "response_time")

        assert found.columns == ("answers", "timed_answers", "avg_ms", "p50_ms", "p95_ms")
        answers, timed, average, median, p95 = found.rows[0]
        assert (answers, timed, median) == (7, 7, 950)
        assert average == pytest.approx(statistics.mean(times))
        # At 0.95 * 6 = 5.7 between the sixth and the seventh.
        assert p95 == pytest.approx(3500 + 0.7 * (7000 - 3500))

    async def test_percentiles_are_those_of_the_statistics_module(self, store, database):
        numbers = random.Random(7)
        times = [int(numbers.lognormvariate(7, 1)) for _ in range(600)]
        for start in range(0, 600, 100):
            await record(
                store, *(answered({"processing_time_ms": time}) for time in times[start : start + 100])
            )

        found = await report(database, "response_time")

        _, _, _, median, p95 = found.rows[0]
        assert median == pytest.approx(statistics.median(times))
        assert p95 == pytest.approx(statistics.quantiles(times, n=20, method="inclusive")[-1])

    async def test_equal_times_are_every_percentile(self, store, database):
        await record(store, *(answered({"processing_time_ms": 250}) for _ in range(4)))

        assert (await report(database, "response_time")).rows == ((4, 4, 250, 250, 250),)

    async def test_an_answer_without_a_whole_number_of_milliseconds_is_not_timed(self, store, database):
        await record(
            store,
            answered({"processing_time_ms": 400}),
            answered(),
            *(
                answered({"processing_time_ms": odd})
                for odd in (None, "fast", "12", 12.5, -1, True, 2**31, [5], {"ms": 5})
            ),
        )

        assert (await report(database, "response_time")).rows == ((11, 1, 400, 400, 400),)

    async def test_only_answers_are_timed(self, store, database):
        await record(store, said(metadata={"processing_time_ms": 9}), answered({"processing_time_ms": 400}))

        assert (await report(database, "response_time")).rows == ((1, 1, 400, 400, 400),)

    async def test_the_range_has_its_begin_and_not_its_end(self, store, database):
        moments = {1: SINCE - MOMENT, 2: SINCE, 4: UNTIL - MOMENT, 8: UNTIL}
        await record(store, *(answered({"processing_time_ms": ms}, at=at) for ms, at in moments.items()))

        assert (await report(database, "response_time")).rows == ((2, 2, 3, 3, 3.9),)

    async def test_without_answers_nothing_is_known(self, store, database):
        await record(store, said())

        assert (await report(database, "response_time")).rows == ((0, 0, None, None, None),)


class TestActiveUsers:
    async def test_a_user_counts_once_however_much_was_written(self, store, database):
        await record(store, said(), said(), user_id="an")
        await record(store, said(), user_id="an")
        await record(store, said(), user_id="bình")

        found = await report(database, "active_users")

        assert found.columns == ("day", "dau", "wau", "mau")
        assert found.rows == (
            (date(2026, 3, 10), 2, 2, 2),
            (date(2026, 3, 11), 0, 2, 2),
            (date(2026, 3, 12), 0, 2, 2),
        )

    async def test_only_what_the_user_wrote_makes_a_user_active(self, store, database):
        await record(store, answered(), said(role="system"), said(role="tool"))

        assert {row[1:] for row in (await report(database, "active_users")).rows} == {(0, 0, 0)}

    async def test_the_days_before_the_range_are_looked_at(self, store, database):
        since, until = datetime(2026, 3, 28, 18, tzinfo=UTC), datetime(2026, 3, 28, 19, tzinfo=UTC)
        midnight = datetime(2026, 3, 1, tzinfo=UTC)
        await record(store, said(midnight - MOMENT), user_id="28 days ago")
        await record(store, said(midnight), user_id="27 days ago")
        await record(store, said(datetime(2026, 3, 22, tzinfo=UTC) - MOMENT), user_id="7 days ago")
        await record(store, said(datetime(2026, 3, 22, tzinfo=UTC)), user_id="6 days ago")
        await record(store, said(datetime(2026, 3, 28, 9, tzinfo=UTC)), user_id="this morning")

        found = await report(database, "active_users", since=since, until=until)

        assert found.rows == ((date(2026, 3, 28), 1, 2, 4),)

    async def test_what_is_after_the_range_is_not_looked_at(self, store, database):
        await record(store, said(NOON), user_id="at noon")
        await record(store, said(NOON - MOMENT), user_id="before")

        found = await report(database, "active_users", until=NOON)

        assert found.rows == ((NOON.date(), 1, 1, 1),)

    async def test_counts_equal_the_sets_of_a_random_history(self, store, database):
        numbers = random.Random(11)
        visits = defaultdict(set)
        for user in range(12):
            moments = [SINCE + timedelta(minutes=numbers.randrange(-40 * 1440, 40 * 1440)) for _ in range(9)]
            await record(store, *(said(moment) for moment in moments), user_id=f"user {user}")
            for moment in moments:
                visits[moment.date()].add(user)

        def users(day: date, days: int) -> int:
            return len(set().union(*(visits[day - timedelta(days=back)] for back in range(days))))

        found = await report(database, "active_users", until=SINCE + timedelta(days=40))

        days = [SINCE.date() + timedelta(days=ahead) for ahead in range(40)]
        assert found.rows == tuple((day, users(day, 1), users(day, 7), users(day, 28)) for day in days)

    async def test_an_empty_database_has_days_without_users(self, database):
        assert [row[1:] for row in (await report(database, "active_users")).rows] == [(0, 0, 0)] * 3


class TestTopSources:
    async def test_sources_are_counted_by_answer_and_by_session(self, store, database):
        await record(store, cited("luật.md", "faq.md"), cited("luật.md"))
        await record(store, cited("luật.md"))
        await record(store, cited("faq.md"))

        found = await report(database, "top_sources")

        assert found.columns == ("source", "citations", "sessions")
        assert found.rows == (("luật.md", 3, 2), ("faq.md", 2, 2))

    async def test_a_source_that_an_answer_names_twice_counts_once(self, store, database):
        await record(store, cited("faq.md", "faq.md"))

        assert (await report(database, "top_sources")).rows == (("faq.md", 1, 1),)

    async def test_equal_counts_are_in_the_order_of_the_bytes(self, store, database):
        await record(store, cited("đ", "a", "Z", "", "é", "e\u0301"))

        found = await report(database, "top_sources")

        assert [source for source, _, _ in found.rows] == ["", "Z", "a", "e\u0301", "é", "đ"]

    async def test_the_limit_keeps_the_most_cited(self, store, database):
        await record(store, cited("a", "b", "c"), cited("b", "c"), cited("c"))

        found = await report(database, "top_sources", limit=2)

        assert [source for source, _, _ in found.rows] == ["c", "b"]

    async def test_metadata_of_any_shape_is_passed_over(self, store, database):
        await record(
            store,
            answered({"sources": ["kept.md", 1, None, True, 2.5, {"file": "object.md"}, ["nested.md"]]}),
            cited(),
            answered(),
            *(
                answered({"sources": odd})
                for odd in (None, "text.md", 7, False, {"0": "object.md"}, {"sources": ["deeper.md"]})
            ),
            answered({"answer": {"sources": ["deeper.md"]}}),
        )

        assert (await report(database, "top_sources")).rows == (("kept.md", 1, 1),)

    async def test_a_nul_in_one_answer_hides_that_answer_alone(self, store, database):
        await record(
            store,
            answered({"sources": ["hidden.md"], "note": "\0"}),
            answered({"sources": ["shown.md"], "note": r"\u0000 and \\u0000"}),
        )

        assert (await report(database, "top_sources")).rows == (("shown.md", 1, 1),)

    async def test_only_answers_cite(self, store, database):
        await record(store, said(metadata={"sources": ["mine.md"]}), cited("faq.md"))

        assert (await report(database, "top_sources")).rows == (("faq.md", 1, 1),)

    async def test_the_range_has_its_begin_and_not_its_end(self, store, database):
        moments = {"before": SINCE - MOMENT, "first": SINCE, "last": UNTIL - MOMENT, "after": UNTIL}
        await record(store, *(answered({"sources": [name]}, at=at) for name, at in moments.items()))

        found = await report(database, "top_sources")

        assert [source for source, _, _ in found.rows] == ["first", "last"]

    async def test_an_empty_database_has_no_sources(self, database):
        assert (await report(database, "top_sources")).rows == ()


class TestQuestions:
    async def test_spellings_of_a_question_are_added_up(self, store, database):
        of_an = await record(
            store, said(content="hoc phi"), said(content="Học phí?"), said(NOON + MOMENT, content="Học phí?")
        )
        of_binh = await record(store, said(content="HỌC PHÍ"), said(content="Khác"), user_id="bình")

        found = await report(database, "top_questions")
        of_one = await report(database, "top_questions", user_id="an", limit=1)

        assert found.columns == ("question", "asked", "last_asked", "session_id")
        assert found.rows == (
            ("Học phí?", 4, NOON + MOMENT, str(max(of_an, of_binh))),
            ("Khác", 1, NOON, str(of_binh)),
        )
        assert (found.source, found.granularity) == ("messages", None)
        assert of_one.rows == (("Học phí?", 3, NOON + MOMENT, str(of_an)),)

    async def test_a_question_is_unanswered_where_the_answer_is_none_or_a_fallback(self, store, database):
        await record(store, said(content="sourced"), cited("a"), said(content="unsourced"), cited())
        await record(store, said(content="fell back"), answered({"sources": ["a"], "fallback": True}))
        await record(
            store, said(content="not said"), answered(), said(content="overtaken"), said(role="tool")
        )
        await record(
            store, said(content="hidden"), answered({"fallback": True, "note": "\0"}), said(content="last")
        )

        found = await report(database, "unanswered_questions")

        assert [row[0] for row in found.rows] == ["fell back", "last", "overtaken", "unsourced"]

    @pytest.mark.parametrize("name", FOLDED)
    async def test_the_range_has_its_begin_and_not_its_end(self, store, database, name):
        moments = {"before": SINCE - MOMENT, "first": SINCE, "last": UNTIL - MOMENT, "after": UNTIL}
        await record(store, *(said(at, content=text) for text, at in moments.items()))

        assert [row[0] for row in (await report(database, name)).rows] == ["first", "last"]

    @pytest.mark.parametrize("name", FOLDED)
    async def test_a_week_is_the_widest_range_and_the_default(self, database, name):
        week = timedelta(days=7)

        assert (await report(database, name, until=SINCE + week)).rows == ()
        default = await run(database, name)
        assert default.until - default.since == week
        with pytest.raises(RangeRefused, match=f"report {name} reads the messages themselves, of at most 7"):
            await report(database, name, until=SINCE + week + MOMENT)

    @pytest.mark.parametrize("name", FOLDED)
    async def test_more_texts_than_are_added_up_in_memory_are_refused(
        self, store, database, name, monkeypatch
    ):
        await record(store, said(content="one"), said(content="two"), said(content="three"))
        monkeypatch.setattr(reports, "_SPELLINGS_MAX", 2)

        with pytest.raises(RangeRefused, match="more than 2 different texts") as refused:
            await report(database, name)

        assert refused.value.hint == "ask for a shorter one"

    async def test_an_answer_is_found_by_its_key(self, database, monkeypatch):
        explained = Query(
            name="explained",
            definition="Explained.",
            sql="SELECT " + ", ".join(f"current_setting('enable_{one}join')" for one in ("hash", "merge")),
            folded=True,
        )
        monkeypatch.setattr(reports, "REPORTS", {"explained": explained})
        monkeypatch.setattr(reports, "most_asked", lambda rows, _: rows)

        assert (await report(database, "explained")).rows == (("off", "off"),)
        # It ends with the report.
        assert await fetch(database, "SELECT current_setting('enable_hashjoin')") == [("on",)]


class TestRunning:
    async def test_an_unknown_report_is_refused_with_the_names_of_all(self, database):
        with pytest.raises(UnknownReport, match="there is no report 'cost'") as refused:
            await report(database, "cost")

        assert refused.value.hint == f"there are {', '.join(REPORTS)}"

    @pytest.mark.parametrize("until", [SINCE, SINCE - MOMENT])
    async def test_a_range_that_does_not_go_forward_is_refused(self, database, until):
        with pytest.raises(RangeRefused, match=r"not after its begin at 2026-03-10T00:00:00\.000Z"):
            await report(database, "messages_by_role", until=until)

    @pytest.mark.parametrize(
        ("since", "until"),
        [
            (date.min, date.max),
            (datetime.min.replace(tzinfo=UTC), None),
            (None, datetime.max.replace(tzinfo=UTC)),
            (None, date(1899, 12, 31)),
            (date(9999, 1, 1), None),
        ],
    )
    @pytest.mark.parametrize("timezone", [None, "Asia/Ho_Chi_Minh", "America/New_York"])
    async def test_a_range_at_the_ends_of_time_is_refused(self, database, since, until, timezone):
        with pytest.raises(RangeRefused, match="1900 to 9998 are reported on"):
            await run(database, "traffic", since=since, until=until, timezone=timezone)

    async def test_what_is_known_before_a_report_takes_one_statement(self, database):
        statements = []

        def note(_conn, _cursor, statement, *_):
            statements.append(statement)

        event.listen(database.engine.sync_engine, "before_cursor_execute", note)
        try:
            await report(database, "messages_by_role", plain=False)
        finally:
            event.remove(database.engine.sync_engine, "before_cursor_execute", note)

        assert len(statements) == 2

    async def test_the_widest_range_is_reported_on(self, database):
        widest = SINCE + timedelta(days=RANGE_DAYS_MAX)

        found = await report(database, "sessions_per_day", until=widest, plain=False)

        assert len(found.rows) == RANGE_DAYS_MAX

    async def test_a_wider_range_is_refused(self, database):
        with pytest.raises(RangeRefused, match="at most 3660 are reported on at once"):
            await report(database, "sessions_per_day", until=SINCE + timedelta(days=RANGE_DAYS_MAX) + MOMENT)

    @pytest.mark.parametrize("name", [name for name, one in REPORTS.items() if not one.folded])
    async def test_every_report_runs_within_the_limits_over_its_widest_range(self, store, database, name):
        await record(store, said(), cited("faq.md"))
        await count_all(database)

        found = await report(database, name, until=SINCE + timedelta(days=RANGE_DAYS_MAX), plain=False)

        assert (found.source, found.complete) == ("roll-ups", True)

    @pytest.mark.parametrize(
        ("name", "plain"),
        [*((name, False) for name in REPORTS), *((name, True) for name, one in REPORTS.items() if one.plain)],
    )
    async def test_days_are_utc_whatever_the_time_zone_of_the_connection(
        self, store, database, database_url, name, plain
    ):
        # 2026-03-08: a day of 23 hours in New York.
        since = datetime(2026, 3, 7, tzinfo=UTC)
        await create_at(store, database, since, since + timedelta(hours=23), since + timedelta(hours=30))
        await record(store, said(since + timedelta(hours=23)), said(since - timedelta(days=27)))
        await record(store, said(since - timedelta(days=27) - MOMENT), cited("faq.md"), user_id="bình")
        await count_all(database)
        expected = await report(database, name, since=since, plain=plain)

        here = (await fetch(database, "SELECT current_database()::text"))[0][0]
        async with database.connection() as conn:
            await conn.execute(f"ALTER DATABASE {here} SET timezone = 'America/New_York'")
        elsewhere = Database(create_engine(database_url, application_name="tests"))
        try:
            zone = await fetch(elsewhere, "SELECT current_setting('timezone')")
            found = await report(elsewhere, name, since=since, plain=plain)
        finally:
            await elsewhere.close()
            async with database.connection() as conn:
                await conn.execute(f"ALTER DATABASE {here} RESET timezone")

        assert zone == [("America/New_York",)]
        assert (found.rows, found.since, found.sql) == (expected.rows, expected.since, expected.sql)

    async def test_a_report_that_takes_too_long_says_so(self, database, monkeypatch):
        monkeypatch.setattr(reports, "_PROLOGUE", reports._PROLOGUE.replace("'3s'", "'50ms'"))
        slow = Query(name="slow", definition="Slow.", sql="SELECT pg_sleep(60)")
        monkeypatch.setattr(reports, "REPORTS", {"slow": slow})

        with pytest.raises(RangeRefused, match="report slow takes longer than") as refused:
            await report(database, "slow", plain=False)

        assert refused.value.hint == "ask for a shorter one"

    async def test_a_report_is_given_the_time_of_any_statement(self, database, monkeypatch):
        asked = Query(name="asked", definition="Asked.", sql="SELECT current_setting('statement_timeout')")
        monkeypatch.setattr(reports, "REPORTS", {"asked": asked})

        monkeypatch.setattr(reports, "_PROLOGUE", reports._PROLOGUE.replace("'3s'", "'2s'"))
        assert (await report(database, "asked", plain=False)).rows == (("2s",),)
        # It ends with the report.
        assert await fetch(database, "SELECT current_setting('statement_timeout')") == [("3s",)]

    async def test_a_report_can_not_write(self, store, database, monkeypatch):
        await record(store, said())
        wrong = Query(name="wrong", definition="Wrong.", sql="DELETE FROM chat.chat_messages RETURNING seq")
        monkeypatch.setattr(reports, "REPORTS", {"wrong": wrong})

        with pytest.raises(DurableStoreUnavailable, match="read-only transaction"):
            await report(database, "wrong", plain=False)

        assert await fetch(database, "SELECT count(*) FROM chat.chat_messages") == [(1,)]

    async def test_a_database_without_the_schema_is_told_what_to_run(self, servers):
        async with new_database(servers, "chat_reports_bare") as url:
            bare = Database(create_engine(url, application_name="tests"))
            try:
                with pytest.raises(DurableStoreUnavailable) as refused:
                    await report(bare, "messages_by_role")
            finally:
                await bare.close()

        assert refused.value.hint == "run `alembic upgrade head`"

    @pytest.mark.parametrize("name", [name for name in PLAIN if name != "sessions_per_day"])
    async def test_the_range_can_be_served_by_the_index_on_created_at(self, database, name):
        await shrink(database)
        async with database.core() as conn:
            await conn.execute(text("SET LOCAL enable_seqscan = off"))
            plan = await conn.execute(
                text(
                    "EXPLAIN " + (await report(database, name, until=NOON)).sql.replace("timestamptz '", "'")
                )
            )

            lines = [line.strip() for (line,) in plan]

        assert "->  Bitmap Index Scan on chat_messages_legacy_created_at_idx" in {
            line.split("  (")[0] for line in lines
        }


async def record_random_history(store: PostgresChatSessionStore, database: Database) -> None:
    """Users, sessions, roles, times and sources of 12 days, with clocks that disagree; counted by days of Vietnam."""
    numbers = random.Random(5)
    for _ in range(60):
        began = SINCE + timedelta(minutes=numbers.randrange(-4 * 1440, 8 * 1440))
        messages = [
            new_message(
                "x",
                role=numbers.choice(
                    ["user", "user", "assistant", "assistant", "assistant", "system", "tool"]
                ),
                created_at=began + timedelta(minutes=numbers.choice([0, 1, 7, 60, 1500]), milliseconds=place),
                metadata={
                    "processing_time_ms": numbers.randrange(5000),
                    "sources": numbers.sample(["a", "b", "c"], numbers.randrange(3)),
                    "fallback": numbers.random() < 0.2,
                }
                if numbers.random() < 0.8
                else {},
            )
            for place in range(numbers.randrange(1, 9))
        ]
        session = await record(store, *messages, user_id=numbers.choice(["an", "bình", "chị", "o'neil\\"]))
        async with database.connection() as conn:
            await conn.execute(
                "UPDATE chat.chat_sessions SET created_at = $2 WHERE session_id = $1", session, began
            )
    await count_all(database, "Asia/Ho_Chi_Minh")


def exact_part(found: Report) -> list[dict[str, Any]]:
    """Without the percentiles, which roll-ups have within 2.5 % of a time, and messages between two of them."""
    return [
        {
            column: value
            for column, value in zip(found.columns, row, strict=True)
            if not re.fullmatch(r"p\d\d(_ms)?", column)
        }
        for row in found.rows
    ]


async def explained(database: Database, sql: str, *settings: str) -> list[str]:
    """How a statement runs, line by line, and what of it does not."""
    async with database.core() as conn:
        for one in settings:
            await conn.execute(text(f"SET LOCAL {one}"))
        # A driver takes what stands behind a colon for a parameter.
        plan = await conn.exec_driver_sql(f"EXPLAIN (ANALYZE, COSTS OFF) {sql}")
        return [line.strip() for (line,) in plan]


@pytest.mark.parametrize("timezone", ["Asia/Ho_Chi_Minh", "UTC"])
async def test_roles_that_nobody_has_cost_no_reading_and_no_planning(store, database, timezone):
    await record(store, new_message("x", role="user", created_at=NOON))
    await count_all(database, "Asia/Ho_Chi_Minh")
    span = {"since": date(2026, 3, 8), "until": date(2026, 3, 15), "timezone": timezone}
    found = await run(database, "messages_by_role", **span)

    lines = await explained(database, found.sql)

    assert found.source == "roll-ups"
    # Not part of this plan, which would have a node for each month of messages.
    assert "->  Function Scan on messages_of_other_roles other (never executed)" in lines


async def test_users_of_any_range_of_days_are_counted_once(store, database):
    rng = random.Random(7)
    first = datetime(2026, 3, 10, 12, tzinfo=UTC)
    for user in range(40):
        seldom = rng.choice([1, 3, 10, 40])
        days = [day for day in range(50) if rng.random() * seldom < 1]
        if days:
            await record(store, *(said(first + timedelta(days=day)) for day in days), user_id=f"user {user}")
    await count_all(database)

    found = await fetch(
        database,
        """
        SELECT first_day, days, analytics.active_users(first_day, first_day + days), (
            SELECT count(DISTINCT user_id)
            FROM analytics.messages
            WHERE role = 'user' AND created_at >= first_day AT TIME ZONE 'UTC' AND created_at < (first_day + days) AT TIME ZONE 'UTC'
        )
        FROM (SELECT date '2026-03-05' + n AS first_day FROM generate_series(0, 30) AS n) AS firsts, generate_series(-1, 40) AS days
        """,
    )

    assert len(found) == 31 * 42
    assert [row for row in found if row[2] != row[3]] == []
    assert len({row[3] for row in found}) > 20


async def test_of_users_who_came_back_few_rows_are_read_however_many_there_are(database):
    async with database.connection() as conn, conn.transaction():
        await conn.execute(
            """
            INSERT INTO chat.rollup_visits
            SELECT 'day', date '2026-03-02' + day, gap, 1 FROM generate_series(0, 57) AS day, generate_series(1, 300) AS gap
            UNION ALL
            SELECT 'week', date '2026-03-02' + 7 * week, gap, 1 FROM generate_series(0, 7) AS week, generate_series(1, 50) AS gap;
            SET LOCAL enable_seqscan = off;
            SET LOCAL enable_bitmapscan = off;
            -- The function's, made on this connection for tables of a few rows.
            DISCARD PLANS
            """
        )
        read = "SELECT idx_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'rollup_visits'"
        before = tuple(await conn.fetchrow(read))
        await conn.fetchval("SELECT analytics.active_users('2026-03-02', '2026-04-27')")
        whole_weeks = tuple(await conn.fetchrow(read))
        await conn.fetchval("SELECT analytics.active_users('2026-03-04', '2026-04-29')")
        cut_weeks = tuple(await conn.fetchrow(read))

    # By the day alone they would be 55 * 56 / 2 = 1,540 rows.
    assert whole_weeks == (before[0] + 7, before[1] + sum(range(8)))
    # 7 weeks; 5 days before them, after each of their days; the rest of those days; 2 days after the weeks.
    assert cut_weeks[1] - whole_weeks[1] == sum(range(7)) + 49 * 5 + sum(range(5)) + 54 + 55


async def test_measures_and_rankings_are_read_from_their_indexes_alone(store, database):
    await record(store, said(), answered())
    await count_all(database)
    # Few rows are read faster as they lie.
    settings = ("enable_seqscan = off", "enable_bitmapscan = off", "enable_sort = off")
    indexes = set()
    for name in ("drop_off", "longest_sessions", "slowest_sessions"):
        found = await run(database, name, since=date(2026, 3, 8), until=date(2026, 3, 15))
        lines = await explained(database, found.sql, *settings)
        indexes |= {line.split()[5] for line in lines if line.startswith("->  Index Only Scan using ")}

    assert {
        "rollup_session_histograms_pkey",
        "rollup_sessions_messages_idx",
        "rollup_sessions_slowest_idx",
    } <= indexes


class TestSources:
    """What roll-ups say is what the messages say."""

    @pytest.fixture(scope="class")
    async def database(self, database_url, anyio_backend):
        """A random history, written once: these tests only read."""
        database = Database(create_engine(database_url, application_name="tests"))
        await empty(database)
        await claim_state(database, redis_only=None)
        await record_random_history(PostgresChatSessionStore(database, ttl_seconds=3600), database)
        yield database
        await database.close()

    @pytest.mark.parametrize("granularity", ["hour", "day", "week", "month"])
    @pytest.mark.parametrize(
        "timezone", ["Asia/Ho_Chi_Minh", "UTC", "Asia/Kathmandu", "America/New_York", "Australia/Lord_Howe"]
    )
    @pytest.mark.parametrize("name", PLAIN)
    async def test_roll_ups_say_what_the_messages_say(self, database, name, timezone, granularity):
        asked = {"timezone": timezone, "granularity": granularity, "limit": 100}
        span = {"since": date(2026, 3, 8), "until": date(2026, 3, 15)}

        found = await run(database, name, **span, **asked)
        expected = await run(database, name, **span, **asked, plain=True)

        assert exact_part(found) == exact_part(expected)
        assert expected.source == "messages"
        assert found.rows

    @pytest.mark.parametrize(
        ("timezone", "rolled_up"),
        [
            ("Asia/Ho_Chi_Minh", set(PLAIN)),
            ("UTC", set(PLAIN) - {"active_users", "top_sources"}),
            (
                "Asia/Kathmandu",
                set(PLAIN) - {"active_users", "top_sources", "response_time", "response_time_percentiles"},
            ),
        ],
    )
    async def test_what_is_read_from_roll_ups(self, database, timezone, rolled_up):
        span = {"since": date(2026, 3, 8), "until": date(2026, 3, 15), "timezone": timezone}

        assert {
            name for name in PLAIN if (await run(database, name, **span)).source == "roll-ups"
        } == rolled_up

    @pytest.mark.parametrize("name", PLAIN)
    async def test_a_user_and_a_cut_range_are_read_from_the_messages(self, database, name):
        cut = {"since": SINCE + 90 * MOMENT, "until": UNTIL}

        of_user = await run(
            database, name, since=date(2026, 3, 8), until=date(2026, 3, 15), user_id="o'neil\\"
        )
        assert of_user.source == (await run(database, name, **cut)).source == "messages"

    @pytest.mark.parametrize("name", REPORTS)
    @pytest.mark.parametrize("granularity", ["day", "week", "month"])
    async def test_the_statement_can_be_typed(self, database, name, granularity):
        user = {"user_id": "o'neil\\"} if REPORTS[name].plain else {}
        found = await run(
            database, name, since=date(2026, 3, 8), until=date(2026, 3, 15), granularity=granularity, **user
        )

        typed = await fetch(database, found.sql)

        assert len(typed) == len(found.rows)

    @pytest.mark.parametrize(
        "name", [name for name, one in REPORTS.items() if "days" in one.variants and not one.plain]
    )
    async def test_days_of_another_zone_are_refused_where_there_are_no_hours(self, database, name):
        with pytest.raises((TimezoneRefused, RangeRefused), match="is made of days of Asia/Ho_Chi_Minh"):
            await run(
                database,
                name,
                since=datetime(2026, 3, 8, 0, 30, tzinfo=UTC),
                until=date(2026, 3, 15),
                timezone="America/New_York",
            )

    async def test_percentiles_of_roll_ups_are_within_their_error(self, database):
        span = {"since": date(2026, 3, 6), "until": date(2026, 3, 19)}
        times = sorted(
            row[0]
            for row in await fetch(
                database,
                "SELECT processing_time_ms FROM analytics.messages WHERE role = 'assistant' AND "
                "processing_time_ms IS NOT NULL AND created_at >= '2026-03-05 17:00+00' AND created_at < '2026-03-18 17:00+00'",
            )
        )

        [found] = (await run(database, "response_time", **span)).rows

        expected = [times[math.ceil(share * len(times)) - 1] for share in (0.5, 0.95)]
        assert found[1] == len(times)
        assert found[3:] == tuple(pytest.approx(one, rel=0.025) for one in expected)

    async def test_a_summary_has_the_range_before(self, database):
        now = {"since": date(2026, 3, 11), "until": date(2026, 3, 15)}
        before = {"since": date(2026, 3, 7), "until": date(2026, 3, 11)}

        found = {row[0]: row[1:] for row in (await run(database, "summary", **now)).rows}

        for which, span in enumerate((now, before)):
            traffic = (await run(database, "traffic", **span, granularity="day", plain=True)).rows
            asked = (await run(database, "unanswered_rate", **span, granularity="month", plain=True)).rows
            [[users]] = await fetch(
                database,
                "SELECT count(DISTINCT user_id) FROM analytics.messages WHERE role = 'user' AND "
                f"(created_at AT TIME ZONE 'Asia/Ho_Chi_Minh')::date >= '{span['since']}' AND "
                f"(created_at AT TIME ZONE 'Asia/Ho_Chi_Minh')::date < '{span['until']}'",
            )
            assert found["sessions"][which] == sum(row[1] for row in traffic)
            assert found["messages"][which] == sum(row[2] for row in traffic)
            assert found["active_users"][which] == users
            assert found["unanswered_rate"][which] == pytest.approx(asked[0][3])
            [timed] = (await run(database, "response_time", **span)).rows
            assert found["response_time_p95_ms"][which] == pytest.approx(timed[4])
        value, previous, change = found["sessions"]
        assert change == pytest.approx((value - previous) / previous)

    async def test_a_wide_range_is_not_read_from_the_messages(self, database):
        with pytest.raises(RangeRefused, match="at most 92 are read message by message"):
            await run(database, "traffic", since=SINCE, until=SINCE + timedelta(days=93), user_id="an")

    async def test_a_report_without_users_refuses_one(self, database):
        with pytest.raises(UserRefused, match="report retention is not made of one user"):
            await run(database, "retention", user_id="an")

    @pytest.mark.parametrize("zone", ["Mars/Olympus", "UTC+7", "'", ""])
    async def test_an_unknown_time_zone_is_refused(self, database, zone):
        with pytest.raises(UnknownTimezone):
            await run(database, "traffic", timezone=zone)

    async def test_periods_finer_than_the_report_are_refused(self, database):
        with pytest.raises(GranularityRefused, match="report session_outcomes is made of days"):
            await run(database, "session_outcomes", granularity="hour")


class TestViews:
    async def test_a_turn_is_a_question_and_the_answer_that_follows_it(self, store, database):
        session = await record(
            store,
            answered(at=NOON),
            said(NOON + 1 * MOMENT, content="answered?"),
            answered({"processing_time_ms": 5, "sources": ["a", "b"]}, at=NOON + 2 * MOMENT),
            answered(at=NOON + 3 * MOMENT),
            said(NOON + 4 * MOMENT, content="overtaken?"),
            said(NOON + 5 * MOMENT, content="by a tool?"),
            said(role="tool"),
            answered(),
            said(NOON + 8 * MOMENT, content="the last?"),
        )

        turns = await fetch(
            database,
            "SELECT session_id, user_id, question, question_seq, answer_seq, answer, asked_at, answered_at, "
            "processing_time_ms, source_count FROM analytics.turns ORDER BY question_seq",
        )

        asked, unanswered = (session, "an"), (None, None)
        assert turns == [
            (*asked, "answered?", 2, 3, "Có ba điều kiện.", NOON + 1 * MOMENT, NOON + 2 * MOMENT, 5, 2),
            (*asked, "overtaken?", 5, *unanswered, NOON + 4 * MOMENT, None, None, None),
            (*asked, "by a tool?", 6, *unanswered, NOON + 5 * MOMENT, None, None, None),
            (*asked, "the last?", 9, *unanswered, NOON + 8 * MOMENT, None, None, None),
        ]

    async def test_a_question_is_never_paired_with_another_session(self, store, database):
        await record(store, said(content="mine?"))
        await record(store, said(content="theirs?"), answered(), user_id="bình")

        turns = await fetch(
            database, "SELECT user_id, question, answer_seq FROM analytics.turns ORDER BY user_id"
        )

        assert turns == [("an", "mine?", None), ("bình", "theirs?", 2)]

    async def test_a_message_knows_its_user_and_its_metadata_by_value(self, store, database):
        await record(store, said(metadata={"source": "web", "n": 1}), said(metadata={"note": "\0"}))

        messages = await fetch(
            database,
            'SELECT user_id, seq, role, metadata = \'{"n": 1, "source": "web"}\' FROM analytics.messages '
            "ORDER BY seq",
        )

        assert messages == [("an", 1, "user", True), ("an", 2, "user", None)]

    async def test_a_session_has_its_count_of_messages(self, store, database):
        await record(store, said(), answered())

        sessions = await fetch(
            database, "SELECT user_id, message_count, metadata = '{}' FROM analytics.sessions"
        )

        assert sessions == [("an", 2, True)]

    @pytest.mark.parametrize("view", ["messages", "turns"])
    async def test_sessions_are_not_read_where_the_user_is_not_asked_for(self, database, view):
        plan = await fetch(database, f"EXPLAIN SELECT count(*) FROM analytics.{view}")

        assert "chat_messages" in str(plan)
        assert "chat_sessions" not in str(plan)

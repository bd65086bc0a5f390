"""`GET /api/analytics` and `GET /api/analytics/{report}`."""

import asyncio
import csv
import io
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest

from app.analytics.reports import REPORTS
from app.analytics.rollups import Rollups
from app.api import reports
from app.api.reports import REPORTS_AT_ONCE
from app.chat import utc_now
from app.postgres.engine import Database, create_engine
from tests.integration.api_client import assert_problem, empty_stores, for_mode, open_api

pytestmark = pytest.mark.anyio

CALL = "/api/analytics"


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings) as api:
        yield api


@pytest.fixture
async def session(api, database_url):
    """A session of hà with three messages, counted."""
    session = await api.new_session("hà")
    await api.record(session, "Điều kiện?", "Có ba.", "khác")
    database = Database(create_engine(database_url, application_name="tests"))
    counting = Rollups(database, timezone="UTC")
    while (now := await counting.pending()).marks or now.backfills:
        await counting.round()
    await database.close()
    yield session.rpartition("/")[2]
    await api.delete(session)


async def test_all_reports_are_listed_with_their_parameters(api):
    listed = (await api.get(CALL)).json()["reports"]

    assert {one["name"]: one["definition"] for one in listed} == {
        one.name: one.definition for one in REPORTS.values()
    }
    assert next(one["parameters"] for one in listed if one["name"] == "top_sources") == [
        *("from", "to", "timezone", "user_id", "limit")
    ]


async def test_a_report_says_what_it_is_and_how_current(api, session):
    today = utc_now().date()

    body = (await api.get(f"{CALL}/traffic", params={"from": str(today), "granularity": "day"})).json()

    assert body["rows"] == [
        {"period": str(today), "sessions": 1, "messages": 3, "user_messages": 3, "bot_messages": 0}
    ]
    assert body["columns"][:2] == [{"name": "period", "unit": "time"}, {"name": "sessions", "unit": "count"}]
    assert (body["report"], body["from"], body["timezone"]) == ("traffic", f"{today}T00:00:00.000Z", "UTC")
    assert (body["granularity"], body["source"], body["complete"]) == ("day", "roll-ups", True)
    assert body["lag_seconds"] < 60
    assert body["definition"] == REPORTS["traffic"].definition
    assert body["sql"].startswith("WITH periods")


@pytest.mark.parametrize("report", REPORTS)
async def test_every_report_answers_in_both_forms(api, session, report):
    found = await api.get(f"{CALL}/{report}")
    lines = await api.get(f"{CALL}/{report}", headers={"Accept": "text/csv"})

    assert (found.status_code, lines.status_code) == (200, 200)
    assert lines.headers["content-type"] == "text/csv; charset=utf-8"
    assert lines.headers["x-rollups-complete"] == "true"
    columns, *rows = csv.reader(io.StringIO(lines.text))
    assert columns == [column["name"] for column in found.json()["columns"]]
    assert len(rows) == len(found.json()["rows"])


async def test_one_user_is_read_from_the_messages(api, session):
    params = {"user_id": "hà", "granularity": "day", "from": str(utc_now().date())}

    body = (await api.get(f"{CALL}/traffic", params=params)).json()

    assert (body["source"], body["rows"][0]["messages"]) == ("messages", 3)


@pytest.mark.parametrize(
    ("report", "params", "code", "field"),
    [
        ("cost", {}, "unknown_report", "path.report"),
        ("traffic", {"from": "2025-11-14", "to": "2025-11-13"}, "range_refused", "query.from"),
        ("traffic", {"from": "2001-11-14", "to": "2025-11-13"}, "range_refused", "query.from"),
        ("top_questions", {"from": "2025-11-14", "to": "2025-11-22"}, "range_refused", "query.from"),
        ("traffic", {"from": "yesterday"}, "validation_failed", "query.from"),
        ("traffic", {"to": "2025-02-30"}, "validation_failed", "query.to"),
        ("traffic", {"from": "0001-01-01T00:00:00+07:00"}, "validation_failed", "query.from"),
        ("traffic", {"to": "9999-12-31T23:59:59-23:59"}, "validation_failed", "query.to"),
        ("traffic", {"user": "hà"}, "unknown_parameter", "query.user"),
        ("traffic", {"timezone": "Mars/Olympus"}, "unknown_timezone", "query.timezone"),
        ("traffic", {"granularity": "minute"}, "validation_failed", "query.granularity"),
        ("retention", {"timezone": "Asia/Tokyo"}, "timezone_refused", "query.timezone"),
        ("retention", {"user_id": "hà"}, "user_refused", "query.user_id"),
        ("session_outcomes", {"granularity": "hour"}, "granularity_refused", "query.granularity"),
        ("top_sources", {"limit": "0"}, "validation_failed", "query.limit"),
        ("top_sources", {"format": "xml"}, "validation_failed", "query.format"),
    ],
)
async def test_bad_input_is_named(api, session, report, params, code, field):
    answer = await api.get(f"{CALL}/{report}", params=params)

    assert_problem(answer, 422, code)
    assert answer.json()["errors"][0]["path"].startswith(field)


async def test_more_reports_than_share_the_connections_wait_and_are_told_to(api, session, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(reports, "WAIT_SECONDS", 0.05)
        async with AsyncExitStack() as under_way:
            for _ in range(REPORTS_AT_ONCE):
                await under_way.enter_async_context(api.app.state.reports)
            refused = await api.get(f"{CALL}/traffic")

    assert_problem(refused, 503, "overloaded")
    assert refused.headers["Retry-After"] == "1"
    answers = await asyncio.gather(*(api.get(f"{CALL}/{name}") for name in REPORTS))
    assert {answer.status_code for answer in answers} == {200}


async def test_without_an_archive_there_is_none_to_report_on(settings):
    async with open_api(for_mode(settings, "redis-only")) as api:
        assert_problem(await api.get(f"{CALL}/traffic"), 409, "no_archive")


async def test_the_default_is_30_days_with_today(api, session):
    body = (await api.get(f"{CALL}/sessions_per_day")).json()

    assert len(body["rows"]) == 30
    assert body["rows"][-1] == {"day": str(utc_now().date()), "sessions": 1}
    assert body["to"] == f"{utc_now().date() + timedelta(days=1)}T00:00:00.000Z"

"""What `/analytics` shows is what the reports say; each panel leads to its SQL, its CSV and the transcripts behind it."""

import csv
import io
import json
import re
from datetime import date

import pytest

from app.analytics.rollups import Rollups
from app.postgres.engine import Database, create_engine
from app.web.analytics import CHARTS, cohorts, heatmap, step_of
from app.web.languages import Language
from tests.integration.api_client import empty_stores, for_mode, open_api
from tests.integration.test_pages import LOOKING, Html

pytestmark = pytest.mark.anyio

HOSTILE = '</script><script>alert("x")</script>'

PANELS = (
    *("summary", "traffic_heatmap", "retention", "top_sources", "longest_sessions", "slowest_sessions"),
    *(chart.report for chart in CHARTS),
)


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings) as api:
        yield api


@pytest.fixture(scope="module")
async def counted(api, database_url):
    """Two sessions with answers that name their sources, counted into the roll-ups."""
    for user in ("hà", HOSTILE):
        session = await api.new_session(user)
        answer = {
            "role": "assistant",
            "content": "Có ba.",
            "metadata": {"processing_time_ms": 1234, "sources": [HOSTILE]},
        }
        body = {"messages": [{"role": "user", "content": "Điều kiện?"}, answer]}
        assert (await api.post(f"{session}/history", json=body)).status_code == 200
    database = Database(create_engine(database_url, application_name="tests"))
    counting = Rollups(database, timezone="UTC")
    while (now := await counting.pending()).marks or now.backfills:
        await counting.round()
    await database.close()


async def page(api, query=""):
    answer = await api.get(f"/analytics{query}", headers=LOOKING)
    assert answer.status_code == 200, answer.text
    return answer.text, Html(answer.text)


async def test_the_panels_say_what_the_reports_say(api, counted):
    source, html = await page(api)

    assert "Sessions 2 " in html.text
    assert "Messages 4 " in html.text
    assert "Active users 2 " in html.text
    drawn = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', source)]
    assert len(drawn) == len(CHARTS)
    for chart, told in zip(CHARTS, drawn, strict=True):
        body = (await api.get(f"/api/analytics/{chart.report}")).json()
        assert told["lines"] == [[row[line] for row in body["rows"]] for line in chart.lines]
        assert len(told["times"]) == len(body["rows"])
    assert drawn[0]["lines"][0][-1] == 4


async def test_every_panel_leads_to_its_sql_and_to_the_same_rows_as_csv(api, counted):
    source, html = await page(api, "?days=7&granularity=day")

    assert source.count('<pre class="sql"') == len(PANELS)
    assert "analytics.sessions_daily" in html.text or "analytics.messages_hourly" in html.text
    links = {one["href"] for one in html.of("a") if "download" in one}
    assert {link.partition("?")[0] for link in links} == {f"/api/analytics/{name}" for name in PANELS}
    for link in links:
        answer = await api.get(link)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/csv")
    [traffic] = [link for link in links if "/traffic?" in link]
    rows = list(csv.DictReader(io.StringIO((await api.get(traffic)).text)))
    assert (len(rows), rows[-1]["messages"]) == (7, "4")
    assert any(one.get("href", "").startswith("/sessions?from=") for one in html.of("a"))


async def test_what_people_and_assistants_wrote_is_only_ever_text(api, counted):
    source, html = await page(api)

    assert HOSTILE not in source
    assert HOSTILE in html.text
    assert all("src" in one or one == {"type": "application/json"} for one in html.of("script"))


async def test_the_range_stands_in_the_address_and_in_the_form(api, counted):
    _, html = await page(api, "?from=2025-11-14&to=2025-11-21&granularity=day&timezone=UTC")

    fields = {one["name"]: one.get("value") for one in html.of("input")}
    assert fields == {"from": "2025-11-14", "to": "2025-11-21", "timezone": "UTC", "user_id": ""}
    assert {"value": "day", "selected": None} in html.of("option")
    assert "From 2025-11-14 00:00 to 2025-11-21 00:00 UTC" in html.text
    other = next(one["href"] for one in html.of("a") if one["href"].endswith("days=7"))
    assert "granularity=day" in other
    assert "from" not in other


async def test_a_field_of_the_form_may_be_left_empty(api, counted):
    _, html = await page(api, "?from=&to=&timezone=&user_id=&days=7")

    assert {"type": "hidden", "name": "days", "value": "7"} in html.of("input")


async def test_one_users_numbers_are_shown_and_panels_that_have_none_say_so(api, counted):
    _, html = await page(api, "?user_id=h%C3%A0")

    assert "is not made of one user" in html.text
    drawn = [one for one in html.words if one.startswith('{"')]
    assert json.loads(drawn[0])["lines"][0][-1] == 2


async def test_an_archive_without_anything_is_shown_as_empty(api, counted):
    _, html = await page(api, "?from=2001-01-01&to=2001-01-08")

    assert html.text.count("Nothing in this range") >= 5
    assert "nothing to compare with" in html.text


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?timezone=Mars/Olympus", "query.timezone: there is no time zone"),
        ("?from=2025-11-14&to=2025-11-13", "query.from: the range ends"),
        ("?from=yesterday", "query.from: should be a day"),
        ("?days=0", "query.days"),
        ("?granularity=minute", "query.granularity"),
    ],
)
async def test_a_range_that_can_not_be_is_refused_by_name(api, query, said):
    answer = await api.get(f"/analytics{query}", headers=LOOKING)

    assert answer.status_code == 422
    assert said in Html(answer.text).text


async def test_without_a_database_there_is_no_archive_to_look_at(settings):
    async with open_api(for_mode(settings, "redis-only")) as api:
        _, html = await page(api)

    assert "There is no archive" in html.text
    assert not html.of("form")


def test_a_heat_maps_steps_go_from_something_to_the_most():
    assert [step_of(value, 600) for value in (0, 1, 99, 100, 599, 600)] == [0, 1, 1, 2, 6, 6]
    rows = [{"weekday": 1, "hour": 9, "messages": 600}, {"weekday": 7, "hour": 23, "messages": 0}]
    assert heatmap(rows) == {(1, 9): (600, 6)}


def test_a_week_in_which_nobody_came_back_is_0_and_one_that_has_not_begun_is_nothing():
    rows = [
        {"cohort_week": date(2025, 11, 3), "weeks_later": 0, "cohort_users": 4, "retention_rate": 1.0},
        {"cohort_week": date(2025, 11, 3), "weeks_later": 2, "cohort_users": 4, "retention_rate": 0.5},
        {"cohort_week": date(2025, 11, 17), "weeks_later": 0, "cohort_users": 1, "retention_rate": 1.0},
    ]

    first, second = cohorts(rows, until=date(2025, 11, 20))

    assert (first.users, first.weeks) == (4, ((1.0, 6), (0.0, 0), (0.5, 4)))
    assert second.weeks == ((1.0, 6), None, None)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (9_949, "9.9k"),
        (9_960, "10k"),
        (999_600, "1.0M"),
        (12_345_678, "12M"),
    ],
)
def test_a_number_in_a_cell_is_short(value, shown):
    assert Language("en").short(value) == shown
    assert Language("vi").short(value) == shown.replace(".", ",")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.0001, "1 ms"),
        (0.035, "35 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (3.5, "3.5 s"),
        (90, "90 s"),
        (600, "10 min"),
    ],
)
def test_a_duration_has_the_unit_that_is_read_at_once(seconds, shown):
    assert Language("en").duration(seconds) == shown

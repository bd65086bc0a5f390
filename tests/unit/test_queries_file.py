"""The file of named queries, and how it is read."""

from datetime import UTC, datetime, timedelta

import pytest

from app.analytics.reports import REPORTS, Query, last_days, parse_queries

TWO = """\
-- A preamble; it belongs to no query.

-- first --
-- What the first one says,
-- in two lines; with a semicolon.
SELECT 1 -- a comment of the statement
FROM somewhere;

-- second_2 --
-- What the second one says.
SELECT 2;
"""


def test_a_query_is_a_name_a_definition_and_a_statement():
    assert parse_queries(TWO) == {
        "first": Query(
            name="first",
            definition="What the first one says, in two lines; with a semicolon.",
            sql="SELECT 1 -- a comment of the statement\nFROM somewhere",
        ),
        "second_2": Query(name="second_2", definition="What the second one says.", sql="SELECT 2"),
    }


def test_a_file_without_queries_has_none():
    assert parse_queries("-- a preamble\n") == {}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("-- a --\nSELECT 1;\n", id="no definition"),
        pytest.param("-- a --\n-- What it says.\n", id="no statement"),
        pytest.param("-- a --\n-- What it says.\n;\n", id="an empty statement"),
        pytest.param("-- a --\n-- What it says.\nSELECT 1\n", id="no semicolon"),
        pytest.param("-- a --\n-- What it says.\nSELECT 1; SELECT 2;\n", id="two statements"),
        pytest.param("-- a --\n\n-- What it says.\nSELECT 1;\n", id="the definition stands apart"),
    ],
)
def test_a_query_that_is_not_whole_is_refused_by_name(broken: str):
    with pytest.raises(ValueError, match="query a: expected its definition, then one statement"):
        parse_queries(broken)


def test_a_name_that_is_there_twice_is_refused():
    once = "-- a --\n-- What it says.\nSELECT 1;\n"

    with pytest.raises(ValueError, match="query a is there twice"):
        parse_queries(once + once)


def test_the_reports_have_the_names_of_the_field():
    assert list(REPORTS) == [
        "sessions_per_day",
        "messages_by_role",
        "response_time",
        "active_users",
        "top_sources",
    ]


@pytest.mark.parametrize("query", REPORTS.values(), ids=REPORTS)
def test_a_report_has_a_sentence_and_is_bounded_in_time(query: Query):
    assert query.definition.endswith(".")
    assert query.definition.count(". ") == 0
    assert "created_at < :until" in query.sql
    assert ":since" in query.sql


@pytest.mark.parametrize("query", REPORTS.values(), ids=REPORTS)
def test_a_report_reads_the_public_views_only(query: Query):
    assert "analytics." in query.sql
    assert "chat." not in query.sql


@pytest.mark.parametrize(
    ("until", "begin"),
    [
        (datetime(2026, 3, 10, 15, 30, tzinfo=UTC), datetime(2026, 3, 4, tzinfo=UTC)),
        (datetime(2026, 3, 10, tzinfo=UTC), datetime(2026, 3, 3, tzinfo=UTC)),
        (datetime(2026, 3, 10, 0, 0, 0, 1, tzinfo=UTC), datetime(2026, 3, 4, tzinfo=UTC)),
    ],
)
def test_the_last_days_are_whole_and_include_the_one_that_runs(until: datetime, begin: datetime):
    assert last_days(7, until=until) == begin


def test_the_last_days_begin_at_midnight_utc_of_an_instant_in_any_zone():
    elsewhere = datetime.fromisoformat("2026-03-11T03:00:00+07:00")

    assert last_days(1, until=elsewhere) == datetime(2026, 3, 10, tzinfo=UTC)
    assert last_days(1, until=elsewhere).utcoffset() == timedelta(0)

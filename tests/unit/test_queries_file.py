"""The file of named queries, and how it is read."""

import re

import pytest

from app.analytics.reports import REPORTS, Query, parse_queries

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


def test_a_report_of_questions_is_marked():
    [query] = parse_queries("-- a folded --\n-- What it says.\nSELECT 1;\n").values()

    assert query == Query(name="a", definition="What it says.", sql="SELECT 1", folded=True)
    assert list(query.variants) == ["folded"]
    assert query.parameters == ("from", "to", "timezone", "user_id", "limit")


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


def test_a_report_keeps_its_name():
    assert {"sessions_per_day", "messages_by_role", "response_time", "active_users", "top_sources"} <= set(
        REPORTS
    )


@pytest.mark.parametrize("query", REPORTS.values(), ids=REPORTS)
def test_a_report_says_what_it_is_and_is_bounded_in_time(query: Query):
    assert query.definition.endswith(".")
    assert query.definition.count(". ") <= 1
    for sql in query.variants.values():
        assert re.search(
            r"< :(until|end_day)|CAST\(:end_day AS date\)|:granularity AND period|, :end_day\)", sql
        )
        assert re.search(r">= (:since|:first_day)|CAST\(:(since|first_day) AS|, :first_day, ", sql)


def test_a_variant_before_its_query_is_refused():
    with pytest.raises(ValueError, match="query a plain is there twice, or stands before its first"):
        parse_queries("-- a plain --\nSELECT 1;\n")


@pytest.mark.parametrize("query", REPORTS.values(), ids=REPORTS)
def test_a_report_reads_the_public_views_only(query: Query):
    assert "analytics." in query.sql
    assert "chat." not in query.sql

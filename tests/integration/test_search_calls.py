"""`GET /api/analytics/search` and `chat-sessions search`."""

import asyncio
import json
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest
from typer.testing import CliRunner

from app.api.search import SEARCHES_AT_ONCE
from app.chat import format_time, parse_time, utc_now
from app.cli.main import app
from tests.integration.api_client import assert_problem, empty_stores, for_mode, open_api

pytestmark = pytest.mark.anyio

SEARCH = "/api/analytics/search"
HOSTILE = '<script>alert("điều kiện")</script>\x1b[31m\t\u202e'


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings) as api:
        yield api


@pytest.fixture
async def session(api):
    session = await api.new_session("hà")
    await api.record(session, "Điều kiện tham gia đấu thầu?", HOSTILE, "khác")
    yield session.rpartition("/")[2]
    await api.delete(session)


@pytest.fixture
def call(tmp_path, monkeypatch, database_url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setenv("DATABASE_URL", database_url)

    async def call_(*arguments):
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments))

    return call_


async def test_a_hit_says_where_it_is_and_marks_what_was_found(api, session):
    answer = await api.get(SEARCH, params={"q": "dieu kien tham", "user_id": "hà", "role": "user"})

    body = answer.json()
    [hit] = body["hits"]
    assert abs(utc_now() - timedelta(days=7) - parse_time(body["searched_from"])) < timedelta(minutes=1)
    assert (body["partial"], "next" in body) == (False, False)
    assert hit.pop("created_at") <= format_time(utc_now())
    assert hit == {
        "session_id": session,
        "user_id": "hà",
        "seq": 1,
        "role": "user",
        "snippet": "Điều kiện tham gia đấu thầu?",
        "snippet_start": 0,
        "content_characters": 28,
        "marks": [[0, 4], [5, 9], [10, 14]],
    }


async def test_text_is_given_as_it_was_stored(api, session):
    [hit, _] = (await api.get(SEARCH, params={"q": '"điều kiện"'})).json()["hits"]

    assert hit["snippet"] == HOSTILE
    assert [HOSTILE[begin:end] for begin, end in hit["marks"]] == ["điều kiện"]


async def test_pages_follow_each_other(api, session):
    params = {"q": "dieu", "limit": 1}
    seqs = []
    while params.get("after", "first"):
        body = (await api.get(SEARCH, params=params)).json()
        seqs += [hit["seq"] for hit in body["hits"]]
        params["after"] = body.get("next")

    assert seqs == [2, 1]


async def test_a_deleted_session_is_gone(api):
    session = await api.new_session("hà")
    await api.record(session, "vắng mặt")
    await api.delete(session)

    assert (await api.get(SEARCH, params={"q": "vang mat"})).json()["hits"] == []


@pytest.mark.parametrize(
    ("params", "code", "path"),
    [
        ({}, "validation_failed", "query.q"),
        ({"q": ""}, "validation_failed", "query.q"),
        ({"q": "a"}, "validation_failed", "query.q"),
        ({"q": "a" * 201}, "validation_failed", "query.q"),
        ({"q": "   "}, "query_refused", "query.q"),
        ({"q": "%%"}, "query_refused", "query.q"),
        ({"q": "a\u0301"}, "query_refused", "query.q"),
        ({"q": "ab\0"}, "text_not_storable", "query.q"),
        ({"q": "ab", "match": "regex"}, "validation_failed", "query.match"),
        ({"q": "ab", "role": "bot"}, "validation_failed", "query.role"),
        ({"q": "ab", "limit": "0"}, "validation_failed", "query.limit"),
        ({"q": "ab", "since": "2026-03-01"}, "unknown_parameter", "query.since"),
        ({"q": "ab", "limit": "101"}, "validation_failed", "query.limit"),
        ({"q": "ab", "user_id": ""}, "validation_failed", "query.user_id"),
        ({"q": "ab", "from": "yesterday"}, "validation_failed", "query.from"),
        ({"q": "ab", "from": "2026-02-30"}, "validation_failed", "query.from"),
        ({"q": "ab", "to": "1763116200"}, "validation_failed", "query.to"),
        ({"q": "ab", "to": "0001-01-01T00:00:00Z"}, "validation_failed", "query.to"),
        ({"q": "ab", "to": "9999-12-31T23:59:59-23:59"}, "validation_failed", "query.to"),
        ({"q": "ab", "from": "2026-03-02", "to": "2026-03-01"}, "range_refused", "query.from"),
        ({"q": "ab", "from": "2026-03-01", "to": "2026-03-01"}, "range_refused", "query.from"),
        ({"q": "ab", "from": "2025-03-01", "to": "2026-03-01"}, "range_refused", "query.from"),
        ({"q": "ab", "from": "3000-01-01"}, "range_refused", "query.from"),
        ({"q": "ab", "after": "1.2.3"}, "unknown_cursor", "query.after"),
        ({"q": "ab", "after": f"1.2.{'0' * 32}.9999999999"}, "unknown_cursor", "query.after"),
        ({"q": "ab", "after": f"1.99999999999999.{'0' * 32}.1"}, "range_refused", "query.after"),
    ],
)
async def test_bad_input_is_refused_by_name(api, params, code, path):
    problem = assert_problem(await api.get(SEARCH, params=params), 422, code)

    assert path in {error["path"] for error in problem["errors"]}


async def test_searches_leave_connections_to_the_chats(api, session):
    async with AsyncExitStack() as under_way:
        for _ in range(SEARCHES_AT_ONCE):
            await under_way.enter_async_context(api.app.state.searches)
        refused = await api.get(SEARCH, params={"q": "ab"})

    assert_problem(refused, 503, "overloaded")
    assert refused.headers["Retry-After"] == "2"
    assert (await api.get(SEARCH, params={"q": "ab"})).status_code == 200


async def test_without_an_archive_there_is_nothing_to_search(settings):
    async with open_api(for_mode(settings, "redis-only")) as api:
        assert_problem(await api.get(SEARCH, params={"q": "ab"}), 409, "no_archive")


async def test_the_command_prints_a_line_a_hit_without_what_a_terminal_would_obey(call, session):
    done = await call("search", "dieu", "kien", "--user", "hà")

    assert (done.exit_code, done.stderr) == (0, "")
    head, hostile, plain = done.stdout.splitlines()
    assert head.split("\t") == ["at", "session", "seq", "role", "user", "text"]
    assert plain.split("\t")[1:] == [session, "1", "user", "hà", "Điều kiện tham gia đấu thầu?"]
    assert "\x1b" not in hostile


async def test_the_command_prints_json(call, session):
    done = await call("search", "u kiện", "--substring", "--limit", "1", "--json")

    body = json.loads(done.stdout)
    assert (body["more"], [hit["seq"] for hit in body["hits"]]) == (True, [2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["%%"], "error: what is searched for holds no letter or digit (search for a substring instead)"),
        (["a"], "error: what is searched for has 1 characters"),
        (["ab", "--from", "2026-03-02", "--to", "2026-03-01"], "not after its begin"),
        (["ab", "--from", "2025-03-01", "--to", "2026-03-01"], "at most 92"),
        (["ab", "--role", "bot"], "bot"),
        (["ab", "--from", "soon"], "soon"),
    ],
)
async def test_the_command_says_what_it_can_t_do(call, arguments, said):
    done = await call("search", *arguments)

    assert done.exit_code != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


async def test_an_index_is_built_shown_and_dropped(call, settings):
    built = json.loads((await call("search-index", "build", "--json")).stdout)
    shown = await call("search-index", "status")
    dropped = json.loads((await call("search-index", "drop", "--json")).stdout)

    assert "chat_messages_legacy" in built["built"]
    assert [
        line.split("\t")[1] for line in shown.stdout.splitlines() if line.startswith("chat_messages_legacy")
    ] == ["yes"]
    assert dropped["dropped"] == built["built"]


async def test_an_index_is_not_built_through_a_pooler(call, monkeypatch):
    monkeypatch.setenv("DATABASE_POOLER", "transaction")

    done = await call("search-index", "build")

    assert done.exit_code == 1
    assert "DATABASE_POOLER=none" in done.stderr

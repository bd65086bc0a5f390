"""The short way in and the routes answer alike: plain requests take the first, everything else the second."""

import re

import pytest

from app.api import hot
from tests.integration.api_client import SESSIONS, UNKNOWN, empty_stores, for_mode, open_api

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
RECORD = b'{"messages":[{"role":"user","content":"hello"}]}'


@pytest.fixture(scope="module")
async def api(servers, database_url):
    async with open_api(for_mode(await empty_stores(servers, database_url), "hybrid")) as api:
        yield api


@pytest.fixture
def routes_only(monkeypatch):
    def only():
        monkeypatch.setattr(hot, "_PATH", re.compile("nothing"))

    return only


@pytest.fixture
def routes_forbidden(api):
    """The application without its routes."""

    async def nobody(scope, _receive, _send):
        raise AssertionError(f"{scope['path']} went to the routes")

    api.app.middleware_stack, behind = nobody, api.app.middleware_stack
    yield
    api.app.middleware_stack = behind


def facts(answer):
    """What a client sees, without what differs from request to request."""
    return answer.status_code, answer.text, dict(answer.headers)


PLAIN_READS = [
    ("", {}),
    ("?max_messages=2", {}),
    ("?max_messages=1&before_seq=3", {}),
    ("?min_seq=0", {}),
    ("?min_seq=999", {}),
    ("?user_id=user123", {}),
    ("?user_id=somebody-else", {}),
    ("", {"If-None-Match": '"3"'}),
    ("", {"If-None-Match": '"2"'}),
]

ODD_READS = [
    ("?max_messages=0", {}),
    ("?max_messages=1001", {}),
    ("?max_messages=-1", {}),
    ("?max_messages=1&max_messages=2", {}),
    ("?max_messages=", {}),
    ("?max_messages=١", {}),
    ("?before_seq=0", {}),
    ("?before_seq=99999999999", {}),
    ("?user_id=", {}),
    ("?user_id=user%31%32%33", {}),
    (f"?user_id={'u' * 300}", {}),
    ("?user_id=%ff", {}),
    ("?unknown=1", {}),
    ("?&", {}),
    ("", {"If-None-Match": "*"}),
    ("", {"If-None-Match": 'W/"3", "1"'}),
    ("", {"If-None-Match": "3"}),
    ("", [("If-None-Match", '"3"'), ("If-None-Match", '"1"')]),
]


@pytest.mark.parametrize(("query", "headers"), PLAIN_READS + ODD_READS)
async def test_a_history_is_the_same_by_both_ways(api, routes_only, query, headers):
    session = await api.new_session()
    await api.record(session, "a", "b", "c")

    short = await api.get(f"{session}/history{query}", headers=headers)
    routes_only()
    routed = await api.get(f"{session}/history{query}", headers=headers)

    assert facts(short) == facts(routed)


@pytest.mark.parametrize(("query", "headers"), PLAIN_READS)
async def test_a_plain_history_needs_no_route(api, routes_forbidden, query, headers):
    session_id = (await api.runtime.store.create_session("user123")).session.session_id

    answer = await api.get(f"{SESSIONS}/{session_id}/history{query}", headers=headers)

    assert answer.status_code in {200, 304, 404, 409}


def posts():
    key = {"Idempotency-Key": "k"}
    return [
        ("history", "", RECORD, JSON),
        ("history", "", RECORD, JSON | key),
        ("history", "?user_id=user123", RECORD, JSON),
        ("history", "?user_id=somebody-else", RECORD, JSON),
        ("history", "?user_id=a&user_id=b", RECORD, JSON),
        ("history", "?max_messages=1", RECORD, JSON),
        ("history", "", RECORD, {"Content-Type": "application/json; charset=utf-8"}),
        ("history", "", RECORD, {"Content-Type": "text/plain"}),
        ("history", "", RECORD, {}),
        ("history", "", RECORD, JSON | {"Idempotency-Key": "two words"}),
        ("history", "", RECORD, JSON | {"If-Match": '"0"'}),
        ("history", "", RECORD, JSON | {"If-Match": '"9"'}),
        ("history", "", RECORD, JSON | {"If-Match": "9"}),
        ("history", "", b"", JSON),
        ("history", "", b"{", JSON),
        ("history", "", b"[]", JSON),
        ("history", "", b'{"messages":[]}', JSON),
        ("history", "", b'{"messages":[{"role":"robot","content":"x"}]}', JSON),
        ("history", "", b'{"messages":[{"role":"user","content":"\\u0000"}]}', JSON),
        ("history", "", RECORD.replace(b"hello", b"x" * 300_000), JSON),
        ("history", "", RECORD.replace(b"hello", b"x" * 1_100_000), JSON),
        ("messages", "", b'{"message":"hello"}', JSON),
        ("messages", "", b'{"message":" "}', JSON),
        ("messages", "", b'{"message":1}', JSON),
    ]


@pytest.mark.parametrize(("what", "query", "body", "headers"), posts())
async def test_a_post_is_the_same_by_both_ways(api, routes_only, what, query, body, headers):
    sessions = [await api.new_session() for _ in range(2)]

    short = await api.post(f"{sessions[0]}/{what}{query}", content=body, headers=headers)
    after_short = await api.get(f"{sessions[0]}/history")
    routes_only()
    routed = await api.post(f"{sessions[1]}/{what}{query}", content=body, headers=headers)
    after_routed = await api.get(f"{sessions[1]}/history")

    def told(answer, session):
        text = answer.text.replace(session.rpartition("/")[2], "ID")
        headers = {name: value for name, value in answer.headers.items() if name != "content-length"}
        return answer.status_code, re.sub(r'("processing_time_ms":)\d+', r"\1N", text), headers

    assert told(short, sessions[0]) == told(routed, sessions[1])
    assert after_short.json()["total_messages"] == after_routed.json()["total_messages"]


async def test_a_plain_post_needs_no_route(api, routes_forbidden):
    session_id = (await api.runtime.store.create_session("user123")).session.session_id

    appended = await api.post(f"{SESSIONS}/{session_id}/history", content=RECORD, headers=JSON)
    answered = await api.post(
        f"{SESSIONS}/{session_id}/messages", content=b'{"message":"hello"}', headers=JSON
    )

    assert (appended.status_code, answered.status_code) == (200, 200)


@pytest.mark.parametrize(
    "session_id", [UNKNOWN, "0189ABCD-0000-7000-8000-000000000000", "01890000", "x" * 36]
)
async def test_other_ids_are_the_same_by_both_ways(api, routes_only, session_id):
    short = await api.get(f"{SESSIONS}/{session_id}/history")
    routes_only()
    routed = await api.get(f"{SESSIONS}/{session_id}/history")

    assert facts(short) == facts(routed)
    assert short.status_code in {404, 422}


async def test_a_client_that_leaves_in_the_middle_of_its_body_stores_nothing(api):
    session_id = (await api.runtime.store.create_session("user123")).session.session_id
    said = iter(
        [{"type": "http.request", "body": RECORD[:10], "more_body": True}, {"type": "http.disconnect"}]
    )
    sent = []

    async def receive():
        return next(said)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": f"{SESSIONS}/{session_id}/history",
        "raw_path": b"",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(RECORD)).encode())],
    }
    await api.app(scope, receive, send)

    assert sent[0]["status"] == 400
    assert (await api.runtime.store.get_session(session_id)).session.message_count == 0


async def test_a_fault_of_ours_is_a_problem_too(api, monkeypatch, caplog):
    async def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(hot, "history_of", broken)

    answer = await api.get(f"{SESSIONS}/{UNKNOWN}/history")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "a bug" not in answer.text
    assert "a request failed" in caplog.text

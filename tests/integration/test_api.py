"""Every call of the HTTP contract, in every mode where it applies: statuses, bodies and headers."""

import asyncio
import json
import re
import socket
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from redis.asyncio import Redis

from app.application import create_app
from app.chat import format_time, keyed_message_id, new_uuid, utc_now
from app.postgres.schema import REVISION
from tests.contract.suite import until
from tests.databases import migrate, new_database, taken_away
from tests.factories import guide_value
from tests.integration.api_client import (
    MODES,
    SESSIONS,
    TRUTH,
    UNKNOWN,
    assert_problem,
    empty_stores,
    for_mode,
    just_now,
    open_api,
)

pytestmark = pytest.mark.anyio

QUESTION = "Điều kiện tham gia đấu thầu?"


@pytest.fixture(scope="module", params=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
async def stores(servers, database_url, mode):
    """Empty for each mode: sessions that one has left in Redis would be another's to take over."""
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
def settings(stores, mode):
    """The mode's settings; a test that does not name its mode runs in each."""
    return for_mode(stores, mode)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings) as api:
        yield api


@pytest.fixture
async def session(api):
    return await api.new_session()


@pytest.fixture
def user():
    """A user whose sessions are this test's alone."""
    return f"user-{new_uuid()}"


@pytest.fixture
async def redis(stores):
    async with Redis.from_url(stores.redis_url, db=1) as redis:
        yield redis


@pytest.fixture
def end_lease(mode, stores):
    """Ends the lease of a turn that is still running, as time would."""

    async def in_postgres(api, session, key):
        async with api.runtime.database.connection() as conn:
            done = await conn.execute(
                "UPDATE chat.chat_turns SET leased_until = clock_timestamp() - interval '1 second' "
                "WHERE session_id = $1 AND message_id = $2",
                id_of(session),
                keyed_message_id(id_of(session), key, 0),
            )
        assert done == "UPDATE 1"

    async def in_redis(_api, session, key):
        async with Redis.from_url(stores.redis_url, db=2) as aux:
            name = f"turn:{id_of(session)}:{keyed_message_id(id_of(session), key, 0)}"
            token, _, _ = (await aux.get(name)).partition(b" ")
            await aux.set(name, token + b" 1")

    return {"hybrid": in_postgres, "postgres": in_postgres, "redis-only": in_redis}[mode]


def id_of(session):
    return UUID(session.rpartition("/")[2])


def keyed(key="7f9c24e8"):
    return {"Idempotency-Key": key}


def a_record(content="Xin chào", **fields):
    return {"role": "user", "content": content, **fields}


class TestCreating:
    async def test_a_session_is_answered_with_its_id_its_time_and_its_place(self, api, mode):
        answer = await api.post(SESSIONS, params={"user_id": "user123"})
        assert answer.status_code == 201
        body = answer.json()
        assert set(body) == {"session_id", "created_at"}
        assert UUID(body["session_id"]).version == 7
        assert just_now(body["created_at"])
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["location"] == f"/api/chat/sessions/{body['session_id']}"
        assert answer.headers["x-session-seq"] == "0"
        assert answer.headers["x-session-source"] == TRUTH[mode]
        assert (await api.get(answer.headers["location"])).json()["user_id"] == "user123"

    @pytest.mark.parametrize("user_id", ["u", "u" * 256, "Nguyễn Văn A", "Nguyê\u0303n", "😀 &=+%/?#", " "])
    async def test_a_user_id_is_kept_byte_for_byte(self, api, user_id):
        session = await api.new_session(user_id)
        assert (await api.get(session, params={"user_id": user_id})).json()["user_id"] == user_id

    async def test_no_two_sessions_are_the_same(self, api):
        sessions = await asyncio.gather(*(api.new_session() for _ in range(10)))
        assert len(set(sessions)) == 10


class TestTheSessionWithoutItsMessages:
    async def test_it_says_what_is_known(self, api, session):
        await api.record(session, "a", "b", "c")
        answer = await api.get(session)
        assert answer.status_code == 200
        body = answer.json()
        assert body == {
            "session_id": str(id_of(session)),
            "user_id": "user123",
            "created_at": body["created_at"],
            "last_activity": body["last_activity"],
            "total_messages": 3,
            "first_available_seq": 1,
        }
        assert just_now(body["created_at"])
        assert body["created_at"] <= body["last_activity"]
        assert answer.headers["x-session-seq"] == "3"

    async def test_an_append_moves_its_last_activity_and_a_read_does_not(self, api, session):
        created = (await api.get(session)).json()
        await api.get(f"{session}/history")
        assert (await api.get(session)).json() == created
        await api.record(session, "a")
        appended = (await api.get(session)).json()
        assert appended["created_at"] == created["created_at"]
        assert appended["last_activity"] > created["last_activity"]

    async def test_its_id_may_be_spelled_in_capitals(self, api, session):
        answer = await api.get(f"{SESSIONS}/{str(id_of(session)).upper()}")
        assert answer.json()["session_id"] == str(id_of(session))


class TestAppendingHistory:
    async def test_messages_are_appended_in_order_and_their_places_answered(self, api, session, mode):
        answer = await api.post(f"{session}/history", json={"messages": [a_record("a"), a_record("b")]})
        assert answer.status_code == 200
        assert answer.json() == {"session_id": str(id_of(session)), "first_seq": 1, "last_seq": 2}
        assert answer.headers["x-session-seq"] == "2"
        assert answer.headers["x-session-source"] == TRUTH[mode]
        assert await api.record(session, "c") == {
            "session_id": str(id_of(session)),
            "first_seq": 3,
            "last_seq": 3,
        }
        assert await api.contents(session) == ["a", "b", "c"]

    @pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
    async def test_every_role_is_kept(self, api, session, role):
        await api.post(f"{session}/history", json={"messages": [{"role": role, "content": "x"}]})
        assert (await api.get(f"{session}/history")).json()["messages"][0]["role"] == role

    @pytest.mark.parametrize(
        "content",
        [
            "",
            " ",
            "Nguyễn",
            "Nguyê\u0303n",
            "👨‍👩‍👧‍👦🇻🇳",
            "שלום עולם",
            "\u202emirrored",
            '"}],\n\r\t\\ \u2028\x7f',
            "ế" * 1000,
        ],
    )
    async def test_content_is_kept_byte_for_byte(self, api, session, content):
        await api.record(session, content, "the next line")
        assert await api.contents(session) == [content, "the next line"]

    @pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"list": [], "object": {}, "null": None, "no": False},
            {
                "big": 12345678901234567890123456789,
                "float": 0.1,
                "small": 5e-324,
                "whole": 1.0,
                "minus": -0.0,
            },
            {"z": 1, "a": {"z": 1, "a": [{"b": 1, "a": 2}]}},
            {"": "an empty key", "ключ": "Điều", "seq": 99, "message_id": "mine", "request_digest": "x"},
            {"text": '},\n{"message_id":"00000000-0000-0000-0000-000000000000","seq":1'},
        ],
    )
    async def test_metadata_is_kept_as_it_was_sent(self, api, session, metadata):
        await api.post(f"{session}/history", json={"messages": [a_record(metadata=metadata)]})
        kept = (await api.get(f"{session}/history")).json()["messages"][0]["metadata"]
        assert json.dumps(kept) == json.dumps(metadata)

    async def test_an_integer_of_4000_digits_is_kept(self, api, session):
        digits = "7" * 4000
        sent = '{"messages":[{"role":"user","content":"x","metadata":{"n":' + digits + "}}]}"
        answer = await api.post(
            f"{session}/history", content=sent, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 200, answer.text
        assert f'"metadata":{{"n":{digits}}}' in (await api.get(f"{session}/history")).text

    @pytest.mark.parametrize(
        ("sent", "kept"),
        [
            ("2000-01-01T00:00:00Z", "2000-01-01T00:00:00.000Z"),
            ("2025-11-14T17:30:00.1239+07:00", "2025-11-14T10:30:00.123Z"),
            ("2025-11-14t10:30:00z", "2025-11-14T10:30:00.000Z"),
            ("2025-11-14T10:30:00-00:30", "2025-11-14T11:00:00.000Z"),
            ("1999-12-31T23:00:00-01:00", "2000-01-01T00:00:00.000Z"),
        ],
    )
    async def test_a_timestamp_is_kept_in_utc_cut_to_milliseconds(self, api, session, sent, kept):
        await api.post(f"{session}/history", json={"messages": [a_record(timestamp=sent)]})
        assert (await api.get(f"{session}/history")).json()["messages"][0]["timestamp"] == kept

    async def test_a_timestamp_may_be_almost_a_day_ahead(self, api, session):
        ahead = format_time(utc_now() + timedelta(hours=23, minutes=59))
        await api.post(f"{session}/history", json={"messages": [a_record(timestamp=ahead)]})
        assert (await api.get(f"{session}/history")).json()["messages"][0]["timestamp"] == ahead

    async def test_what_is_left_out_or_null_is_set_by_the_server(self, api, session):
        records = [a_record(), a_record(timestamp=None, metadata=None)]
        answer = await api.post(f"{session}/history", json={"messages": records})
        assert answer.status_code == 200
        messages = (await api.get(f"{session}/history")).json()["messages"]
        assert [just_now(message["timestamp"]) for message in messages] == [True, True]
        assert [message["metadata"] for message in messages] == [{}, {}]

    async def test_concurrent_appends_leave_no_gap(self, api, session):
        answers = await asyncio.gather(*(api.record(session, f"{n}a", f"{n}b") for n in range(8)))
        assert sorted(answer["first_seq"] for answer in answers) == list(range(1, 17, 2))
        contents = await api.contents(session)
        assert [contents[answer["first_seq"] - 1 : answer["last_seq"]] for answer in answers] == [
            [f"{n}a", f"{n}b"] for n in range(8)
        ]


class TestAMessageToTheAssistant:
    async def test_it_is_answered_as_the_guide_shows(self, api, session, mode):
        answer = await api.post(
            f"{session}/messages", json={"message": QUESTION, "metadata": {"source": "web"}}
        )
        assert answer.status_code == 200
        body = answer.json()
        assert body == {
            "session_id": str(id_of(session)),
            "user_message": QUESTION,
            "assistant_response": f"heard: {QUESTION}",
            "sources": ["doc1", "doc2"],
            "processing_time_ms": body["processing_time_ms"],
        }
        assert type(body["processing_time_ms"]) is int
        assert 0 <= body["processing_time_ms"] < 10_000
        assert answer.headers["x-session-seq"] == "2"
        assert answer.headers["x-session-source"] == TRUTH[mode]

    async def test_it_stores_two_messages_with_their_metadata(self, api, session):
        answer = await api.post(
            f"{session}/messages", json={"message": QUESTION, "metadata": {"source": "web", "none": []}}
        )
        question, said = (await api.get(f"{session}/history")).json()["messages"]
        assert (question["role"], question["content"], question["seq"]) == ("user", QUESTION, 1)
        assert question["metadata"] == {"source": "web", "none": []}
        assert (said["role"], said["content"], said["seq"]) == ("assistant", f"heard: {QUESTION}", 2)
        assert said["metadata"] == {
            "sources": ["doc1", "doc2"],
            "processing_time_ms": answer.json()["processing_time_ms"],
        }
        assert just_now(question["timestamp"])
        assert question["timestamp"] <= said["timestamp"]
        assert UUID(question["message_id"]) != UUID(said["message_id"])

    async def test_metadata_left_out_or_null_is_an_empty_object(self, api, session):
        await api.post(f"{session}/messages", json={"message": "a"})
        await api.post(f"{session}/messages", json={"message": "b", "metadata": None})
        messages = (await api.get(f"{session}/history")).json()["messages"]
        assert [messages[0]["metadata"], messages[2]["metadata"]] == [{}, {}]

    async def test_the_assistant_sees_the_earlier_messages(self, api, session):
        await api.record(session, "recorded elsewhere")
        await api.post(f"{session}/messages", json={"message": "one"})
        answer = await api.post(f"{session}/messages", json={"message": "two"})
        assert answer.json()["assistant_response"] == (
            "heard: recorded elsewhere | one | heard: recorded elsewhere | one | two"
        )

    async def test_the_assistant_sees_no_more_than_the_window(self, settings):
        async with open_api(settings, session_max_messages=3) as api:
            session = await api.new_session()
            await api.record(session, "1", "2", "3", "4")
            answer = await api.post(f"{session}/messages", json={"message": "5"})
            assert answer.json()["assistant_response"] == "heard: 3 | 4 | 5"

    async def test_its_words_are_kept_byte_for_byte(self, api, session):
        words = " Nguyê\u0303n\n👋 "
        answer = await api.post(f"{session}/messages", json={"message": words})
        assert answer.json()["user_message"] == words
        assert (await api.contents(session))[0] == words

    @pytest.mark.parametrize(
        "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.chat+json"]
    )
    async def test_json_may_be_named_in_other_ways(self, api, session, content_type):
        answer = await api.post(
            f"{session}/messages", content=b'{"message": "a"}', headers={"Content-Type": content_type}
        )
        assert answer.status_code == 200


class TestReadingHistory:
    async def test_it_is_answered_as_the_guide_shows(self, api, session, mode):
        await api.record(session, "a", "b")
        answer = await api.get(f"{session}/history")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        assert body == {
            "session_id": str(id_of(session)),
            "messages": [
                {
                    "message_id": message["message_id"],
                    "seq": seq,
                    "role": "user",
                    "content": content,
                    "timestamp": message["timestamp"],
                    "metadata": {},
                }
                for seq, content, message in zip((1, 2), "ab", body["messages"], strict=True)
            ],
            "total_messages": 2,
            "first_available_seq": 1,
        }
        assert answer.headers["x-session-seq"] == "2"
        assert answer.headers["etag"] == '"2"'
        assert "x-cache-freshness" not in answer.headers

    async def test_an_empty_session_has_an_empty_history(self, api, session):
        answer = await api.get(f"{session}/history")
        assert answer.json() == {
            "session_id": str(id_of(session)),
            "messages": [],
            "total_messages": 0,
            "first_available_seq": 1,
        }
        assert (answer.headers["etag"], answer.headers["x-session-seq"]) == ('"0"', "0")

    async def test_only_the_newest_are_given_oldest_first_and_all_are_counted(self, api, session):
        await api.record(session, "a", "b", "c", "d")
        answer = await api.get(f"{session}/history", params={"max_messages": 2})
        assert [message["content"] for message in answer.json()["messages"]] == ["c", "d"]
        assert answer.json()["total_messages"] == 4
        assert answer.json()["next_before_seq"] == 3

    async def test_pages_backwards_hold_every_message_once(self, api, session):
        sent = [f"message {n}" for n in range(1, 11)]
        await api.record(session, *sent)
        page = (await api.get(f"{session}/history", params={"max_messages": 4})).json()
        pages = [page["messages"]]
        while "next_before_seq" in page:
            query = {"max_messages": 4, "before_seq": page["next_before_seq"]}
            page = (await api.get(f"{session}/history", params=query)).json()
            pages.insert(0, page["messages"])
            assert page["total_messages"] == 10
        assert [len(page) for page in pages] == [2, 4, 4]
        assert [message["content"] for page in pages for message in page] == sent
        assert [message["seq"] for page in pages for message in page] == list(range(1, 11))

    @pytest.mark.parametrize(
        ("before_seq", "seqs"), [(1, []), (2, [1]), (4, [1, 2, 3]), (2**31 - 1, [1, 2, 3])]
    )
    async def test_before_seq_may_lie_at_and_beyond_both_ends(self, api, session, before_seq, seqs):
        await api.record(session, "a", "b", "c")
        answer = await api.get(f"{session}/history", params={"before_seq": before_seq})
        assert [message["seq"] for message in answer.json()["messages"]] == seqs
        assert "next_before_seq" not in answer.json()

    async def test_without_a_number_the_newest_session_max_messages_are_given(self, settings):
        async with open_api(settings, session_max_messages=2) as api:
            session = await api.new_session()
            await api.record(session, "a", "b", "c")
            answer = await api.get(f"{session}/history")
            assert [message["content"] for message in answer.json()["messages"]] == ["b", "c"]
            assert answer.json()["total_messages"] == 3

    @pytest.mark.parametrize("mode", ["hybrid", "postgres"], indirect=True)
    async def test_a_thousand_messages_are_one_page(self, api, session):
        for start in range(0, 1100, 100):
            await api.record(session, *(str(n) for n in range(start, start + 100)))
        answer = await api.get(f"{session}/history", params={"max_messages": 1000})
        assert [int(message["content"]) for message in answer.json()["messages"]] == list(range(100, 1100))

    async def test_min_seq_that_is_reached_is_answered(self, api, session):
        await api.record(session, "a", "b")
        for path in (session, f"{session}/history"):
            answer = await api.get(path, params={"min_seq": 2})
            assert (answer.status_code, answer.headers["x-session-seq"]) == (200, "2")

    async def test_min_seq_that_is_not_reached_is_refused(self, api, session):
        await api.record(session, "a", "b")
        for path in (session, f"{session}/history"):
            assert_problem(await api.get(path, params={"min_seq": 3}), 409, "not_yet_visible")
            assert_problem(await api.get(path, params={"min_seq": 2**31 - 1}), 409, "not_yet_visible")


class TestTags:
    @pytest.mark.parametrize("tags", ['"2"', 'W/"2"', '"1", "2"', '"a",W/"2" , "9"', "*", '"2",'])
    async def test_a_history_that_has_not_moved_is_not_sent_again(self, api, session, tags):
        await api.record(session, "a", "b")
        answer = await api.get(f"{session}/history", headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == '"2"'
        assert answer.headers["x-session-seq"] == "2"
        assert "x-session-source" in answer.headers

    async def test_tags_may_come_on_several_lines(self, api, session):
        await api.record(session, "a", "b")
        lines = [("If-None-Match", '"1"'), ("If-None-Match", '"2"')]
        assert (await api.get(f"{session}/history", headers=lines)).status_code == 304

    @pytest.mark.parametrize("tags", ['"1"', 'W/"3"', '"1", "3"', "2", '"02"', '""', "nonsense", '"2', "**"])
    async def test_a_history_that_has_moved_is_sent(self, api, session, tags):
        await api.record(session, "a", "b")
        answer = await api.get(f"{session}/history", headers={"If-None-Match": tags})
        assert answer.status_code == 200
        assert answer.json()["total_messages"] == 2

    async def test_a_tag_does_not_hide_that_the_session_is_gone(self, api, session):
        await api.delete(session)
        answer = await api.get(f"{session}/history", headers={"If-None-Match": "*"})
        assert_problem(answer, 404, "session_not_found")


class TestListing:
    async def test_a_users_sessions_are_listed_newest_first(self, api, mode, user):
        first, second = await api.new_session(user), await api.new_session(user)
        await api.new_session("bob")
        await api.record(first, "a")
        answer = await api.get(SESSIONS, params={"user_id": user})
        assert answer.status_code == 200
        body = answer.json()
        assert body["total"] == 2
        assert "next" not in body
        assert [one["session_id"] for one in body["sessions"]] == [str(id_of(second)), str(id_of(first))]
        assert [one["total_messages"] for one in body["sessions"]] == [0, 1]
        assert [just_now(one["created_at"]) for one in body["sessions"]] == [True, True]
        assert {one["user_id"] for one in body["sessions"]} == {user}
        assert answer.headers["x-session-source"] == TRUTH[mode]

    async def test_a_user_without_sessions_has_an_empty_list(self, api, user):
        answer = await api.get(SESSIONS, params={"user_id": user})
        assert (answer.status_code, answer.json()) == (200, {"sessions": [], "total": 0})

    async def test_pages_hold_every_session_once(self, api, user):
        made = [str(id_of(await api.new_session(user))) for _ in range(5)]
        page = (await api.get(SESSIONS, params={"user_id": user, "limit": 2})).json()
        pages = [page]
        while "next" in page:
            query = {"user_id": user, "limit": 2, "after": page["next"]}
            page = (await api.get(SESSIONS, params=query)).json()
            pages.append(page)
        assert [len(page["sessions"]) for page in pages] == [2, 2, 1]
        assert [page["total"] for page in pages] == [5, 5, 5]
        assert [one["session_id"] for page in pages for one in page["sessions"]] == made[::-1]

    async def test_a_full_last_page_has_no_next(self, api, user):
        await api.new_session(user)
        await api.new_session(user)
        assert "next" not in (await api.get(SESSIONS, params={"user_id": user, "limit": 2})).json()

    async def test_a_deleted_session_is_not_listed(self, api, user):
        session = await api.new_session(user)
        await api.delete(session)
        assert (await api.get(SESSIONS, params={"user_id": user})).json() == {"sessions": [], "total": 0}

    @pytest.mark.parametrize("mode", ["hybrid", "postgres"], indirect=True)
    async def test_status_tells_active_from_archived(self, api, user):
        old, new = await api.new_session(user), await api.new_session(user)
        async with api.runtime.database.connection() as conn:
            await conn.execute(
                "UPDATE chat.chat_sessions SET last_activity = $2 WHERE session_id = $1",
                id_of(old),
                datetime.now(UTC) - timedelta(seconds=3601),
            )

        async def listed(**query):
            body = (await api.get(SESSIONS, params={"user_id": user, **query})).json()
            return [one["session_id"] for one in body["sessions"]], body["total"]

        assert await listed() == ([str(id_of(new))], 1)
        assert await listed(status="active") == ([str(id_of(new))], 1)
        assert await listed(status="archived") == ([str(id_of(old))], 1)
        assert await listed(status="all") == ([str(id_of(new)), str(id_of(old))], 2)

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_without_an_archive_nothing_is_archived(self, api, user):
        await api.new_session(user)
        query = {"user_id": user, "status": "archived"}
        assert (await api.get(SESSIONS, params=query)).json() == {"sessions": [], "total": 0}
        assert (await api.get(SESSIONS, params={**query, "status": "all"})).json()["total"] == 1


class TestDeleting:
    async def test_a_session_is_deleted_with_its_messages(self, api, session, mode):
        await api.record(session, "a", "b")
        answer = await api.delete(session)
        assert answer.status_code == 200
        assert answer.json() == {"message": f"Session {id_of(session)} deleted"}
        assert answer.headers["x-session-seq"] == "2"
        assert answer.headers["x-session-source"] == TRUTH[mode]
        assert_problem(await api.get(f"{session}/history"), 404, "session_not_found")
        assert_problem(await api.delete(session), 404, "session_not_found")


CALLS = {
    "get": ("GET", "", None),
    "history": ("GET", "/history", None),
    "message": ("POST", "/messages", {"message": "hello"}),
    "append": ("POST", "/history", {"messages": [a_record()]}),
    "delete": ("DELETE", "", None),
}


@pytest.fixture(params=CALLS)
def call(request):
    """Makes one of the calls about a session."""
    method, path, body = CALLS[request.param]

    async def make(api, session, **arguments):
        return await api.request(method, session + path, json=body, **arguments)

    return make


class TestWhoseSession:
    async def test_an_unknown_session_is_not_found(self, api, call):
        problem = assert_problem(await call(api, f"{SESSIONS}/{UNKNOWN}"), 404, "session_not_found")
        assert problem["detail"] == "Session not found"
        assert problem["title"] == "Not Found"

    @pytest.mark.parametrize(
        "unknown", ["550e8400-e29b-41d4-a716-446655440000", str(UUID(int=0)), str(UUID(int=2**128 - 1))]
    )
    async def test_any_uuid_may_be_asked_for(self, api, call, unknown):
        assert_problem(await call(api, f"{SESSIONS}/{unknown}"), 404, "session_not_found")

    async def test_a_foreign_session_is_not_found_in_the_same_words(self, api, call, session):
        await api.record(session, "a")
        foreign = await call(api, session, params={"user_id": "eve"})
        unknown = await call(api, f"{SESSIONS}/{UNKNOWN}", params={"user_id": "eve"})
        assert assert_problem(foreign, 404, "session_not_found")["detail"] == "Session not found"
        assert foreign.content == unknown.content
        assert sorted(foreign.headers) == sorted(unknown.headers)
        assert await api.contents(session) == ["a"]

    async def test_its_owner_is_answered_as_one_who_does_not_say_who_they_are(self, api, call, session):
        assert (await call(api, session, params={"user_id": "user123"})).status_code == 200
        assert (await call(api, await api.new_session())).status_code == 200

    async def test_a_user_id_in_another_normal_form_is_another_user(self, api, call):
        session = await api.new_session("Nguyễn")
        answer = await call(api, session, params={"user_id": "Nguyê\u0303n"})
        assert_problem(answer, 404, "session_not_found")


class TestIfMatch:
    @pytest.fixture(params=["message", "append"])
    def call(self, request):
        method, path, body = CALLS[request.param]

        async def make(api, session, **headers):
            return await api.request(
                method,
                session + path,
                json=body,
                headers={k.replace("_", "-"): v for k, v in headers.items()},
            )

        return make

    async def test_the_seq_that_the_session_has_is_appended_to(self, api, session, call):
        await api.record(session, "a", "b")
        answer = await call(api, session, If_Match='"2"')
        assert answer.status_code == 200
        assert await api.message_count(session) == int(answer.headers["x-session-seq"]) > 2

    async def test_an_empty_session_has_seq_0(self, api, session, call):
        assert (await call(api, session, If_Match='"0"')).status_code == 200

    @pytest.mark.parametrize("tag", ['"0"', '"1"', '"3"', '"2147483648"', '"9999999999"'])
    async def test_another_seq_is_refused_with_the_current_one(self, api, session, call, tag):
        await api.record(session, "a", "b")
        answer = await call(api, session, If_Match=tag)
        assert assert_problem(answer, 412, "seq_mismatch")["current_seq"] == 2
        assert answer.headers["x-session-seq"] == "2"
        assert await api.contents(session) == ["a", "b"]

    async def test_of_two_writers_with_one_seq_one_wins(self, api, session, call):
        answers = await asyncio.gather(*(call(api, session, If_Match='"0"') for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 412, 412, 412]

    async def test_an_unknown_session_comes_before_a_wrong_seq(self, api, call):
        answer = await call(api, f"{SESSIONS}/{UNKNOWN}", If_Match='"7"', Idempotency_Key="k")
        assert_problem(answer, 404, "session_not_found")

    async def test_a_foreign_session_comes_before_a_reused_key(self, api, session):
        await api.record(session, "a", headers=keyed())
        answer = await api.post(
            f"{session}/messages",
            params={"user_id": "eve"},
            json={"message": "b"},
            headers=keyed() | {"If-Match": '"9"'},
        )
        assert_problem(answer, 404, "session_not_found")

    async def test_a_replay_comes_before_a_wrong_seq(self, api, session, call):
        first = await call(api, session, If_Match='"0"', Idempotency_Key="k")
        again = await call(api, session, If_Match='"0"', Idempotency_Key="k")
        assert (again.status_code, again.json()) == (200, first.json())

    async def test_a_reused_key_comes_before_a_wrong_seq(self, api, session, call):
        await api.record(session, "something else", headers=keyed("k"))
        answer = await call(api, session, If_Match='"0"', Idempotency_Key="k")
        assert_problem(answer, 409, "idempotency_key_reused")

    async def test_a_wrong_seq_leaves_its_key_unused(self, api, session, call):
        assert_problem(await call(api, session, If_Match='"1"', Idempotency_Key="k"), 412, "seq_mismatch")
        assert await api.message_count(session) == 0
        assert (await call(api, session, If_Match='"0"', Idempotency_Key="k")).status_code == 200


class TestIdempotency:
    async def test_an_append_is_stored_once(self, api, session, mode):
        body = {"messages": [a_record("a"), a_record("b")]}
        first = await api.post(f"{session}/history", json=body, headers=keyed())
        await api.record(session, "c")
        again = await api.post(f"{session}/history", json=body, headers=keyed())
        assert (again.status_code, again.json()) == (200, first.json())
        assert again.headers["x-session-seq"] == "3"
        assert await api.contents(session) == ["a", "b", "c"]

    async def test_a_turn_is_answered_once(self, api, session):
        body = {"message": "a", "metadata": {"x": 1}}
        first = await api.post(f"{session}/messages", json=body, headers=keyed())
        await api.record(session, "b")
        again = await api.post(f"{session}/messages", json=body, headers=keyed())
        assert (again.status_code, again.json()) == (200, first.json())
        assert again.headers["x-session-seq"] == "3"
        assert await api.contents(session) == ["a", "heard: a", "b"]

    @pytest.mark.parametrize(
        "spelling",
        [
            '{ "metadata" : {"b":[1, 2],"a":100.0}, "message" : "\\u0110i" }',
            '{"message":"Đi","metadata":{"a":1e2,"b":[1,2]}}\n',
        ],
    )
    async def test_a_turn_is_the_same_however_its_json_is_spelled(self, api, session, spelling):
        body = {"message": "Đi", "metadata": {"a": 100.0, "b": [1, 2]}}
        first = await api.post(f"{session}/messages", json=body, headers=keyed())
        again = await api.post(
            f"{session}/messages", content=spelling, headers=keyed() | {"Content-Type": "application/json"}
        )
        assert (again.status_code, again.json()) == (200, first.json())
        assert await api.message_count(session) == 2

    async def test_an_append_is_the_same_however_its_json_is_spelled(self, api, session):
        first = await api.record(session, "Đi", headers=keyed())
        again = await api.post(
            f"{session}/history",
            content='{ "messages": [ {"content": "\\u0110i", "role": "user"} ] }',
            headers=keyed() | {"Content-Type": "application/json"},
        )
        assert (again.status_code, again.json()) == (200, first)
        assert await api.message_count(session) == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"message": "b"},
            {"message": "a", "metadata": {"x": 1}},
            {"message": "a", "metadata": {}},
            {"message": "a "},
        ],
    )
    async def test_the_key_of_another_turn_is_refused(self, api, session, other):
        await api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
        answer = await api.post(f"{session}/messages", json=other, headers=keyed())
        assert_problem(answer, 409, "idempotency_key_reused")
        assert await api.contents(session) == ["a", "heard: a"]

    @pytest.mark.parametrize(
        "other", [[a_record("b")], [a_record("a"), a_record("a")], [a_record("a", metadata={"x": None})]]
    )
    async def test_the_key_of_another_append_is_refused(self, api, session, other):
        await api.record(session, "a", headers=keyed())
        answer = await api.post(f"{session}/history", json={"messages": other}, headers=keyed())
        assert_problem(answer, 409, "idempotency_key_reused")
        assert await api.contents(session) == ["a"]

    async def test_the_key_of_the_other_call_is_refused(self, api, session):
        await api.record(session, "a", headers=keyed("one"))
        await api.post(f"{session}/messages", json={"message": "b"}, headers=keyed("two"))
        turn = await api.post(f"{session}/messages", json={"message": "a"}, headers=keyed("one"))
        append = await api.post(
            f"{session}/history", json={"messages": [a_record("b")]}, headers=keyed("two")
        )
        assert_problem(turn, 409, "idempotency_key_reused")
        assert_problem(append, 409, "idempotency_key_reused")
        assert await api.contents(session) == ["a", "b", "heard: a | b"]

    async def test_a_key_belongs_to_its_session(self, api, session):
        other = await api.new_session()
        await api.record(session, "a", headers=keyed())
        assert (await api.record(other, "b", headers=keyed()))["first_seq"] == 1

    @pytest.mark.parametrize("key", ["!", "~" * 255, '"quoted"', "a,b;c=d"])
    async def test_a_key_is_any_visible_ascii(self, api, session, key):
        first = await api.record(session, "a", headers=keyed(key))
        assert await api.record(session, "a", headers=keyed(key)) == first
        assert await api.message_count(session) == 1

    async def test_without_a_key_everything_is_new(self, api, session):
        await api.record(session, "a")
        await api.record(session, "a")
        assert await api.contents(session) == ["a", "a"]

    async def test_of_many_at_once_one_is_stored(self, api, session):
        answers = await asyncio.gather(*(api.record(session, "a", "b", headers=keyed()) for _ in range(6)))
        assert [answer["first_seq"] for answer in answers] == [1] * 6
        assert await api.contents(session) == ["a", "b"]

    async def test_message_ids_follow_from_the_key(self, api, session):
        await api.record(session, "a", "b", headers=keyed("k"))
        ids = [one["message_id"] for one in (await api.get(f"{session}/history")).json()["messages"]]
        assert ids == [str(keyed_message_id(id_of(session), "k", index)) for index in (0, 1)]

    async def test_a_key_ends_with_its_session(self, api, session):
        await api.record(session, "a", headers=keyed())
        await api.delete(session)
        answer = await api.post(f"{session}/history", json={"messages": [a_record("a")]}, headers=keyed())
        assert_problem(answer, 404, "session_not_found")


class TestARunningTurn:
    async def test_a_retry_of_it_is_told_to_wait(self, settings):
        async with open_api(settings, assistant="gated", assistant_timeout_seconds=30) as api:
            session = await api.new_session()

            def ask():
                return api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())

            first = asyncio.create_task(ask())
            await api.assistant.asked(1)
            answer = await ask()
            assert_problem(answer, 409, "turn_in_progress")
            assert 1 <= int(answer.headers["retry-after"]) <= 35
            api.assistant.open(0)
            assert (await first).status_code == 200
            assert (await ask()).json() == (await first).json()
            assert await api.contents(session) == ["a", "heard: a"]

    async def test_another_request_with_its_key_is_refused_for_good(self, settings):
        async with open_api(settings, assistant="gated") as api:
            session = await api.new_session()
            first = asyncio.create_task(
                api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
            )
            await api.assistant.asked(1)
            other = await api.post(f"{session}/messages", json={"message": "b"}, headers=keyed())
            assert_problem(other, 409, "idempotency_key_reused")
            api.assistant.open(0)
            assert (await first).status_code == 200

    async def test_its_message_is_durable_before_the_assistant_is_asked(self, settings):
        async with open_api(settings, assistant="gated") as api, open_api(settings) as other:
            session = await api.new_session()
            turn = asyncio.create_task(api.post(f"{session}/messages", json={"message": "a"}))
            await api.assistant.asked(1)
            assert await other.contents(session) == ["a"]
            api.assistant.open(0)
            assert (await turn).status_code == 200

    async def test_what_is_appended_meanwhile_stands_between(self, settings):
        async with open_api(settings, assistant="gated") as api:
            session = await api.new_session()
            turn = asyncio.create_task(
                api.post(f"{session}/messages", json={"message": "a"}, headers=keyed() | {"If-Match": '"0"'})
            )
            await api.assistant.asked(1)
            await api.record(session, "meanwhile")
            api.assistant.open(0)
            assert (await turn).headers["x-session-seq"] == "3"
            assert await api.contents(session) == ["a", "meanwhile", "heard: a"]

    async def test_its_session_may_be_deleted_meanwhile(self, settings):
        async with open_api(settings, assistant="gated") as api:
            session = await api.new_session()
            turn = asyncio.create_task(
                api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
            )
            await api.assistant.asked(1)
            await api.delete(session)
            api.assistant.open(0)
            assert_problem(await turn, 404, "session_not_found")
            assert_problem(await api.get(f"{session}/history"), 404, "session_not_found")

    async def test_its_end_by_time_lets_a_retry_take_it_over(self, settings, end_lease):
        async with open_api(settings, assistant="gated") as api:
            session = await api.new_session()

            def ask():
                return asyncio.create_task(
                    api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
                )

            late = ask()
            await api.assistant.asked(1)
            await end_lease(api, session, keyed()["Idempotency-Key"])
            retry = ask()
            await api.assistant.asked(2)
            api.assistant.open(0)
            assert_problem(await late, 409, "turn_taken_over")
            assert await api.contents(session) == ["a"]
            api.assistant.open(1)
            assert (await retry).json()["assistant_response"] == "heard: a"
            assert await api.contents(session) == ["a", "heard: a"]

    async def test_a_late_answer_to_a_turn_that_a_retry_has_finished_is_refused(self, settings, end_lease):
        async with open_api(settings, assistant="gated") as api:
            session = await api.new_session()

            def ask():
                return asyncio.create_task(
                    api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
                )

            late = ask()
            await api.assistant.asked(1)
            await end_lease(api, session, keyed()["Idempotency-Key"])
            retry = ask()
            await api.assistant.asked(2)
            api.assistant.open(1)
            assert (await retry).status_code == 200
            api.assistant.open(0)
            assert_problem(await late, 409, "turn_taken_over")
            assert await api.contents(session) == ["a", "heard: a"]

    @pytest.mark.parametrize("mode", ["hybrid", "postgres"], indirect=True)
    async def test_it_holds_no_connection_while_the_assistant_thinks(self, settings):
        async with open_api(settings, assistant="gated", database_pool_size=1) as api:
            sessions = [await api.new_session() for _ in range(5)]
            turns = [
                asyncio.create_task(api.post(f"{session}/messages", json={"message": "a"}, headers=keyed()))
                for session in sessions
            ]
            await api.assistant.asked(5)
            # With the only connection held, this would be a 503 after two seconds.
            assert await api.contents(sessions[0]) == ["a"]
            assert (await api.record(sessions[1], "meanwhile"))["first_seq"] == 2
            api.assistant.open_all()
            assert [(await turn).status_code for turn in turns] == [200] * 5


class TestAnAssistantThatFails:
    async def test_it_is_a_502_and_the_users_message_stays(self, settings):
        async with open_api(settings, assistant="fails_once") as api:
            session = await api.new_session()
            answer = await api.post(f"{session}/messages", json={"message": "a"})
            problem = assert_problem(answer, 502, "assistant_failed")
            assert "the model is on fire" in problem["detail"]
            assert "Traceback" not in answer.text
            assert await api.contents(session) == ["a"]

    async def test_a_retry_with_the_same_key_goes_on_without_doubling_the_message(self, settings):
        async with open_api(settings, assistant="fails_once") as api:
            session = await api.new_session()

            async def ask(message="a"):
                return await api.post(f"{session}/messages", json={"message": message}, headers=keyed())

            assert_problem(await ask(), 502, "assistant_failed")
            assert_problem(await ask("b"), 409, "idempotency_key_reused")
            retried = await ask()
            assert retried.status_code == 200
            assert retried.json()["assistant_response"] == "heard: a"
            assert retried.headers["x-session-seq"] == "2"
            assert (await ask()).json() == retried.json()
            assert api.assistant.asked == 2
            assert await api.contents(session) == ["a", "heard: a"]

    async def test_the_assistant_of_a_retry_sees_nothing_that_came_after_its_question(self, settings):
        async with open_api(settings, assistant="fails_once") as api:
            session = await api.new_session()
            body = {"message": "a"}
            await api.post(f"{session}/messages", json=body, headers=keyed())
            await api.record(session, "later")
            retried = await api.post(f"{session}/messages", json=body, headers=keyed())
            assert retried.json()["assistant_response"] == "heard: a"
            assert retried.headers["x-session-seq"] == "3"
            assert await api.contents(session) == ["a", "later", "heard: a"]

    async def test_one_that_is_too_slow_is_a_504_and_a_retry_goes_on(self, settings):
        async with open_api(settings, assistant="never_first", assistant_timeout_seconds=0.05) as api:
            session = await api.new_session()

            async def ask():
                return await api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())

            assert_problem(await ask(), 504, "assistant_timed_out")
            assert await api.contents(session) == ["a"]
            assert (await ask()).json()["assistant_response"] == "heard: a"
            assert await api.contents(session) == ["a", "heard: a"]

    async def test_an_answer_that_is_too_long_is_a_502(self, settings):
        async with open_api(settings, assistant="too_long") as api:
            session = await api.new_session()
            answer = await api.post(f"{session}/messages", json={"message": "a"})
            assert_problem(answer, 502, "assistant_failed")
            assert await api.contents(session) == ["a"]


class TestWhereAnswersComeFrom:
    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_hybrid_mode_reads_redis_and_falls_back_to_postgresql(self, api, session, redis):
        await api.record(session, "a", "b")
        assert (await api.get(f"{session}/history")).headers["x-session-source"] == "redis"
        assert (await api.get(session)).headers["x-session-source"] == "redis"
        await redis.flushdb()
        refilled = await api.get(f"{session}/history")
        assert refilled.headers["x-session-source"] == "postgres"
        assert refilled.headers["etag"] == '"2"'
        assert (await api.get(f"{session}/history")).headers["x-session-source"] == "redis"

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_pages_beyond_the_window_come_from_the_archive(self, settings):
        async with open_api(settings, session_max_messages=3) as api:
            session = await api.new_session()
            await api.record(session, *"abcde")
            newest = await api.get(f"{session}/history", params={"max_messages": 3})
            older = await api.get(f"{session}/history", params={"max_messages": 3, "before_seq": 3})
            both = await api.get(f"{session}/history", params={"max_messages": 5})
            assert newest.headers["x-session-source"] == "redis"
            assert newest.json()["next_before_seq"] == 3
            assert older.headers["x-session-source"] == "postgres"
            assert [one["content"] for one in older.json()["messages"]] == ["a", "b"]
            assert [one["content"] for one in both.json()["messages"]] == list("abcde")

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_redis_only_mode_counts_what_its_window_has_dropped(self, settings):
        async with open_api(settings, session_max_messages=3) as api:
            session = await api.new_session()
            await api.record(session, *"abcde")
            body = (await api.get(f"{session}/history", params={"max_messages": 5})).json()
            assert [one["seq"] for one in body["messages"]] == [3, 4, 5]
            assert (body["total_messages"], body["first_available_seq"]) == (5, 3)
            assert "next_before_seq" not in body
            about = await api.get(session)
            assert (about.json()["total_messages"], about.json()["first_available_seq"]) == (5, 3)
            page = await api.get(f"{session}/history", params={"max_messages": 1, "before_seq": 5})
            assert [one["seq"] for one in page.json()["messages"]] == [4]
            assert page.json()["next_before_seq"] == 4

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_an_expired_session_is_not_found(self, api, session, redis):
        await redis.pexpire(f"session:{id_of(session)}", 0)
        problem = assert_problem(await api.get(f"{session}/history"), 404, "session_not_found")
        assert problem["detail"] == "Session not found"

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_a_session_at_its_size_limit_is_a_413(self, settings):
        async with open_api(settings, session_bytes_max=2000) as api:
            session = await api.new_session()
            await api.record(session, "a" * 1000)
            answer = await api.post(f"{session}/history", json={"messages": [a_record("b" * 1000)]})
            assert "2000 bytes" in assert_problem(answer, 413, "session_too_large")["detail"]
            assert await api.contents(session) == ["a" * 1000]

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    @pytest.mark.parametrize("call", CALLS)
    async def test_a_session_that_redis_holds_alone_is_taken_over_by_whatever_touches_it(
        self, api, redis, call
    ):
        session_id = new_uuid()
        await redis.set(f"session:{session_id}", guide_value(session_id, "a", "b"), ex=60)
        method, path, body = CALLS[call]
        answer = await api.request(method, f"{SESSIONS}/{session_id}{path}", json=body)
        assert answer.is_success, answer.text
        stored = await messages_in_postgresql(api, session_id)
        assert stored[:2] == ([] if method == "DELETE" else ["a", "b"])

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    @pytest.mark.parametrize("call", CALLS)
    async def test_without_a_database_a_session_of_the_guides_program_goes_on(self, api, redis, call):
        session_id = new_uuid()
        await redis.set(f"session:{session_id}", guide_value(session_id, "a", "b"), ex=60)
        method, path, body = CALLS[call]
        session = f"{SESSIONS}/{session_id}"
        answer = await api.request(method, f"{session}{path}", json=body)
        assert answer.is_success, answer.text
        if method == "DELETE":
            assert not await redis.exists(f"session:{session_id}")
        else:
            assert (await api.contents(session))[:2] == ["a", "b"]
            # As the guide's own commands look at it.
            assert json.loads(await redis.get(f"session:{session_id}"))["messages"][0]["content"] == "a"
            assert await redis.ttl(f"session:{session_id}") > 60

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_without_a_database_the_guides_sessions_are_listed_before_anybody_touches_them(
        self, settings, redis
    ):
        session_id = new_uuid()
        guide = guide_value(session_id, "a", user_id="untouched")
        await redis.set(f"session:{session_id}", guide, ex=60)

        async def listed():
            page = (await api.get(f"{SESSIONS}?user_id=untouched")).json()
            return [one["session_id"] for one in page["sessions"]] == [str(session_id)]

        async with open_api(settings) as api:
            await until(listed)

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_what_postgresql_can_not_take_over_waits_in_redis(self, api, redis):
        session_id = new_uuid()
        guide = guide_value(session_id, "a\x00b")
        await redis.set(f"session:{session_id}", guide, ex=60)
        for method, path, body in CALLS.values():
            answer = await api.request(method, f"{SESSIONS}/{session_id}{path}", json=body)
            assert_problem(answer, 503, "adoption_pending")
            assert int(answer.headers["retry-after"]) >= 1
        assert await redis.get(f"session:{session_id}") == guide


async def messages_in_postgresql(api, session_id):
    async with api.runtime.database.connection() as conn:
        found = await conn.fetch(
            "SELECT content FROM chat.chat_messages WHERE session_id = $1 ORDER BY seq", session_id
        )
    return [one["content"] for one in found]


async def lease_ended(api):
    """What is cached is current until then: while PostgreSQL is out nobody can commit anything newer."""
    while api.runtime.stores.lease.current() is not None:  # noqa: ASYNC110 - time has no event of ours
        await asyncio.sleep(0.01)


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class TestOutages:
    @pytest.fixture
    async def own_database(self, servers):
        """A database that may be taken away."""
        async with new_database(servers, "chat_api_outage") as url:
            await migrate(url)
            yield url

    @pytest.fixture
    def postgresql_out(self, servers, own_database):
        """Takes the database away from everybody; gives it back at the end."""
        return lambda: taken_away(servers, "chat_api_outage")

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_without_postgresql_writes_are_refused_and_cached_history_is_labelled(
        self, settings, own_database, postgresql_out, redis
    ):
        async with open_api(settings, database_url=own_database) as api:
            session, uncached = await api.new_session(), await api.new_session()
            await api.record(session, "a", "b")
            await redis.delete(f"session:{id_of(uncached)}")
            async with postgresql_out():
                for method, path, body in (
                    ("POST", f"{session}/messages", {"message": "c"}),
                    ("POST", f"{session}/history", {"messages": [a_record("c")]}),
                    ("DELETE", session, None),
                    ("POST", f"{SESSIONS}?user_id=user123", None),
                    ("GET", f"{SESSIONS}?user_id=user123", None),
                    ("GET", uncached, None),
                    ("GET", f"{uncached}/history", None),
                    ("GET", f"{SESSIONS}/{UNKNOWN}", None),
                    ("GET", f"{session}?min_seq=3", None),
                    ("GET", f"{session}/history?min_seq=3", None),
                ):
                    answer = await api.request(method, path, json=body)
                    assert_problem(answer, 503, "durable_store_unavailable")
                    assert int(answer.headers["retry-after"]) >= 1
                await lease_ended(api)
                cached = await api.get(f"{session}/history", headers={"If-None-Match": '"2", *'})
                assert cached.status_code == 200
                assert [one["content"] for one in cached.json()["messages"]] == ["a", "b"]
                assert re.fullmatch(r"unverified; age=\d+(\.\d+)?", cached.headers["x-cache-freshness"])
                assert "etag" not in cached.headers
                assert (cached.headers["x-session-source"], cached.headers["x-session-seq"]) == ("redis", "2")
                assert "x-cache-freshness" in (await api.get(session)).headers
                foreign = await api.get(f"{session}/history", params={"user_id": "eve"})
                assert_problem(foreign, 404, "session_not_found")
                ready = await api.get("/health/ready")
                assert (ready.status_code, ready.json()["status"]) == (200, "warn")
                assert ready.json()["stores"]["postgres"]["status"] == "warn"
            assert await api.contents(session) == ["a", "b"]
            assert await api.record(session, "c") == {
                "session_id": str(id_of(session)),
                "first_seq": 3,
                "last_seq": 3,
            }
            assert (await api.get("/health/ready")).json()["status"] == "pass"

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_without_postgresql_cached_history_may_be_refused(
        self, settings, own_database, postgresql_out
    ):
        async with open_api(settings, database_url=own_database, pg_outage_reads="refuse") as api:
            session = await api.new_session()
            async with postgresql_out():
                await lease_ended(api)
                for path in (session, f"{session}/history"):
                    answer = await api.get(path)
                    assert_problem(answer, 503, "freshness_unknown")
                    assert int(answer.headers["retry-after"]) >= 1
                ready = await api.get("/health/ready")
                assert (ready.status_code, ready.json()["status"]) == (503, "fail")
            assert (await api.get(f"{session}/history")).headers["etag"] == '"0"'

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_without_redis_postgresql_answers_every_call(self, settings, own_database):
        # Of its own: who cannot reach Redis turns the cache off for all who serve the same database.
        overrides = {"database_url": own_database, "redis_url": f"redis://127.0.0.1:{unused_port()}"}
        async with open_api(settings, **overrides) as api:
            session = await api.new_session()
            answer = await api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
            again = await api.post(f"{session}/messages", json={"message": "a"}, headers=keyed())
            assert (answer.status_code, again.json()) == (200, answer.json())
            read = await api.get(f"{session}/history")
            assert [one["content"] for one in read.json()["messages"]] == ["a", "heard: a"]
            assert (read.headers["x-session-source"], read.headers["etag"]) == ("postgres", '"2"')
            assert (await api.get(SESSIONS, params={"user_id": "user123", "limit": 1})).status_code == 200
            ready = await api.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (200, "warn")
            assert ready.json()["stores"]["redis"]["status"] == "warn"
            assert (await api.delete(session)).status_code == 200
            assert_problem(await api.get(session), 404, "session_not_found")

    @pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
    async def test_without_both_stores_a_process_is_not_ready(self, settings, own_database, postgresql_out):
        overrides = {"database_url": own_database, "redis_url": f"redis://127.0.0.1:{unused_port()}"}
        async with open_api(settings, **overrides) as api:
            session = await api.new_session()
            async with postgresql_out():
                answer = await api.get(f"{session}/history")
                assert_problem(answer, 503, "durable_store_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
                ready = await api.get("/health/ready")
                assert (ready.status_code, ready.json()["status"]) == (503, "fail")
                assert "cached history" not in ready.json()["stores"]["postgres"]["state"]
            assert (await api.get("/health/ready")).status_code == 200

    @pytest.mark.parametrize("mode", ["redis-only"], indirect=True)
    async def test_without_redis_redis_only_mode_refuses_every_call(self, settings):
        async with open_api(settings, redis_url=f"redis://127.0.0.1:{unused_port()}") as api:
            calls = [(method, f"{SESSIONS}/{UNKNOWN}{path}", body) for method, path, body in CALLS.values()]
            calls += [(method, f"{SESSIONS}?user_id=user123", None) for method in ("POST", "GET")]
            for method, path, body in calls:
                answer = await api.request(method, path, json=body)
                assert_problem(answer, 503, "redis_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
            ready = await api.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "fail")


class TestHealth:
    async def test_a_process_that_lives_says_so(self, api):
        answer = await api.get("/health/live")
        assert (answer.status_code, answer.json()["status"]) == (200, "pass")

    @pytest.mark.parametrize(
        ("mode", "names"),
        [("hybrid", {"postgres", "redis"}), ("redis-only", {"redis"}), ("postgres", {"postgres"})],
        indirect=["mode"],
    )
    async def test_each_store_of_the_mode_is_reported(self, api, mode, names):
        answer = await api.get("/health/ready")
        assert answer.status_code == 200
        body = answer.json()
        assert (body["status"], body["mode"], body["embedded"]) == ("pass", mode, False)
        assert set(body["stores"]) == names
        assert {store["status"] for store in body["stores"].values()} == {"pass"}
        assert all(store["state"] for store in body["stores"].values())

    async def test_health_is_at_the_root_alone(self, api):
        assert_problem(await api.get("/api/chat/health/ready"), 404, "not_found")

    @pytest.mark.parametrize("mode", ["hybrid", "postgres"], indirect=True)
    async def test_a_wrong_schema_revision_is_not_ready(self, api):
        async with api.runtime.database.connection() as conn:
            await conn.execute("UPDATE chat.alembic_version SET version_num = 'other'")
            try:
                answer = await api.get("/health/ready")
            finally:
                await conn.execute("UPDATE chat.alembic_version SET version_num = $1", REVISION)
        assert answer.status_code == 503
        assert (answer.json()["status"], answer.json()["stores"]["postgres"]["status"]) == ("fail", "fail")
        assert "other" in answer.json()["stores"]["postgres"]["state"]


class TestWhatIsNotThere:
    @pytest.mark.parametrize(
        "path",
        [
            "/nothing",
            "/api/chat",
            "/api/chat/messages",
            f"{SESSIONS}/{UNKNOWN}/nothing",
            "/docs/assets/none.js",
        ],
    )
    async def test_an_unknown_path_is_a_problem_document(self, api, path):
        assert_problem(await api.get(path), 404, "not_found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("PUT", SESSIONS, {"GET", "POST"}),
            ("DELETE", SESSIONS, {"GET", "POST"}),
            ("POST", f"{SESSIONS}/{UNKNOWN}", {"GET", "DELETE"}),
            ("GET", f"{SESSIONS}/{UNKNOWN}/messages", {"POST"}),
            ("PATCH", f"{SESSIONS}/{UNKNOWN}/history", {"GET", "POST"}),
            ("OPTIONS", "/health/live", {"GET"}),
        ],
    )
    async def test_an_unknown_method_is_told_which_there_are(self, api, method, path, allowed):
        answer = await api.request(method, path)
        assert_problem(answer, 405, "method_not_allowed")
        assert set(re.split(", *", answer.headers["allow"])) == allowed


@pytest.mark.parametrize("mode", ["hybrid"], indirect=True)
class TestDocumentation:
    async def test_the_page_asks_no_other_host_for_anything(self, api):
        page = await api.get("/docs")
        assert page.status_code == 200
        assert not re.search(r"(https?:)?//[a-z]", page.text)
        wanted = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
        assert len(wanted) >= 2
        for path in wanted:
            asset = await api.get(path)
            assert asset.status_code == 200
            assert not re.search(rb"@import|url\(['\"]?(https?:)?//", asset.content)
        assert '"validatorUrl": null' in page.text

    @pytest.fixture
    def description(self, settings):
        return create_app(settings).openapi()

    @pytest.fixture
    def operations(self, description):
        return {
            f"{method.upper()} {path}": call
            for path, calls in description["paths"].items()
            for method, call in calls.items()
        }

    async def test_the_description_is_served(self, api, description):
        answer = await api.get("/openapi.json")
        assert (answer.status_code, answer.json()) == (200, description)

    async def test_every_call_of_the_contract_is_described(self, operations):
        assert set(operations) == {
            "POST /api/chat/sessions",
            "GET /api/chat/sessions",
            "GET /api/chat/sessions/{session_id}",
            "DELETE /api/chat/sessions/{session_id}",
            "GET /api/chat/sessions/{session_id}/history",
            "POST /api/chat/sessions/{session_id}/history",
            "POST /api/chat/sessions/{session_id}/messages",
            "GET /api/analytics",
            "GET /api/analytics/search",
            "GET /api/analytics/{report}",
            "GET /health/live",
            "GET /health/ready",
        }
        for call in operations.values():
            assert call["summary"]
            assert call["description"]

    async def test_every_parameter_has_a_description_and_an_example(self, operations):
        parameters = [
            (name, parameter["name"], parameter.get("description"), parameter["schema"].get("examples"))
            for name, call in operations.items()
            for parameter in call.get("parameters", [])
        ]
        assert len(parameters) == 40
        assert [one for one in parameters if None in one] == []

    async def test_every_plain_field_of_a_body_and_of_an_answer_has_an_example(self, operations, description):
        bodies = [
            call["requestBody"]["content"]["application/json"]["schema"]
            for call in operations.values()
            if "requestBody" in call
        ]
        assert len(bodies) == 2
        schemas = [
            *bodies,
            bodies[0]["properties"]["messages"]["items"],
            *description["components"]["schemas"].values(),
        ]
        # The others are made of these, or list all that they may be.
        explained = {"$ref", "items", "enum", "const", "additionalProperties", "examples"}
        lacking = [
            (schema["title"], name)
            for schema in schemas
            for name, field in schema["properties"].items()
            if not explained & {word for kind in [field, *field.get("anyOf", [])] for word in kind}
        ]
        assert lacking == []

    async def test_every_answer_of_an_error_is_a_described_problem_document(self, operations):
        for call in operations.values():
            for status, answer in call["responses"].items():
                assert answer["description"]
                assert (status < "400") or (
                    set(answer["content"]) <= {"application/problem+json", "application/json"}
                )

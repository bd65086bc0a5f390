"""Bad input in every field of every call: a problem document that names the field, and nothing is stored."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.integration.api_client import SESSIONS, assert_problem, empty_stores, open_api, serving

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def settings(servers, database_url):
    return await empty_stores(servers, database_url)


@pytest.fixture(scope="module")
async def api(settings):
    async with open_api(settings) as api:
        yield api


@pytest.fixture(scope="module")
def port(settings):
    """Where the same application listens on a real socket."""
    with serving(settings) as port:
        yield port


@pytest.fixture
async def session(api):
    session = await api.new_session()
    await api.record(session, "before")
    return session


async def assert_refused(api, session, answer, *, status=422, code, path=None):
    """The answer names the field, and the session is as it was."""
    problem = assert_problem(answer, status, code)
    assert path in [None, *(error["path"] for error in problem.get("errors", []))], problem
    assert all(error["code"] and error["detail"] for error in problem.get("errors", []))
    assert path is None or path in problem["detail"]
    assert await api.contents(session) == ["before"]


def cases(table):
    """Parameters out of `name: (value, ...)`."""
    return [pytest.param(*values, id=name) for name, values in table.items()]


DIGITS = "9" * 5000
CALLS = ["messages", "history"]

#: What no JSON document of ours may be, whatever the call.
DOCUMENTS = {
    "empty": (b"", "invalid_json", "body"),
    "white space": (b" \n", "invalid_json", "body"),
    "no JSON": (b"hello", "invalid_json", "body"),
    "cut short": (b'{"message": "a"', "invalid_json", "body"),
    "a comma too many": (b'{"message": "a",}', "invalid_json", "body"),
    "single quotes": (b"{'message': 'a'}", "invalid_json", "body"),
    "something after its end": (b'{"message": "a"} {}', "invalid_json", "body"),
    "a raw line break in a text": (b'{"message": "a\nb"}', "invalid_json", "body"),
    "an unknown escape": (b'{"message": "\\x41"}', "invalid_json", "body"),
    "half an escape": (b'{"message": "\\ud8"}', "invalid_json", "body"),
    "a byte order mark": (b'\xef\xbb\xbf{"message": "a"}', "invalid_json", "body"),
    "no UTF-8": (b'{"message": "\xff"}', "invalid_json", "body"),
    "an overlong NUL": (b'{"message": "\xc0\x80"}', "invalid_json", "body"),
    "a surrogate in UTF-8": (b'{"message": "\xed\xa0\x80"}', "invalid_json", "body"),
    "UTF-16": ('{"message": "a"}'.encode("utf-16"), "invalid_json", "body"),
    "a raw NUL": (b"\0", "invalid_json", "body"),
    "null": (b"null", "validation_failed", "body"),
    "a list": (b"[]", "validation_failed", "body"),
    "a list of bodies": (b'[{"message": "a"}]', "validation_failed", "body"),
    "a text": (b'"a"', "validation_failed", "body"),
    "a number": (b"1", "validation_failed", "body"),
    "true": (b"true", "validation_failed", "body"),
    "NaN": (b"NaN", "number_not_storable", "body"),
    "100,000 lists": (b"[" * 100_000 + b"]" * 100_000, "too_deep", "body"),
    "100,000 lists that never end": (b"[" * 100_000, "too_deep", "body"),
    "100,000 objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too_deep", "body"),
    "600 lists": (b"[" * 600 + b"]" * 600, "too_deep", "body"),
    "600 lists in an unknown field": (
        b'{"message": "a", "messages": [], "x": ' + b"[" * 600 + b"]" * 600 + b"}",
        "too_deep",
        "body",
    ),
    "a key twice": (b'{"x": 1, "x": 1}', "duplicate_key", "body.x"),
    "a key twice, once escaped": (b'{"message": "a", "m\\u0065ssage": "b"}', "duplicate_key", "body.message"),
    "a key twice in an unknown field": (
        b'{"x": [{"y": {"z": 1, "z": 2}}]}',
        "duplicate_key",
        "body.x.0.y.z",
    ),
    "a NUL in an unknown field": (b'{"x": "\\u0000"}', "text_not_storable", "body.x"),
    "a NUL in an unknown key": (b'{"\\u0000": 1}', "text_not_storable", "body"),
}

#: What no text may be: (JSON, code).
TEXTS = {
    "null": ("null", "validation_failed"),
    "a number": ("1", "validation_failed"),
    "a fraction": ("1.5", "validation_failed"),
    "true": ("true", "validation_failed"),
    "a list": ('["a"]', "validation_failed"),
    "an object": ('{"a": "b"}', "validation_failed"),
    "NaN": ("NaN", "number_not_storable"),
    "a NUL": (r'"a\u0000b"', "text_not_storable"),
    "half a pair": (r'"\ud800"', "text_not_storable"),
    "the other half": (r'"a\udfffb"', "text_not_storable"),
    "a pair the wrong way": (r'"\ude00\ud83d"', "text_not_storable"),
    "a byte too long": (f'"{"a" * (256 * 1024 + 1)}"', "content_too_large"),
    "too long in UTF-8 only": (f'"{"ế" * 87_382}"', "content_too_large"),
}

#: What no metadata may be: (JSON, code, path below the metadata).
METADATA = {
    "a text": ('"a"', "validation_failed", ""),
    "a number": ("1", "validation_failed", ""),
    "false": ("false", "validation_failed", ""),
    "a list": ("[]", "validation_failed", ""),
    "a list of pairs": ('[["a", 1]]', "validation_failed", ""),
    "a byte too long": (json.dumps({"a": "a" * (16 * 1024 - 7)}), "metadata_too_large", ""),
    "too long in UTF-8 only": (json.dumps({"a": "ế" * 5460}), "metadata_too_large", ""),
    "a level too deep": ('{"a":' * 33 + "1" + "}" * 33, "metadata_too_deep", ""),
    "a level too deep with lists": ('{"a":' + "[" * 32 + "]" * 32 + "}", "metadata_too_deep", ""),
    "400 levels": ('{"a":' + "[" * 400 + "]" * 400 + "}", "metadata_too_deep", ""),
    "1,000 levels": ('{"a":' * 1000 + "1" + "}" * 1000, "too_deep", None),
    "100,000 levels": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep", None),
    "a NUL": (r'{"a": ["b", "\u0000"]}', "text_not_storable", ".a.1"),
    "a NUL in a key": (r'{"a": {"\u0000": 1}}', "text_not_storable", ".a"),
    "half a pair": (r'{"a": "\udc00"}', "text_not_storable", ".a"),
    "half a pair in a key": (r'{"\ud800": 1}', "text_not_storable", ""),
    "below half a pair": (r'{"\ud800": {"b": "\u0000"}}', "text_not_storable", r".\\ud800.b"),
    "a key twice": ('{"a": 1, "a": 1}', "duplicate_key", ".a"),
    "an empty key twice": ('{"": 1, "": 2}', "duplicate_key", "."),
    "half a pair as a key twice": (r'{"\ud800": 1, "\ud800": 2}', "duplicate_key", r".\\ud800"),
    "a nested key twice": ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "duplicate_key", ".a.0.b"),
    "NaN": ('{"a": NaN}', "number_not_storable", ".a"),
    "Infinity": ('{"a": [Infinity]}', "number_not_storable", ".a.0"),
    "-Infinity": ('{"a": -Infinity}', "number_not_storable", ".a"),
    "1e999": ('{"a": 1e999}', "number_not_storable", ".a"),
    "-1e999": ('{"a": -1E+999}', "number_not_storable", ".a"),
    "1e-999": ('{"a": 1e-999}', "number_not_storable", ".a"),
    "a fraction that becomes zero": ('{"a": -0.' + "0" * 400 + "1}", "number_not_storable", ".a"),
    "a fraction of 5,000 digits": ('{"a": ' + DIGITS + ".5}", "number_not_storable", ".a"),
    "5,000 digits": ('{"a": ' + DIGITS + "}", "number_not_storable", ".a"),
    "4,001 digits": ('{"a": ' + DIGITS[:4001] + "}", "number_not_storable", ".a"),
    "-4,001 digits": ('{"a": -' + DIGITS[:4001] + "}", "number_not_storable", ".a"),
}


class TestBodies:
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(("body", "code", "path"), cases(DOCUMENTS))
    async def test_what_is_no_document_is_refused(self, api, session, call, body, code, path):
        answer = await api.post(f"{session}/{call}", content=body, headers=JSON | {"Idempotency-Key": "k"})
        await assert_refused(api, session, answer, code=code, path=path)

    @pytest.mark.parametrize(("text", "code"), cases(TEXTS))
    async def test_a_message_is_a_text_that_can_be_kept(self, api, session, text, code):
        answer = await api.post(f"{session}/messages", content='{"message": ' + text + "}", headers=JSON)
        await assert_refused(api, session, answer, code=code, path="body.message")

    @pytest.mark.parametrize(("text", "code"), cases(TEXTS))
    async def test_a_records_content_is_a_text_that_can_be_kept(self, api, session, text, code):
        good, bad = '{"role": "user", "content": "good"}', '{"role": "user", "content": ' + text + "}"
        answer = await api.post(
            f"{session}/history", content='{"messages": [' + good + "," + bad + "]}", headers=JSON
        )
        await assert_refused(api, session, answer, code=code, path="body.messages.1.content")

    @pytest.mark.parametrize(("metadata", "code", "path"), cases(METADATA))
    async def test_a_messages_metadata_is_an_object_that_can_be_kept(
        self, api, session, metadata, code, path
    ):
        answer = await api.post(
            f"{session}/messages",
            content='{"message": "a", "metadata": ' + metadata + "}",
            headers=JSON | {"Idempotency-Key": "k"},
        )
        expected = {None: "body"}.get(path, f"body.metadata{path}")
        await assert_refused(api, session, answer, code=code, path=expected.replace(r"\\", "\\"))

    @pytest.mark.parametrize(("metadata", "code", "path"), cases(METADATA))
    async def test_a_records_metadata_is_an_object_that_can_be_kept(self, api, session, metadata, code, path):
        good = '{"role": "user", "content": "good"}'
        bad = '{"role": "tool", "content": "", "metadata": ' + metadata + "}"
        answer = await api.post(
            f"{session}/history",
            content='{"messages": [' + good + "," + bad + "]}",
            headers=JSON | {"Idempotency-Key": "k"},
        )
        expected = {None: "body"}.get(path, f"body.messages.1.metadata{path}")
        await assert_refused(api, session, answer, code=code, path=expected.replace(r"\\", "\\"))

    @pytest.mark.parametrize(
        ("body", "code"),
        cases(
            {
                "missing": ({}, "validation_failed"),
                "missing beside metadata": ({"metadata": {}}, "validation_failed"),
                "in capitals": ({"MESSAGE": "a"}, "validation_failed"),
                "empty": ({"message": ""}, "validation_failed"),
                "a blank": ({"message": " "}, "blank_message"),
                "white space of all kinds": ({"message": "\t\r\n\u00a0\u2003\u3000\u2028"}, "blank_message"),
            }
        ),
    )
    async def test_a_message_needs_words(self, api, session, body, code):
        answer = await api.post(f"{session}/messages", json=body)
        await assert_refused(api, session, answer, code=code, path="body.message")

    @pytest.mark.parametrize(
        ("messages", "path"),
        cases(
            {
                "null": (None, "body.messages"),
                "an object": ({}, "body.messages"),
                "a text": ("a", "body.messages"),
                "none": ([], "body.messages"),
                "a null": ([None], "body.messages.0"),
                "a message that is a text": (["a"], "body.messages.0"),
                "a message in a list": ([[{"role": "user", "content": "a"}]], "body.messages.0"),
                "an empty one": ([{}], "body.messages.0.role"),
                "no role": ([{"content": "a"}], "body.messages.0.role"),
                "no content": ([{"role": "user"}], "body.messages.0.content"),
                "a role that is null": ([{"role": None, "content": "a"}], "body.messages.0.role"),
                "a role that is empty": ([{"role": "", "content": "a"}], "body.messages.0.role"),
                "an unknown role": ([{"role": "bot", "content": "a"}], "body.messages.0.role"),
                "a role in capitals": ([{"role": "User", "content": "a"}], "body.messages.0.role"),
                "a role with a blank": ([{"role": "user ", "content": "a"}], "body.messages.0.role"),
                "a role that is a number": ([{"role": 1, "content": "a"}], "body.messages.0.role"),
                "a role that is a list": ([{"role": ["user"], "content": "a"}], "body.messages.0.role"),
                "a role that is an object": ([{"role": {}, "content": "a"}], "body.messages.0.role"),
                "a flaw in the last of a hundred": (
                    [{"role": "user", "content": "a"}] * 99 + [{"role": "user", "content": 1}],
                    "body.messages.99.content",
                ),
            }
        ),
    )
    async def test_records_are_complete(self, api, session, messages, path):
        answer = await api.post(f"{session}/history", json={"messages": messages})
        await assert_refused(api, session, answer, code="validation_failed", path=path)

    async def test_records_are_at_most_a_hundred(self, api, session):
        answer = await api.post(
            f"{session}/history", json={"messages": [{"role": "user", "content": "a"}] * 101}
        )
        await assert_refused(api, session, answer, code="too_many_messages", path="body.messages")
        assert "APPEND_MESSAGES_MAX" in answer.json()["detail"]

    async def test_every_flaw_is_named(self, api, session):
        body = {"messages": [{"role": "bot", "content": 1}, {"content": "a", "metadata": []}]}
        problem = assert_problem(await api.post(f"{session}/history", json=body), 422, "validation_failed")
        assert {error["path"] for error in problem["errors"]} == {
            "body.messages.0.role",
            "body.messages.0.content",
            "body.messages.1.role",
            "body.messages.1.metadata",
        }

    @pytest.mark.parametrize(
        "timestamp",
        cases(
            {
                "no offset": ("2025-11-14T10:30:00",),
                "a date": ("2025-11-14",),
                "no seconds": ("2025-11-14T10:30Z",),
                "a short offset": ("2025-11-14T10:30:00+07",),
                "an offset without its colon": ("2025-11-14T10:30:00+0700",),
                "an offset of a day": ("2025-11-14T10:30:00+24:00",),
                "an offset beyond the clock": ("2025-11-14T10:30:00+99:99",),
                "the year 1999": ("1999-12-31T23:59:59.999Z",),
                "the year 1999 in UTC": ("2000-01-01T00:30:00+01:00",),
                "two days ahead": ((datetime.now(UTC) + timedelta(days=2)).isoformat(),),
                "the end of the calendar": ("9999-12-31T23:59:59Z",),
                "beyond the end of the calendar": ("9999-12-31T23:59:59-01:00",),
                "before the calendar": ("0001-01-01T00:00:00+01:00",),
                "the year 0": ("0000-01-01T00:00:00Z",),
                "a year of five digits": ("12025-11-14T10:30:00Z",),
                "24:00": ("2025-11-14T24:00:00Z",),
                "a leap second": ("2016-12-31T23:59:60Z",),
                "the 30th of February": ("2025-02-30T10:30:00Z",),
                "seconds since 1970": (1763116200,),
                "milliseconds since 1970": (1763116200123,),
                "seconds since 1970 as text": ("1763116200",),
                "a fraction": (1763116200.5,),
                "true": (True,),
                "empty": ("",),
                "a blank around it": (" 2025-11-14T10:30:00Z ",),
                "other digits": ("２０２５-11-14T10:30:00Z",),
                "a list": (["2025-11-14T10:30:00Z"],),
                "an object": ({},),
                "a word": ("now",),
            }
        ),
    )
    async def test_a_timestamp_is_a_moment_between_2000_and_tomorrow(self, api, session, timestamp):
        good = {"role": "user", "content": "good"}
        answer = await api.post(
            f"{session}/history", json={"messages": [good, {**good, "timestamp": timestamp}]}
        )
        await assert_refused(api, session, answer, code="validation_failed", path="body.messages.1.timestamp")

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(
        "content_type",
        cases(
            {
                "missing": (None,),
                "empty": ("",),
                "text": ("text/plain",),
                "a form": ("application/x-www-form-urlencoded",),
                "a form of parts": ("multipart/form-data; boundary=x",),
                "something like JSON": ("application/jsonx",),
                "half a type": ("application",),
                "JSON in its parameters": ("text/html; application/json",),
                "no ASCII": ("application/đson".encode(),),
            }
        ),
    )
    async def test_another_content_type_is_a_415(self, api, session, call, content_type):
        headers = {name: value for name, value in {"Content-Type": content_type}.items() if value is not None}
        answer = await api.post(f"{session}/{call}", content=b'{"message": "a"}', headers=headers)
        await assert_refused(api, session, answer, status=415, code="unsupported_media_type")
        assert "application/json" in answer.json()["detail"]


#: What no id of a user may be: (query, code).
USERS = {
    "empty": ("", "validation_failed"),
    "257 characters": ("u" * 257, "validation_failed"),
    "a NUL": ("a%00b", "text_not_storable"),
}

#: What no whole number may be.
NUMBERS = [
    "",
    "a",
    "1.5",
    "1.0",
    "1e2",
    "true",
    "null",
    "NaN",
    "0x10",
    "1_0",
    "%201",
    "1%20",
    "%2B1",
    "١",
    "--1",
    DIGITS,
    f"-{DIGITS}",
    "%00",
    "[1]",
]


class TestQueries:
    @pytest.mark.parametrize(("user_id", "code"), cases(USERS))
    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_a_user_id_is_a_text_that_can_be_kept(self, api, session, method, user_id, code):
        answer = await api.request(method, f"{SESSIONS}?user_id={user_id}")
        await assert_refused(api, session, answer, code=code, path="query.user_id")

    @pytest.mark.parametrize("method", ["GET", "POST"])
    async def test_a_user_id_is_needed_to_create_and_to_list(self, api, session, method):
        for query in ("", "?", "?user=user123", "?USER_ID=user123"):
            answer = await api.request(method, f"{SESSIONS}{query}")
            await assert_refused(api, session, answer, code="validation_failed", path="query.user_id")

    @pytest.mark.parametrize(("user_id", "code"), cases(USERS))
    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("GET", "", None),
            ("DELETE", "", None),
            ("GET", "/history", None),
            ("POST", "/history", {"messages": [{"role": "user", "content": "a"}]}),
            ("POST", "/messages", {"message": "a"}),
        ],
    )
    async def test_so_is_the_user_id_of_a_call_about_a_session(
        self, api, session, method, path, body, user_id, code
    ):
        answer = await api.request(method, f"{session}{path}?user_id={user_id}", json=body)
        await assert_refused(api, session, answer, code=code, path="query.user_id")

    @pytest.mark.parametrize(
        ("path", "name", "out_of_range"),
        [
            ("{session}/history", "max_messages", [-1, 0, 1001, 2**31, 2**63, 10**30]),
            ("{session}/history", "before_seq", [-1, 0, 2**31, 2**63, 10**30]),
            ("{session}/history", "min_seq", [-1, 2**31, 2**63, 10**30]),
            ("{session}", "min_seq", [-1, 2**31, 2**63, 10**30]),
            (f"{SESSIONS}?user_id=user123&", "limit", [-1, 0, 101, 2**31, 2**63, 10**30]),
        ],
        ids=["max_messages", "before_seq", "min_seq of a history", "min_seq of a session", "limit"],
    )
    async def test_a_number_is_whole_and_in_its_range(self, api, session, path, name, out_of_range):
        for number in [*NUMBERS, *out_of_range]:
            url = path.format(session=session)
            answer = await api.get(f"{url.rstrip('&')}{'&' if '?' in url else '?'}{name}={number}")
            await assert_refused(api, session, answer, code="validation_failed", path=f"query.{name}")

    @pytest.mark.parametrize("status", ["", "Active", "active,archived", "deleted", "%00", "1"])
    async def test_a_status_is_one_of_three(self, api, session, status):
        answer = await api.get(f"{SESSIONS}?user_id=user123&status={status}")
        await assert_refused(api, session, answer, code="validation_failed", path="query.status")

    @pytest.mark.parametrize(
        "cursor",
        cases(
            {
                "empty": ("",),
                "a word": ("next",),
                "a number": ("1",),
                "a session's id": ("01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55",),
                "half of one": ("1763116200123.01998f2e5b7c",),
                "in capitals": ("1763116200123.01998F2E5B7C7D3A9F102B6D4C8E1A55",),
                "with dashes": ("1763116200123.01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55",),
                "no digits": ("now.01998f2e5b7c7d3a9f102b6d4c8e1a55",),
                "a negative time": ("-1.01998f2e5b7c7d3a9f102b6d4c8e1a55",),
                "the year 10000": ("253402300800000.01998f2e5b7c7d3a9f102b6d4c8e1a55",),
                "a time of 5,000 digits": (f"{DIGITS}.01998f2e5b7c7d3a9f102b6d4c8e1a55",),
                "a line break after it": ("1763116200123.01998f2e5b7c7d3a9f102b6d4c8e1a55%0A",),
                "other digits": ("١.01998f2e5b7c7d3a9f102b6d4c8e1a55",),
                "a NUL": ("%00",),
            }
        ),
    )
    async def test_a_cursor_is_one_of_ours(self, api, session, cursor):
        answer = await api.get(f"{SESSIONS}?user_id=user123&after={cursor}")
        await assert_refused(api, session, answer, code="unknown_cursor", path="query.after")

    @pytest.mark.parametrize(
        ("path", "name", "value"),
        [
            ("", "user_id", "user123"),
            ("", "min_seq", "1"),
            ("/history", "user_id", "user123"),
            ("/history", "max_messages", "10"),
            ("/history", "before_seq", "2"),
            ("/history", "min_seq", "1"),
        ],
    )
    async def test_a_parameter_is_given_once(self, api, session, path, name, value):
        for query in (f"{name}={value}&{name}={value}", f"{name}={value}&x=1&{name[:-1]}%{ord(name[-1]):x}="):
            answer = await api.get(f"{session}{path}?{query}")
            await assert_refused(api, session, answer, code="duplicate_parameter", path=f"query.{name}")

    @pytest.mark.parametrize(
        "query",
        [
            "user_id=a&user_id=b",
            "user_id=a&limit=1&limit=2",
            "user_id=a&status=all&status=all",
            "user_id=a&after=&after=",
        ],
    )
    async def test_so_is_a_parameter_of_a_list(self, api, session, query):
        answer = await api.get(f"{SESSIONS}?{query}")
        await assert_refused(api, session, answer, code="duplicate_parameter")

    @pytest.mark.parametrize(
        "query",
        ["user_id=%FF", "user_id=%ED%A0%80", "user_id=%C0%80", "%FF=1", "x=%E1%BA", "user_id=user123&x=%ff"],
    )
    async def test_a_query_is_utf_8(self, api, session, query):
        for method, url in (("POST", SESSIONS), ("GET", SESSIONS), ("GET", session), ("DELETE", session)):
            answer = await api.request(method, f"{url}?{query}")
            await assert_refused(api, session, answer, code="text_not_storable", path="query")


class TestPaths:
    @pytest.mark.parametrize(
        "session_id",
        cases(
            {
                "a word": ("session",),
                "a number": ("1",),
                "a blank": ("%20",),
                "too short": ("01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a5",),
                "too long": ("01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a555",),
                "no hexadecimal digit": ("01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a5g",),
                "a NUL": ("%00",),
                "no UTF-8": ("%FF",),
                "a key of Redis": ("session:01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55",),
                "a wildcard": ("*",),
                "a character that is not ASCII": ("%F0%9F%98%80",),
                "5,000 characters": ("a" * 5000,),
            }
        ),
    )
    async def test_a_session_id_is_a_uuid(self, api, session, session_id):
        calls = [
            ("GET", "", None),
            ("DELETE", "", None),
            ("GET", "/history", None),
            ("POST", "/history", {"messages": [{"role": "user", "content": "a"}]}),
            ("POST", "/messages", {"message": "a"}),
        ]
        for method, path, body in calls:
            answer = await api.request(method, f"{SESSIONS}/{session_id}{path}", json=body)
            await assert_refused(api, session, answer, code="validation_failed", path="path.session_id")


BODIES = {"messages": {"message": "a"}, "history": {"messages": [{"role": "user", "content": "a"}]}}


@pytest.mark.parametrize("call", CALLS)
class TestHeaders:
    @pytest.mark.parametrize(
        "key",
        cases(
            {
                "empty": ([b""],),
                "256 characters": ([b"k" * 256],),
                "a blank": ([b"a b"],),
                "a tab": ([b"a\tb"],),
                "a control character": ([b"a\x7f"],),
                "Latin-1": ([b"\xe9"],),
                "UTF-8": (["ế".encode()],),
                "on two lines": ([b"a", b"a"],),
            }
        ),
    )
    async def test_an_idempotency_key_is_one_visible_word(self, api, session, call, key):
        answer = await api.post(
            f"{session}/{call}", json=BODIES[call], headers=[(b"Idempotency-Key", line) for line in key]
        )
        await assert_refused(
            api, session, answer, code="idempotency_key_malformed", path="header.Idempotency-Key"
        )

    @pytest.mark.parametrize(
        "tag",
        cases(
            {
                "any": ([b"*"],),
                "weak": ([b'W/"1"'],),
                "several": ([b'"1", "2"'],),
                "the same twice": ([b'"1","1"'],),
                "several lines": ([b'"1"', b'"1"'],),
                "a comma after it": ([b'"1",'],),
                "without quotes": ([b"1"],),
                "half a quote": ([b'"1'],),
                "single quotes": ([b"'1'"],),
                "empty": ([b""],),
                "an empty tag": ([b'""'],),
                "negative": ([b'"-1"'],),
                "a leading zero": ([b'"01"'],),
                "a fraction": ([b'"1.0"'],),
                "a blank in it": ([b'" 1"'],),
                "a word": ([b'"one"'],),
                "11 digits": ([b'"10000000000"'],),
                "5,000 digits": ([f'"{DIGITS}"'.encode()],),
                "Latin-1": ([b'"\xb2"'],),
            }
        ),
    )
    async def test_an_if_match_is_one_strong_tag(self, api, session, call, tag):
        answer = await api.post(
            f"{session}/{call}", json=BODIES[call], headers=[(b"If-Match", line) for line in tag]
        )
        await assert_refused(api, session, answer, code="if_match_malformed", path="header.If-Match")


class TestBounds:
    """At each bound a request is taken; one more is refused (above)."""

    async def test_what_is_exactly_as_large_as_allowed_is_kept(self, api):
        session = await api.new_session("u" * 256)
        metadata = {"a": "a" * (16 * 1024 - 8)}
        deep = json.loads('{"a":' * 32 + "1" + "}" * 32)
        records = [{"role": "user", "content": "a" * (256 * 1024), "metadata": metadata}]
        answer = await api.post(f"{session}/history", json={"messages": records})
        assert answer.status_code == 200, answer.text
        answer = await api.post(
            f"{session}/history",
            json={"messages": [{"role": "user", "content": "", "metadata": deep}] * 100},
        )
        assert answer.status_code == 200, answer.text
        history = await api.get(f"{session}/history", params={"max_messages": 1000})
        messages = history.json()["messages"]
        assert len(messages) == 101
        assert messages[0]["content"] == "a" * (256 * 1024)
        assert (messages[0]["metadata"], messages[100]["metadata"]) == (metadata, deep)

    async def test_a_bound_is_a_setting(self, settings):
        async with open_api(
            settings, message_content_bytes_max=4, user_id_characters_max=3, request_body_bytes_max=100
        ) as api:
            answer = await api.post(SESSIONS, params={"user_id": "user"})
            assert_problem(answer, 422, "user_id_too_long")
            session = await api.new_session("ana")
            answer = await api.post(f"{session}/messages", json={"message": "hello"})
            assert "4" in assert_problem(answer, 422, "content_too_large")["detail"]
            answer = await api.post(
                f"{session}/messages", json={"message": "hi", "metadata": {"a": "b" * 100}}
            )
            assert "100" in assert_problem(answer, 413, "body_too_large")["detail"]
            assert await api.message_count(session) == 0

    @pytest.mark.parametrize("call", CALLS)
    async def test_a_body_may_have_a_mebibyte_and_no_more(self, api, session, call):
        body = json.dumps(BODIES[call]).encode().ljust(MIB)
        for sent in (body + b" ", pieces(body + b" ")):
            answer = await api.post(f"{session}/{call}", content=sent, headers=JSON)
            await assert_refused(api, session, answer, status=413, code="body_too_large")
            assert "REQUEST_BODY_BYTES_MAX" in answer.json()["detail"]
        for sent in (body, pieces(body)):
            answer = await api.post(f"{session}/{call}", content=sent, headers=JSON)
            assert answer.status_code == 200

    async def test_a_length_may_be_written_with_zeros(self, api, session):
        body = b'{"messages":[{"role":"user","content":"a"}]}'
        length = f"{len(body):010}"
        # The condition takes the request past the short way in.
        headers = JSON | {"Content-Length": length, "If-Match": '"1"'}
        answer = await api.post(f"{session}/history", content=body, headers=headers)
        assert answer.status_code == 200, answer.text

    @pytest.mark.parametrize("length", ["-1", "a", "", "1.5", DIGITS])
    async def test_a_length_that_is_none_is_no_failure_of_ours(self, api, session, length):
        answer = await api.post(f"{session}/messages", content=b"", headers=JSON | {"Content-Length": length})
        assert 400 <= answer.status_code < 500
        assert await api.contents(session) == ["before"]


async def pieces(body):
    """A body whose length is not announced."""
    for start in range(0, len(body), 64 * 1024):
        yield body[start : start + 64 * 1024]


class TestBehindASocket:
    @pytest.fixture
    async def connection(self, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        yield reader, writer
        writer.close()

    async def refused(self, reader):
        """The answer's head and its problem document; the server closes the connection after it."""
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(re.search(r"content-length: (\d+)", head)[1])
            problem = json.loads(await reader.readexactly(length))
            assert await reader.read() == b""
        assert head.startswith("HTTP/1.1 413 ")
        assert "application/problem+json" in head
        assert "connection: close" in head.lower()
        assert problem["code"] == "body_too_large"

    @pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
    async def test_a_body_announced_as_too_large_is_refused_unread(self, api, session, connection, expect):
        reader, writer = connection
        writer.write(
            f"POST {session}/messages HTTP/1.1\r\nHost: chat.test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {1024 * MIB}\r\n{expect}\r\n".encode()
        )
        await self.refused(reader)
        assert await api.contents(session) == ["before"]

    async def test_a_body_without_a_length_is_refused_where_it_passes_the_bound(
        self, api, session, connection
    ):
        reader, writer = connection
        writer.write(
            f"POST {session}/history HTTP/1.1\r\nHost: chat.test\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        writer.write(chunk * 16 + b"1\r\n \r\n")
        await self.refused(reader)
        assert await api.contents(session) == ["before"]

    async def test_a_client_that_leaves_within_its_body_is_no_failure(self, api, session, port, caplog):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            f"POST {session}/messages HTTP/1.1\r\nHost: chat.test\r\nContent-Type: application/json\r\n"
            'Content-Length: 100\r\n\r\n{"message": "a"'.encode()
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        # Its end has reached the server before this request does.
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as later:
            assert (await later.get("/health/live")).status_code == 200
        assert await api.contents(session) == ["before"]
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []

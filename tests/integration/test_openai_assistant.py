"""The OpenAI-compatible assistant against a real HTTP server on a real socket."""

import asyncio
import json
import logging
import socket
import time
import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from app.assistants import ask
from app.assistants.openai_compatible import RESPONSE_BYTES_MAX, OpenAICompatibleAssistant
from app.chat import Message, new_uuid
from app.errors import AssistantFailed, AssistantTimedOut

pytestmark = pytest.mark.anyio

KEY = "sk-test-5up3r53cr3t"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@dataclass
class Request:
    at: float
    line: str
    headers: dict[str, str]
    body: dict


class Server:
    """Answers request n as its n-th reply says, every one after the last like the last."""

    def __init__(self, replies):
        self._replies = replies
        self._tasks = set()
        self.requests = []
        self.asked = asyncio.Event()
        self.port = 0

    async def handle(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
            reply = self._replies[min(len(self.requests), len(self._replies) - 1)]
            self.requests.append(Request(time.monotonic(), head[0], headers, json.loads(body)))
            self.asked.set()
            await reply(writer)
        except (asyncio.CancelledError, ConnectionError):
            pass  # the test is over, or the client has left
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"


@asynccontextmanager
async def serving(*replies):
    server = Server(replies)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        await server.stop()


def raw(status, content, **headers):
    lines = [f"HTTP/1.1 {status} Status", f"content-length: {len(content)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]

    async def reply(writer):
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()

    return reply


def sending(status, body, **headers):
    return raw(status, json.dumps(body).encode(), content_type="application/json", **headers)


def completing(content, **more):
    return sending(200, {"choices": [{"message": {"role": "assistant", "content": content}}], **more})


async def hanging(_):
    await asyncio.Event().wait()


async def dropping(writer):
    writer.transport.abort()


class Endless:
    """Sends white space until the client leaves."""

    def __init__(self):
        self.sent = 0

    async def __call__(self, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n[")
        while True:
            writer.write(b" " * 65_536)
            await writer.drain()
            self.sent += 65_536


@asynccontextmanager
async def assistant_of(base_url, **settings):
    assistant = OpenAICompatibleAssistant(
        **{"base_url": base_url, "model": "owl-7b", "api_key": KEY, "deadline_seconds": 20, **settings}
    )
    try:
        yield assistant
    finally:
        await assistant.close()


def message(content, role="user"):
    return Message(
        message_id=new_uuid(), role=role, content=content, created_at=datetime(2025, 1, 1, tzinfo=UTC), seq=1
    )


async def asked(server, *, history=None, deadline_seconds=20, **settings):
    async with assistant_of(server.url, **settings) as assistant:
        return await ask(assistant, history or [message("Hello?")], deadline_seconds=deadline_seconds)


async def failing(server, error=AssistantFailed, **settings):
    with pytest.raises(error) as caught:
        await asked(server, **settings)
    return caught.value


# One question


async def test_the_window_is_sent_as_a_chat_completion_and_the_answer_comes_back():
    history = [message("Chào bạn"), message("Chào!", "assistant"), message("Phiên sống bao lâu? 🕐")]
    async with serving(completing("Một giờ. 🕐")) as server:
        answer = await asked(server, history=history, system_prompt="Be brief.")
    assert (answer.text, answer.sources) == ("Một giờ. 🕐", ())
    [request] = server.requests
    assert request.line == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == f"bearer {KEY}"
    assert request.body == {
        "model": "owl-7b",
        "stream": False,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Chào bạn"},
            {"role": "assistant", "content": "Chào!"},
            {"role": "user", "content": "Phiên sống bao lâu? 🕐"},
        ],
    }


async def test_without_a_key_no_authorization_is_sent():
    async with serving(completing("yes")) as server:
        await asked(server, api_key=None)
    assert "authorization" not in server.requests[0].headers


async def test_old_messages_beyond_the_budget_are_not_sent():
    history = [message("a" * 50), message("b" * 50, "assistant"), message("c" * 50)]
    async with serving(completing("yes")) as server:
        await asked(server, history=history, history_characters_max=120)
    assert server.requests[0].body["messages"] == [{"role": "user", "content": "c" * 50}]


@pytest.mark.parametrize("path", ["/v1/", "/v1/chat/completions", "/v1?api-version=1"])
async def test_the_base_url_may_end_as_people_write_it(path):
    async with (
        serving(completing("yes")) as server,
        assistant_of(f"http://127.0.0.1:{server.port}{path}") as it,
    ):
        await it.answer([message("?")])
    assert server.requests[0].line.split("?")[0].split()[:2] == ["POST", "/v1/chat/completions"]


async def test_questions_of_many_sessions_are_asked_at_once():
    async with serving(completing("yes")) as server, assistant_of(server.url) as assistant:
        answers = await asyncio.gather(
            *(ask(assistant, [message(f"{n}")], deadline_seconds=20) for n in range(30))
        )
    assert [answer.text for answer in answers] == ["yes"] * 30
    assert {request.body["messages"][0]["content"] for request in server.requests} == {
        f"{n}" for n in range(30)
    }


@pytest.mark.parametrize(
    ("more", "sources"),
    [
        ({"citations": ["https://a", "https://b", "https://a"]}, ("https://a", "https://b")),
        ({"sources": ["a.md"]}, ("a.md",)),
        ({"citations": [{"url": "https://a"}]}, ()),
        ({"citations": "https://a"}, ()),
        ({"citations": ["x" * 8_000, "y" * 8_000]}, ("x" * 8_000,)),
        ({"citations": ["a\0b"]}, ("ab",)),
    ],
)
async def test_citations_are_sources_where_they_are_a_list_of_texts(more, sources):
    async with serving(completing("yes", **more)) as server:
        assert (await asked(server)).sources == sources


async def test_a_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "image_url"}, {"type": "text", "text": "two"}]
    async with serving(completing(parts)) as server:
        assert (await asked(server)).text == "one two"


async def test_what_the_store_can_not_keep_is_replaced():
    async with serving(completing("a\0b \ud83d")) as server:
        assert (await asked(server)).text == "ab ?"


# Trying again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
async def test_a_status_that_says_later_is_tried_again(status):
    async with serving(sending(status, {}, retry_after=0), completing("yes")) as server:
        assert (await asked(server)).text == "yes"
    assert len(server.requests) == 2
    assert server.requests[0].body == server.requests[1].body


async def test_a_broken_connection_is_tried_again():
    async with serving(dropping, completing("yes")) as server:
        assert (await asked(server)).text == "yes"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"retry_after": "1"},
        {"retry_after": "Wed, 01 Jan 2020 00:00:01 GMT", "date": "Wed, 01 Jan 2020 00:00:00 GMT"},
    ],
    ids=["seconds", "date by the server's clock"],
)
async def test_retry_after_is_waited_for(headers):
    async with serving(sending(503, {}, **headers), completing("yes")) as server:
        await asked(server)
    first, second = server.requests
    assert 0.99 <= second.at - first.at < 10


async def test_without_retry_after_the_waits_grow():
    async with serving(sending(503, {}), sending(503, {}), completing("yes")) as server:
        await asked(server)
    first, second, third = server.requests
    assert second.at - first.at >= 0.24
    assert third.at - second.at >= 0.49


async def test_retries_are_bounded_and_the_last_answer_is_the_error():
    async with serving(sending(503, {"error": {"message": "loading the model"}}, retry_after=0)) as server:
        error = await failing(server, retries_max=2)
    assert len(server.requests) == 3
    assert error.detail == f"{server.url}/chat/completions answered 503: loading the model"


async def test_a_retry_after_beyond_the_deadline_fails_at_once():
    async with serving(sending(429, {"error": {"message": "slow down"}}, retry_after=3600)) as server:
        error = await failing(server, deadline_seconds=30)
    assert len(server.requests) == 1
    assert "answered 429: slow down; to be tried again in 3600 s, with " in error.detail


# Failing


async def test_a_refused_key_is_said_with_the_servers_words_and_not_tried_again(caplog):
    caplog.set_level(logging.DEBUG)
    said = f"Incorrect API key provided: {KEY}. " + "See the documentation. " * 50
    async with serving(sending(401, {"error": {"message": said, "code": "invalid_api_key"}})) as server:
        error = await failing(server)
    assert len(server.requests) == 1
    assert "answered 401: Incorrect API key provided: [the API key]. See the" in error.detail
    assert error.hint == "check OPENAI_API_KEY"
    assert len(error.detail) < 400


@pytest.mark.parametrize(
    "reply",
    [
        sending(401, {"error": {"message": f"wrong key {KEY}"}}),
        sending(400, {"error": f"Received={KEY}"}),
        sending(403, {"detail": [{"input": KEY}]}),
        raw(502, f"<html>{KEY}</html>".encode(), retry_after=0),
        raw(200, f"not JSON {KEY}".encode()),
        sending(200, {"error": {"message": KEY}}),
        sending(200, {"choices": [{"message": {"refusal": KEY}}]}),
        dropping,
    ],
)
async def test_the_key_never_stands_in_an_error_or_in_a_log(reply, caplog):
    caplog.set_level(logging.DEBUG)
    async with serving(reply) as server:
        error = await failing(server, retries_max=1)
    assert server.requests[0].headers["authorization"] == f"bearer {KEY}"
    assert KEY not in "".join(traceback.format_exception(error))
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (raw(200, b""), "not JSON"),
        (raw(200, b'{"choices": ['), "not JSON"),
        (raw(200, b"data: {}\n\n"), "not JSON: data: {}"),
        (raw(200, b"\xff\xfe\x00"), "not JSON"),
        (raw(200, b"[" * 100_000), "not JSON"),
        (sending(200, []), "no chat completion"),
        (sending(200, None), "no chat completion"),
        (sending(200, {}), "no chat completion"),
        (sending(200, {"choices": []}), "sent no choices"),
        (sending(200, {"choices": [None]}), "no chat completion"),
        (sending(200, {"choices": [{"text": "old style"}]}), "no chat completion"),
        (sending(200, {"choices": [{"message": {}}]}), "answer is empty"),
        (completing(None), "answer is empty"),
        (completing(" \n"), "answer is empty"),
        (completing(7), "answer is empty"),
        (
            sending(200, {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}),
            "finish_reason: content_filter",
        ),
        (
            sending(200, {"choices": [{"message": {"content": None, "refusal": "I won't"}}]}),
            "declined: I won't",
        ),
        (sending(200, {"error": {"message": "no such model"}}), "answered: no such model"),
        (sending(404, {"error": "model not found"}), "answered 404: model not found .*OPENAI_MODEL"),
        (raw(400, b"plain words"), "answered 400: plain words"),
        (raw(400, b""), "answered 400$"),
        (sending(307, {}, location="http://elsewhere.example/v1"), "redirects to elsewhere.example"),
    ],
)
async def test_an_answer_that_is_none_fails_once_and_says_what_came(reply, said):
    async with serving(reply) as server:
        with pytest.raises(AssistantFailed, match=said):
            await asked(server)
    assert len(server.requests) == 1


async def test_an_answer_without_end_is_not_read_to_the_end():
    endless = Endless()
    async with serving(endless) as server:
        error = await failing(server)
    # What lay in the sockets' buffers comes on top.
    assert endless.sent < 5 * RESPONSE_BYTES_MAX
    assert f"more than {RESPONSE_BYTES_MAX} bytes" in error.detail


async def test_a_server_that_is_not_there_is_named():
    with socket.socket() as reserved:
        # Bound and not listening: nobody else can take the port, and connecting to it is refused.
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        async with assistant_of(url, retries_max=1) as assistant:
            with pytest.raises(
                AssistantFailed, match=f"{url}/chat/completions can't be reached: ConnectError"
            ):
                await ask(assistant, [message("?")], deadline_seconds=20)


# Time


async def test_a_server_that_is_too_slow_is_a_timeout_and_not_asked_again():
    async with serving(hanging) as server:
        error = await failing(server, AssistantTimedOut, read_timeout_seconds=0.2)
    assert "did not answer within 0.2 s" in error.detail
    assert len(server.requests) == 1


async def test_the_deadline_ends_a_question_that_hangs():
    async with serving(hanging) as server:
        error = await failing(server, AssistantTimedOut, deadline_seconds=0.3)
    assert "within 0.3 s" in error.detail


async def test_cancelling_passes_through_and_the_next_question_is_answered():
    async with serving(hanging, completing("yes")) as server, assistant_of(server.url) as assistant:
        task = asyncio.create_task(ask(assistant, [message("?")], deadline_seconds=20))
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ask(assistant, [message("?")], deadline_seconds=20)).text == "yes"

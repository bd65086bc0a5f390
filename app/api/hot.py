"""The calls that a running chat makes all the time, past the framework: routing and dependencies cost as much as all
the rest of such a request.

Only the plain shape of a request is answered here. Whatever is unusual about one (a parameter, a header, a body that is
refused) goes on to the call's route, which knows every refusal and is what OpenAPI describes. Both end in the same
functions, so there are two ways in and one behaviour.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.problems import RequestRefused, chat_problem, fault_problem
from app.api.requests import KEY, TAG, Body, parsed_body
from app.api.schemas import MessageIn, RecordsIn
from app.api.sessions import SEQ_MAX, answer_message, append_records, history_of
from app.errors import ChatError
from app.wiring import Runtime

_PATH = re.compile(r"/api/chat/sessions/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/(history|messages)")

_NUMBER = re.compile(rb"(max_messages|before_seq|min_seq)=([0-9]{1,9})")
#: A user id that is the same however it is encoded.
_USER = re.compile(rb"user_id=([A-Za-z0-9._~@-]{1,200})")

#: As clients write it.
_JSON = frozenset(
    {b"application/json", b"application/json; charset=utf-8", b"application/json;charset=utf-8"}
)

_BOUNDS = {"max_messages": (1, 1000), "before_seq": (1, SEQ_MAX), "min_seq": (0, SEQ_MAX)}

_Post = Callable[..., Awaitable[Response]]
_POSTS: dict[str, tuple[type[Any], _Post]] = {
    "history": (RecordsIn, append_records),
    "messages": (MessageIn, answer_message),
}


class HotFirst(FastAPI):
    """An application whose hot calls come before all else of it: the layers around its routes cost as much as a read
    from Redis.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await super().__call__(scope, receive, send)
            return
        runtime: Runtime = self.state.runtime
        session_id, what = UUID(match[1]), match[2]
        response: Response | None = None
        try:
            if scope["method"] == "GET" and what == "history":
                response = await _history(runtime, session_id, scope)
            elif scope["method"] == "POST" and (asked := _plain_post(runtime, scope)) is not None:
                body, receive = await _body(receive)
                if body is not None:
                    response = await _posted(runtime, session_id, what, body, asked)
        except ChatError as exc:
            response = chat_problem(exc)
        except Exception as exc:  # noqa: BLE001 - as the application's outermost layer does for its routes
            response = fault_problem(exc)
        if response is not None:
            await response(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


async def _history(runtime: Runtime, session_id: UUID, scope: Scope) -> Response | None:
    seen: tuple[int, ...] = ()
    for name, value in scope["headers"]:
        if name == b"if-none-match":
            tag = TAG.fullmatch(value.decode("latin-1"))
            if tag is None or seen:
                return None
            seen = (int(tag[1]),)
    query = _query(runtime, scope["query_string"], _BOUNDS)
    if query is None:
        return None
    return await history_of(
        runtime,
        session_id,
        user_id=query.get("user_id"),
        seen=(seen, False),
        max_messages=query.get("max_messages"),
        before_seq=query.get("before_seq"),
        min_seq=query.get("min_seq"),
    )


def _query(runtime: Runtime, text: bytes, numbers: dict[str, tuple[int, int]]) -> dict[str, Any] | None:
    """The parameters, each plain and given once; None: there is something to refuse, or to decode."""
    found: dict[str, Any] = {}
    if not text:
        return found
    for part in text.split(b"&"):
        name: str
        value: int | str
        if (number := _NUMBER.fullmatch(part)) is not None:
            name, value = number[1].decode(), int(number[2])
            low, high = numbers.get(name, (1, 0))
            if not low <= value <= high:
                return None
        elif (user := _USER.fullmatch(part)) is not None:
            name, value = "user_id", user[1].decode()
            if len(value) > runtime.settings.user_id_characters_max:
                return None
        else:
            return None
        if name in found:
            return None
        found[name] = value
    return found


def _plain_post(runtime: Runtime, scope: Scope) -> dict[str, Any] | None:
    """Who posts and under which key, where the body is JSON of a length that was announced and is taken."""
    asked = _query(runtime, scope["query_string"], {})
    if asked is None:
        return None
    is_json = has_length = False
    for name, value in scope["headers"]:
        if name == b"content-type":
            if is_json or value.lower() not in _JSON:
                return None
            is_json = True
        elif name == b"content-length":
            if has_length or not value.isdigit() or len(value) > 9:  # noqa: PLR2004 - digits of a gigabyte
                return None
            has_length = int(value) <= runtime.settings.request_body_bytes_max
        elif name == b"idempotency-key":
            key = value.decode("latin-1")
            if "key" in asked or not KEY.fullmatch(key):
                return None
            asked["key"] = key
        elif name in {b"if-match", b"transfer-encoding"}:
            return None
    return asked if is_json and has_length else None


async def _body(receive: Receive) -> tuple[bytes | None, Receive]:
    """The whole body, and how to receive it once more. None: the client left before its end."""
    messages: list[Message] = []
    body = bytearray()
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            return None, _replayed(messages, receive)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body), _replayed(messages, receive)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def again() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return again


async def _posted(
    runtime: Runtime, session_id: UUID, what: str, raw: bytes, asked: dict[str, Any]
) -> Response | None:
    model, post = _POSTS[what]
    try:
        body: Body[Any] = parsed_body(model, raw)
        return await post(
            runtime,
            session_id,
            body,
            user_id=asked.get("user_id"),
            key=asked.get("key"),
            if_match=None,
        )
    except RequestRefused:
        # Before anything was stored. The route says it in full.
        return None

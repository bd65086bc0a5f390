"""Problem documents (RFC 9457): the one shape of every error, and the one table of statuses."""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from app.errors import (
    AdoptionPending,
    AssistantFailed,
    AssistantTimedOut,
    CacheFull,
    ChatError,
    DurableStoreUnavailable,
    FreshnessUnknown,
    IdempotencyKeyReused,
    NotYetVisible,
    Overloaded,
    RedisUnavailable,
    SeqMismatch,
    SessionNotFound,
    SessionTooLarge,
    TurnInProgress,
    TurnTakenOver,
    Unavailable,
)

log = logging.getLogger("chat_sessions.api")

STATUS: Mapping[type[ChatError], HTTPStatus] = {
    SessionNotFound: HTTPStatus.NOT_FOUND,
    IdempotencyKeyReused: HTTPStatus.CONFLICT,
    TurnInProgress: HTTPStatus.CONFLICT,
    TurnTakenOver: HTTPStatus.CONFLICT,
    NotYetVisible: HTTPStatus.CONFLICT,
    SeqMismatch: HTTPStatus.PRECONDITION_FAILED,
    SessionTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    AssistantFailed: HTTPStatus.BAD_GATEWAY,
    AssistantTimedOut: HTTPStatus.GATEWAY_TIMEOUT,
    DurableStoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    RedisUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    CacheFull: HTTPStatus.SERVICE_UNAVAILABLE,
    FreshnessUnknown: HTTPStatus.SERVICE_UNAVAILABLE,
    AdoptionPending: HTTPStatus.SERVICE_UNAVAILABLE,
}


class RequestRefused(Exception):
    """A request that can't be carried out as it is; `errors` name what is wrong with which field."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY,
        errors: Sequence[Mapping[str, str]] = (),
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.status = status
        self.errors = tuple(errors)


def refused_field(code: str, path: str, detail: str) -> RequestRefused:
    """A 422 that names one field."""
    return refused_fields(code, [{"path": path, "code": code, "detail": detail}])


def refused_fields(code: str, errors: Sequence[Mapping[str, str]]) -> RequestRefused:
    """A 422 that names each of them, by `path`, `code` and `detail`."""
    return RequestRefused(
        code, "; ".join(f"{error['path']}: {error['detail']}" for error in errors), errors=errors
    )


def validation_failed(found: Sequence[Any], *, within: Sequence[str] = ()) -> RequestRefused:
    """The same of what pydantic has found, in what stands at `within`."""
    errors = [
        {
            "path": ".".join(str(part) for part in (*within, *error["loc"])),
            "code": str(error["type"]),
            "detail": str(error["msg"]).removeprefix("Value error, "),
        }
        for error in found
    ]
    return refused_fields("validation_failed", errors)


def no_archive() -> RequestRefused:
    """What only a database can say is asked of a service that has none."""
    return RequestRefused(
        "no_archive",
        "chats are kept in Redis alone: without DATABASE_URL there is no archive",
        status=HTTPStatus.CONFLICT,
    )


def problem(
    status: HTTPStatus, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any
) -> JSONResponse:
    return JSONResponse(
        {
            "type": f"urn:chat-sessions:problem:{code}",
            "title": status.phrase,
            "status": status.value,
            "detail": detail,
            "code": code,
            **extra,
        },
        status_code=status.value,
        headers=dict(headers or {}),
        media_type="application/problem+json",
    )


def chat_problem(exc: ChatError) -> JSONResponse:
    status = next((STATUS[kind] for kind in type(exc).__mro__ if kind in STATUS), None)
    if status is None:
        log.error("an error without a status", exc_info=exc)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the request failed inside the service")
    headers: dict[str, str] = {}
    extra: dict[str, Any] = {}
    if isinstance(exc, Unavailable):
        headers["Retry-After"] = str(math.ceil(exc.retry_after_seconds))
    if isinstance(exc, SeqMismatch):
        extra["current_seq"] = exc.current_seq
        headers["X-Session-Seq"] = str(exc.current_seq)
    if exc.hint is not None:
        extra["hint"] = exc.hint
    return problem(status, exc.code, exc.detail, headers=headers, **extra)


def fault_problem(exc: Exception) -> JSONResponse:
    """What is nobody's fault but ours: the log has it, the answer does not."""
    log.error("a request failed", exc_info=exc)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the request failed inside the service")


def _refusal_problem(exc: RequestRefused) -> JSONResponse:
    # The rest of a body that was refused unread would be taken for the next request.
    unread = exc.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return problem(
        exc.status,
        exc.code,
        exc.detail,
        headers={"Connection": "close"} if unread else None,
        **({"errors": list(exc.errors)} if exc.errors else {}),
    )


def _allowed(routes: Sequence[BaseRoute], request: Request) -> str:
    """Every method of the path: the framework names those of one route only."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Gives every error of the application its problem document. `routes` are those of its calls."""

    async def on_chat_error(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, ChatError)  # noqa: S101 - registered for it
        return chat_problem(exc)

    async def on_refused(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestRefused)  # noqa: S101 - registered for it
        return _refusal_problem(exc)

    async def on_validation(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)  # noqa: S101 - registered for it
        return _refusal_problem(validation_failed(exc.errors()))

    async def on_http(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)  # noqa: S101 - registered for it
        status = HTTPStatus(exc.status_code)
        code = status.phrase.lower().replace(" ", "_").replace("-", "_")
        headers = dict(exc.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = _allowed(routes, request) or headers.get("Allow", "")
        return problem(status, code, str(exc.detail), headers=headers)

    async def on_anything_else(_: Request, exc: Exception) -> JSONResponse:
        return fault_problem(exc)

    app.add_exception_handler(ChatError, on_chat_error)
    app.add_exception_handler(RequestRefused, on_refused)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything_else)

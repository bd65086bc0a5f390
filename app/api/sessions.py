"""The calls under `/api/chat`: the guide's five, and ours."""

import asyncio
import time
from collections.abc import Container
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import JSONResponse

from app import strict_json
from app.api.answers import JsonBytes, history_body, history_headers, truth
from app.api.problems import refused_field
from app.api.requests import (
    WHOLE_NUMBER,
    After,
    Body,
    Caller,
    IfMatch,
    Key,
    Owner,
    Seen,
    Served,
    cursor_text,
    json_body,
    readable_query,
    request_body,
)
from app.api.schemas import (
    AnswerOut,
    AppendedOut,
    CreatedOut,
    DeletedOut,
    HistoryOut,
    MessageIn,
    Problem,
    RecordsIn,
    SessionOut,
    SessionsOut,
)
from app.assistants import ask
from app.chat import (
    Message,
    NewMessage,
    SessionStatus,
    cut_to_milliseconds,
    json_text,
    keyed_message_id,
    new_uuid,
    utc_now,
)
from app.settings import Settings
from app.store import Append, BeginTurn, Turn
from app.wiring import Runtime

#: A turn is held for the assistant's deadline and this much for the two writes around it.
LEASE_MARGIN_SECONDS = 5

SEQ_MAX = 2**31 - 1


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        404: "unknown, deleted, foreign or expired",
        409: "the idempotency key was used for another request, or its request still runs; "
        "or the session has not reached `min_seq`",
        412: "`If-Match` names another seq: `current_seq` says which it is",
        413: "too large: the problem names the bound",
        415: "the body is not JSON",
        422: "bad input: each field is named",
        502: "the assistant failed; the user's message is kept",
        503: "a store can't be reached; see `Retry-After`",
        504: "the assistant was too slow; the user's message is kept",
    }
    return {status: {"model": Problem, "description": texts[status]} for status in statuses}


router = APIRouter(prefix="/api/chat", tags=["chat"], dependencies=[Depends(readable_query)])

SessionId = Annotated[UUID, Path(description="any UUID", examples=["01998f2e-5b7c-7d3a-9f10-2b6d4c8e1a55"])]
MinSeq = Annotated[
    int | None,
    Query(ge=0, le=SEQ_MAX, description="do not answer with anything older than this message", examples=[2]),
    WHOLE_NUMBER,
]


@router.post(
    "/sessions",
    status_code=201,
    response_model=CreatedOut,
    summary="Create a session",
    responses=_problems(422, 503),
)
async def create_session(runtime: Served, user_id: Owner) -> Response:
    """Makes an empty session for a user."""
    created = await runtime.store.create_session(user_id)
    return JSONResponse(
        CreatedOut.of(created.session).model_dump(),
        status_code=201,
        headers={
            **truth(seq=0, source=created.source),
            "Location": f"/api/chat/sessions/{created.session.session_id}",
        },
    )


@router.get(
    "/sessions",
    response_model=SessionsOut,
    response_model_exclude_none=True,
    summary="List a user's sessions, newest first",
    responses=_problems(422, 503),
)
async def list_sessions(
    runtime: Served,
    user_id: Owner,
    after: After,
    status: Annotated[
        SessionStatus,
        Query(
            description="active: created or appended to within the time to live; archived: the others",
            examples=["active"],
        ),
    ] = "active",
    limit: Annotated[
        int, Query(ge=1, le=100, description="sessions of a page", examples=[20]), WHOLE_NUMBER
    ] = 100,
) -> Response:
    """Follow `next` for older ones: a page is a place in the list, so nothing is given twice when new
    sessions are made meanwhile.
    """
    page = await runtime.store.list_sessions(user_id, status=status, limit=limit, after=after)
    next_cursor = cursor_text(page.next) if page.next is not None else None
    return JSONResponse(SessionsOut.of(page, next_cursor), headers=truth(source=page.source))


@router.get(
    "/sessions/{session_id}",
    response_model=SessionOut,
    summary="The session without its messages",
    responses=_problems(404, 409, 422, 503),
)
async def get_session(
    runtime: Served, session_id: SessionId, user_id: Caller, min_seq: MinSeq = None
) -> Response:
    """Whose it is, how long it is, and when it was last used."""
    read = await runtime.store.get_session(session_id, user_id=user_id, min_seq=min_seq)
    return JSONResponse(
        SessionOut.of(read.session).model_dump(),
        headers=truth(seq=read.session.message_count, source=read.source, freshness=read.freshness),
    )


@router.delete(
    "/sessions/{session_id}",
    response_model=DeletedOut,
    summary="Delete a session and its messages, in both stores",
    responses=_problems(404, 422, 503),
)
async def delete_session(runtime: Served, session_id: SessionId, user_id: Caller) -> Response:
    """It is gone for good when this is answered, and so are its idempotency keys."""
    session = await runtime.store.delete_session(session_id, user_id=user_id)
    return JSONResponse(
        {"message": f"Session {session_id} deleted"},
        headers=truth(seq=session.message_count, source=_truth_of(runtime)),
    )


@router.get(
    "/sessions/{session_id}/history",
    response_model=HistoryOut,
    response_model_exclude_none=True,
    summary="The newest messages, oldest first",
    responses={
        304: {"description": "the session has not moved since the tag of `If-None-Match`"},
        **_problems(404, 409, 422, 503),
    },
)
async def read_history(
    runtime: Served,
    session_id: SessionId,
    user_id: Caller,
    seen: Seen,
    max_messages: Annotated[
        int | None,
        Query(ge=1, le=1000, description="messages of a page; default: SESSION_MAX_MESSAGES", examples=[10]),
        WHOLE_NUMBER,
    ] = None,
    before_seq: Annotated[
        int | None,
        Query(ge=1, le=SEQ_MAX, description="page backwards: only messages before this one", examples=[101]),
        WHOLE_NUMBER,
    ] = None,
    min_seq: MinSeq = None,
) -> Response:
    """Follow `next_before_seq` for older ones. An `ETag` names the session's last message."""
    return await history_of(
        runtime,
        session_id,
        user_id=user_id,
        seen=seen,
        max_messages=max_messages,
        before_seq=before_seq,
        min_seq=min_seq,
    )


async def history_of(
    runtime: Runtime,
    session_id: UUID,
    *,
    user_id: str | None,
    seen: tuple[Container[int], bool],
    max_messages: int | None,
    before_seq: int | None,
    min_seq: int | None,
) -> Response:
    history = await runtime.store.read_history(
        session_id,
        max_messages=max_messages or min(runtime.settings.session_max_messages, 1000),
        before_seq=before_seq,
        min_seq=min_seq,
        user_id=user_id,
    )
    headers = history_headers(history)
    seqs, anything = seen
    if "ETag" in headers and (anything or history.session.message_count in seqs):
        return Response(status_code=304, headers=headers)
    return JsonBytes(history_body(history), headers)


@router.post(
    "/sessions/{session_id}/history",
    response_model=AppendedOut,
    summary="Append messages that were produced elsewhere, all or none",
    openapi_extra=request_body(RecordsIn),
    responses=_problems(404, 409, 412, 413, 415, 422, 503),
)
async def append_history(
    runtime: Served,
    session_id: SessionId,
    user_id: Caller,
    key: Key,
    if_match: IfMatch,
    body: Annotated[Body[RecordsIn], Depends(json_body(RecordsIn))],
) -> Response:
    """The assistant is not asked. With an `Idempotency-Key`, a retry appends nothing."""
    return await append_records(runtime, session_id, body, user_id=user_id, key=key, if_match=if_match)


async def append_records(
    runtime: Runtime,
    session_id: UUID,
    body: Body[RecordsIn],
    *,
    user_id: str | None,
    key: str | None,
    if_match: int | None,
) -> Response:
    records, settings = body.model.messages, runtime.settings
    if len(records) > settings.append_messages_max:
        raise refused_field(
            "too_many_messages",
            "body.messages",
            f"holds {len(records)}, at most {settings.append_messages_max} are taken (APPEND_MESSAGES_MAX)",
        )
    now = utc_now()
    messages = tuple(
        NewMessage(
            message_id=_message_id(session_id, key, index),
            role=record.role,
            content=_content(f"body.messages.{index}.content", record.content, settings),
            created_at=cut_to_milliseconds(record.timestamp) if record.timestamp else now,
            metadata=_metadata(f"body.messages.{index}.metadata", record.metadata, settings),
            request_digest=body.digest("append_history") if key and index == 0 else None,
            request_size=len(records) if key and index == 0 else None,
        )
        for index, record in enumerate(records)
    )
    appended = await runtime.store.append(
        Append(session_id=session_id, messages=messages, user_id=user_id, if_match=if_match)
    )
    return JsonBytes(
        f'{{"session_id":"{session_id}","first_seq":{appended.first_seq},"last_seq":{appended.last_seq}}}'.encode(),
        truth(seq=appended.session.message_count, source=appended.source),
    )


@router.post(
    "/sessions/{session_id}/messages",
    response_model=AnswerOut,
    summary="Say something and get the assistant's answer",
    openapi_extra=request_body(MessageIn),
    responses=_problems(404, 409, 412, 413, 415, 422, 502, 503, 504),
)
async def post_message(
    runtime: Served,
    session_id: SessionId,
    user_id: Caller,
    key: Key,
    if_match: IfMatch,
    body: Annotated[Body[MessageIn], Depends(json_body(MessageIn))],
) -> Response:
    """The message is stored before the assistant is asked, and stays when that fails: a retry with the same
    `Idempotency-Key` then goes on where the first attempt ended.
    """
    return await answer_message(runtime, session_id, body, user_id=user_id, key=key, if_match=if_match)


async def answer_message(
    runtime: Runtime,
    session_id: UUID,
    body: Body[MessageIn],
    *,
    user_id: str | None,
    key: str | None,
    if_match: int | None,
) -> Response:
    settings = runtime.settings
    text = _content("body.message", body.model.message, settings)
    if not text.strip():
        raise refused_field("blank_message", "body.message", "needs a character that is not white space")
    question = NewMessage(
        message_id=_message_id(session_id, key, 0),
        role="user",
        content=text,
        created_at=utc_now(),
        metadata=_metadata("body.metadata", body.model.metadata, settings),
        request_digest=body.digest("post_message") if key else None,
        request_size=2 if key else None,
    )
    begin = BeginTurn(
        answer_id=_message_id(session_id, key, 1),
        token=new_uuid(),
        lease_seconds=settings.assistant_timeout_seconds + LEASE_MARGIN_SECONDS,
    )
    turn = await runtime.store.begin_turn(
        Append(session_id=session_id, messages=(question,), user_id=user_id, if_match=if_match, turn=begin),
        window=settings.session_max_messages,
    )
    answer, seq = (turn.answer, turn.session.message_count) if turn.answer else await _answer(runtime, turn)
    metadata = strict_json.parse(answer.metadata.encode())
    return JSONResponse(
        {
            "session_id": str(session_id),
            "user_message": turn.question.content,
            "assistant_response": answer.content,
            "sources": metadata["sources"],
            "processing_time_ms": metadata["processing_time_ms"],
        },
        headers=truth(seq=seq, source=_truth_of(runtime)),
    )


async def _answer(runtime: Runtime, turn: Turn) -> tuple[NewMessage | Message, int]:
    """Asks the assistant, with no connection and no lock held, and stores what it says."""
    settings = runtime.settings
    started = time.perf_counter()
    try:
        said = await ask(
            runtime.assistant,
            turn.history,
            deadline_seconds=settings.assistant_timeout_seconds,
            answer_bytes_max=settings.message_content_bytes_max,
        )
        elapsed_ms = round((time.perf_counter() - started) * 1000)
        answer = NewMessage(
            message_id=turn.answer_id,
            role="assistant",
            content=said.text,
            created_at=utc_now(),
            metadata=json_text({"sources": list(said.sources), "processing_time_ms": elapsed_ms}),
        )
        appended = await runtime.store.finish_turn(turn, answer)
    except BaseException:
        # The user's message stays; a retry with the same key need not wait for the lease to end.
        await asyncio.shield(runtime.store.abandon_turn(turn))
        raise
    return answer, appended.session.message_count


def _truth_of(runtime: Runtime) -> str:
    return "redis" if runtime.mode == "redis-only" else "postgres"


def _message_id(session_id: UUID, key: str | None, index: int) -> UUID:
    return keyed_message_id(session_id, key, index) if key else new_uuid()


def _content(path: str, content: str, settings: Settings) -> str:
    size = len(content.encode())
    if size > settings.message_content_bytes_max:
        raise refused_field(
            "content_too_large",
            path,
            f"has {size} bytes, at most {settings.message_content_bytes_max} are kept "
            "(MESSAGE_CONTENT_BYTES_MAX)",
        )
    return content


def _metadata(path: str, metadata: dict[str, Any] | None, settings: Settings) -> str:
    """The metadata as it will be kept, for ever the same text."""
    text = json_text(metadata or {})
    size, depth = len(text.encode()), strict_json.levels(metadata or {})
    if size > settings.message_metadata_bytes_max:
        raise refused_field(
            "metadata_too_large",
            path,
            f"has {size} bytes as JSON, at most {settings.message_metadata_bytes_max} are kept "
            "(MESSAGE_METADATA_BYTES_MAX)",
        )
    if depth > settings.message_metadata_levels_max:
        raise refused_field(
            "metadata_too_deep",
            path,
            f"is nested {depth} levels deep, at most {settings.message_metadata_levels_max} are kept "
            "(MESSAGE_METADATA_LEVELS_MAX)",
        )
    return text

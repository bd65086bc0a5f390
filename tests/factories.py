"""Data for tests: plain functions, every field can be given."""

from datetime import datetime
from uuid import UUID

from app.chat import NewMessage, Role, json_text, keyed_message_id, new_uuid, utc_now
from app.store import Append, BeginTurn

DIGEST = "0f" * 16


def new_message(
    content: str = "Điều kiện tham gia đấu thầu?",
    *,
    role: Role = "user",
    metadata: object = None,
    message_id: UUID | None = None,
    created_at: datetime | None = None,
    request_digest: str | None = None,
    request_size: int | None = None,
) -> NewMessage:
    return NewMessage(
        message_id=message_id or new_uuid(),
        role=role,
        content=content,
        created_at=created_at or utc_now(),
        metadata=json_text({} if metadata is None else metadata),
        request_digest=request_digest,
        request_size=request_size,
    )


def new_append(
    session_id: UUID, *contents: str, user_id: str | None = None, if_match: int | None = None
) -> Append:
    return Append(
        session_id=session_id,
        messages=tuple(new_message(content) for content in contents or ("Xin chào",)),
        user_id=user_id,
        if_match=if_match,
    )


def keyed_append(session_id: UUID, key: str, *contents: str, digest: str = DIGEST) -> Append:
    """An append with an idempotency key, as the API makes it."""
    contents = contents or ("Xin chào",)
    return Append(
        session_id=session_id,
        messages=tuple(
            new_message(
                content,
                message_id=keyed_message_id(session_id, key, index),
                request_digest=digest if index == 0 else None,
                request_size=len(contents) if index == 0 else None,
            )
            for index, content in enumerate(contents)
        ),
    )


def turn_append(
    session_id: UUID,
    content: str = "Điều kiện tham gia đấu thầu?",
    *,
    key: str | None = None,
    digest: str = DIGEST,
    lease_seconds: float = 5,
    user_id: str | None = None,
    if_match: int | None = None,
) -> Append:
    """A user's message that begins a turn, with an idempotency key or without."""
    return Append(
        session_id=session_id,
        user_id=user_id,
        if_match=if_match,
        messages=(
            new_message(
                content,
                message_id=keyed_message_id(session_id, key, 0) if key else None,
                request_digest=digest if key else None,
                request_size=2 if key else None,
            ),
        ),
        turn=BeginTurn(
            answer_id=keyed_message_id(session_id, key, 1) if key else new_uuid(),
            token=new_uuid(),
            lease_seconds=lease_seconds,
        ),
    )

"""Data for tests: plain functions, every field can be given."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from app.chat import (
    CHAIN_START,
    ChatSession,
    NewMessage,
    Role,
    format_time,
    json_text,
    keyed_message_id,
    new_uuid,
    next_chain,
    utc_now,
)
from app.coherence.ports import Committed, Owner, Row
from app.store import Append, BeginTurn, FinishTurn, Turn

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


def new_turn(
    session_id: UUID,
    *,
    user_id: str | None = None,
    answer_id: UUID | None = None,
    lease: FinishTurn | None = None,
) -> Turn:
    """A turn as `begin_turn` would have returned it, for a session that may not exist."""
    return Turn(
        session=new_row(session_id).session,
        question=new_message().at(1),
        answer_id=answer_id or new_uuid(),
        lease=lease,
        user_id=user_id,
    )


def new_answer(turn: Turn, content: str = "Theo Điều 5.") -> NewMessage:
    return new_message(content, role="assistant", message_id=turn.answer_id)


def new_row(
    session_id: UUID | None = None,
    *,
    user_id: str = "user123",
    created_at: datetime | None = None,
    last_activity: datetime | None = None,
    message_count: int = 0,
    chain: bytes = CHAIN_START,
    owner: Owner = "postgres",
) -> Row:
    """A session's row as PostgreSQL would hold it."""
    created_at = created_at or utc_now()
    return Row(
        session=ChatSession(
            session_id=session_id or new_uuid(),
            user_id=user_id,
            created_at=created_at,
            last_activity=last_activity or created_at,
            message_count=message_count,
        ),
        chain=chain,
        owner=owner,
    )


def committed_append(row: Row, messages: Sequence[NewMessage]) -> Committed:
    """An append to `row` as PostgreSQL would have committed it."""
    first_seq = row.session.message_count + 1
    last_seq = row.session.message_count + len(messages)
    after = Row(
        session=replace(row.session, message_count=last_seq, last_activity=utc_now()),
        chain=next_chain(row.chain, [message.message_id for message in messages]),
        owner=row.owner,
    )
    return Committed(
        before=row,
        after=after,
        first_seq=first_seq,
        last_seq=last_seq,
        lines=tuple(message.line(seq) for seq, message in enumerate(messages, first_seq)),
    )


def guide_value(session_id: UUID, *contents: str, user_id: str = "user123") -> bytes:
    """A session's value as the guide's own program wrote it."""
    now = format_time(utc_now())
    return json.dumps(
        {
            "session_id": str(session_id),
            "user_id": user_id,
            "created_at": now,
            "last_activity": now,
            "messages": [
                {"role": "user", "content": content, "timestamp": now, "metadata": {}} for content in contents
            ],
        }
    ).encode()

"""A hybrid store as a reader of the Redis-only guide would add PostgreSQL to it: the one to be faster than.

One ORM transaction a request, then the session's whole JSON read, extended and written back in Redis.
Durable, and no more than that: a reader may meet an older copy, and two writers may lose each other's.
"""

import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis
from sqlalchemy import JSON, DateTime, ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

TTL_SECONDS = 3600
MESSAGES_MAX = 100


class Model(DeclarativeBase):
    type_annotation_map = {datetime: DateTime(timezone=True), dict[str, Any]: JSON}  # noqa: RUF012 - as SQLAlchemy documents it


class SessionModel(Model):
    __tablename__ = "by_hand_sessions"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    user_id: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[datetime]
    last_activity: Mapped[datetime]


class MessageModel(Model):
    __tablename__ = "by_hand_messages"
    id: Mapped[int] = mapped_column(primary_key=True)
    session_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(SessionModel.id), index=True)
    role: Mapped[str]
    content: Mapped[str]
    timestamp: Mapped[datetime]
    meta: Mapped[dict[str, Any]] = mapped_column("metadata")


class HandWrittenStore:
    def __init__(self, engine: AsyncEngine, redis: Redis) -> None:
        self.db = async_sessionmaker(engine, expire_on_commit=False)
        self.redis = redis

    async def create_session(self, user_id: str) -> uuid.UUID:
        now = datetime.now(UTC)
        async with self.db.begin() as db:
            session = SessionModel(user_id=user_id, created_at=now, last_activity=now)
            db.add(session)
        await self._save(session, [])
        return session.id

    async def add_messages(self, session_id: uuid.UUID, messages: Sequence[tuple[str, str]]) -> None:
        now = datetime.now(UTC)
        async with self.db.begin() as db:
            session = await db.get_one(SessionModel, session_id, with_for_update=True)
            session.last_activity = now
            db.add_all(
                MessageModel(session_id=session_id, role=role, content=content, timestamp=now, meta={})
                for role, content in messages
            )
        cached = await self.redis.get(f"session:{session_id}")
        if cached is None:
            await self._load(session)
            return
        new = [_json(role, content, now, {}) for role, content in messages]
        await self._save(session, json.loads(cached)["messages"] + new)

    async def history(self, session_id: uuid.UUID, max_messages: int) -> list[dict[str, Any]]:
        cached = await self.redis.getex(f"session:{session_id}", ex=TTL_SECONDS)
        if cached is not None:
            found: list[dict[str, Any]] = json.loads(cached)["messages"]
            return found[-max_messages:]
        async with self.db() as db:
            session = await db.get_one(SessionModel, session_id)
        return (await self._load(session))[-max_messages:]

    async def _load(self, session: SessionModel) -> list[dict[str, Any]]:
        query = select(MessageModel).where(MessageModel.session_id == session.id)
        async with self.db() as db:
            newest = (await db.scalars(query.order_by(MessageModel.id.desc()).limit(MESSAGES_MAX))).all()
        messages = [_json(one.role, one.content, one.timestamp, one.meta) for one in reversed(newest)]
        await self._save(session, messages)
        return messages

    async def _save(self, session: SessionModel, messages: list[dict[str, Any]]) -> None:
        value = {
            "session_id": str(session.id),
            "user_id": session.user_id,
            "created_at": session.created_at.isoformat(),
            "last_activity": session.last_activity.isoformat(),
            "messages": messages[-MESSAGES_MAX:],
        }
        await self.redis.setex(f"session:{session.id}", TTL_SECONDS, json.dumps(value, ensure_ascii=False))


def _json(role: str, content: str, at: datetime, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": content, "timestamp": at.isoformat(), "metadata": metadata}

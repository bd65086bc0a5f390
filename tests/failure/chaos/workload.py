"""Clients that chat, look, and leave: what they ask for is random, what they saw goes into the record.

Sessions are kept short and many: one is retired before Redis' window drops a message, so that every read shows
all of it. Doomed sessions are written, read and deleted; of them only the deletion is checked.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from tests.failure.chaos.client import Caller, NoAnswer, Reply
from tests.failure.chaos.record import (
    NO_ANSWER,
    Operation,
    OperationKind,
    Record,
    Session,
    message_id,
)

LIVE_SESSIONS = 6
DOOMED_SESSIONS = 2

#: Below SESSION_MAX_MESSAGES by what may be under way.
RETIRED_AT_MESSAGES = 88

#: Longer than any answer may take, so that a client that waits longer has found something.
PATIENCE_SECONDS = 10.0

#: How long a client goes on about one write whose outcome it does not know.
INSISTENCE_SECONDS = 12.0

USER = "chaos"

_SEQ = "x-session-seq"


@dataclass
class Crowd:
    """What all clients share."""

    ports: Sequence[int]
    chance: random.Random
    record: Record
    until: float
    live: list[Session] = field(default_factory=list)
    retired: list[Session] = field(default_factory=list)
    doomed: list[Session] = field(default_factory=list)
    deleted: list[Session] = field(default_factory=list)
    #: Until then clients leave in the middle of their requests.
    rude_until: float = 0.0
    _number: int = 0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def number(self) -> int:
        self._number += 1
        return self._number


class Client:
    """Asks any instance, or always that at `home`."""

    def __init__(self, crowd: Crowd, *, home: int | None = None) -> None:
        self._crowd = crowd
        self._home = home
        self._chance = crowd.chance
        self._caller = Caller(crowd.ports, patience_seconds=PATIENCE_SECONDS)

    async def live(self) -> None:
        """Asks until the end; what is under way then is ended."""
        calls: list[tuple[float, Callable[[], object]]] = [
            (37, self._append),
            (2.5, self._turn),
            (42, self._look),
            (4, self._look_back),
            (4, self._count),
            (3, self._look_if_changed),
            (1, self._create),
            (4, self._doomed),
        ]
        weights, choices = [weight for weight, _ in calls], [call for _, call in calls]
        try:
            while not self._crowd.over:
                [call] = self._chance.choices(choices, weights)
                if not await call():
                    # Refused at once: nobody asks again in the same millisecond.
                    await asyncio.sleep(self._chance.uniform(0.01, 0.05))
        finally:
            self.close()

    def close(self) -> None:
        self._caller.close()

    # Sessions

    async def make(self, *, doomed: bool = False) -> Session | None:
        operation = self._begin("create")
        self._crowd.record.creates.append(operation)
        reply = await self._ask(operation, "POST", f"/api/chat/sessions?user_id={USER}")
        if reply is None or reply.status != 201:
            return None
        session = Session(UUID(reply.json()["session_id"]), operation.began, doomed=doomed)
        self._crowd.record.sessions[session.session_id] = session
        return session

    async def _create(self) -> bool:
        """One that stays empty is a session too."""
        if session := await self.make():
            self._crowd.retired.append(session)
        return session is not None

    async def _some(self) -> Session | None:
        """A live session; a new one in the place of one that is full."""
        live = self._crowd.live
        if not live:
            return None
        session = self._chance.choice(live)
        if session.issued < RETIRED_AT_MESSAGES:
            return session
        live.remove(session)
        self._crowd.retired.append(session)
        if new := await self.make():
            live.append(new)
        elif not self._crowd.over:
            # It may still be read; the next client to come by tries again.
            self._crowd.retired.remove(session)
            live.append(session)
            return None
        return new

    # Writes

    async def _append(self, session: Session | None = None) -> bool:
        session = session or await self._some()
        if session is None:
            return False
        key = f"append-{self._crowd.number()}"
        text = f"{key} của {session.session_id}"
        body = {"messages": [{"role": "user", "content": text}]}
        ids = (message_id(session.session_id, key, 0),)
        session.texts[ids[0]] = text
        return await self._write(session, "append", "history", body, key, ids)

    async def _turn(self) -> bool:
        session = await self._some()
        if session is None:
            return False
        key = f"turn-{self._crowd.number()}"
        text = f"{key}: how long do sessions live?"
        ids = (message_id(session.session_id, key, 0), message_id(session.session_id, key, 1))
        session.texts[ids[0]] = text
        return await self._write(session, "turn", "messages", {"message": text}, key, ids)

    async def _write(
        self,
        session: Session,
        kind: OperationKind,
        call: str,
        body: object,
        key: str,
        ids: tuple[UUID, ...],
    ) -> bool:
        """One write, asked for again under the same key, anywhere, until its outcome is known."""
        operation = self._begin(kind, session)
        operation.message_ids = ids
        session.issued += len(ids)
        path = f"/api/chat/sessions/{session.session_id}/{call}"
        give_up = operation.began + INSISTENCE_SECONDS
        while True:
            reply = await self._ask(operation, "POST", path, body, headers={"Idempotency-Key": key})
            if reply is not None and reply.status == 200:
                answer = reply.json()
                operation.first_seq = answer.get("first_seq")
                if answer["session_id"] != str(session.session_id):
                    session.wrong.append(f"wrong session: {answer['session_id']} was answered to {key}")
                if answer.get("user_message", key).partition(":")[0] != key:
                    session.wrong.append(f"wrong words: {answer['user_message']!r} was answered to {key}")
                self._told(session, reply)
                return True
            if reply is not None and reply.status == 500:
                session.wrong.append(f"unexpected answer: {key}: {_text(reply)}")
            if reply is not None and not _may_be_retried(reply):
                if not (reply.status == 404 and session.doomed):
                    session.wrong.append(f"refused write: {key}: {_text(reply)}")
                return False
            if operation.left or time.monotonic() > give_up or self._chance.random() < 0.05:
                return False
            await asyncio.sleep(self._chance.uniform(0.01, 0.2))

    # Reads

    async def _look(self, session: Session | None = None, instance: int | None = None) -> bool:
        session = session or await self._some()
        if session is None:
            return False
        return await self.history(session, instance)

    async def history(
        self, session: Session, instance: int | None = None, *, min_seq: int | None = None
    ) -> bool:
        operation = self._begin("history", session)
        more = f"&min_seq={min_seq}" if min_seq is not None else ""
        path = f"/api/chat/sessions/{session.session_id}/history?max_messages=1000{more}"
        reply = await self._ask(operation, "GET", path, instance=instance)
        if reply is None or not _answered(session, operation, reply, min_seq):
            return False
        if reply.status == 200:
            operation.message_ids = _messages(session, reply)
            operation.length = len(operation.message_ids)
            if not operation.labelled:
                self._told(session, reply)
        return True

    async def _look_back(self) -> bool:
        """At a session that nobody writes to any more, or with the word that the answer be new enough."""
        if self._crowd.retired and self._chance.random() < 0.5:
            return await self._look(self._chance.choice(self._crowd.retired[-20:]))
        session = await self._some()
        return session is not None and await self.history(session, min_seq=session.known_seq)

    async def _count(self) -> bool:
        session = await self._some()
        if session is None:
            return False
        operation = self._begin("count", session)
        min_seq = session.known_seq if self._chance.random() < 0.3 else None
        more = f"?min_seq={min_seq}" if min_seq is not None else ""
        reply = await self._ask(operation, "GET", f"/api/chat/sessions/{session.session_id}{more}")
        if reply is None or not _answered(session, operation, reply, min_seq):
            return False
        if reply.status == 200:
            answer = reply.json()
            operation.length = answer["total_messages"]
            if answer["session_id"] != str(session.session_id):
                session.wrong.append(f"wrong session: {answer['session_id']} was answered")
        return True

    async def _look_if_changed(self) -> bool:
        session = await self._some()
        if session is None:
            return False
        operation = self._begin("unchanged", session)
        path = f"/api/chat/sessions/{session.session_id}/history?max_messages=1000"
        tag = session.known_seq
        reply = await self._ask(operation, "GET", path, headers={"If-None-Match": f'"{tag}"'})
        if reply is None or not _answered(session, operation, reply, None):
            return False
        if reply.status == 304:
            operation.length = tag
        elif reply.status == 200:
            operation.kind = "history"
            operation.message_ids = _messages(session, reply)
            operation.length = len(operation.message_ids)
        return True

    # Deletes

    async def _doomed(self) -> bool:
        crowd = self._crowd
        if crowd.deleted and self._chance.random() < 0.3:
            session = self._chance.choice(crowd.deleted[-20:])
            if self._chance.random() < 0.2:
                await self._append(session)
                return True
            return await self.history(session)
        if len(crowd.doomed) < DOOMED_SESSIONS:
            if session := await self.make(doomed=True):
                crowd.doomed.append(session)
            return session is not None
        session = self._chance.choice(crowd.doomed)
        if self._chance.random() < 0.8 and session.issued < RETIRED_AT_MESSAGES:
            return await (self._append(session) if self._chance.random() < 0.5 else self.history(session))
        crowd.doomed.remove(session)
        crowd.deleted.append(session)
        return await self._delete(session)

    async def _delete(self, session: Session) -> bool:
        operation = self._begin("delete", session)
        while True:
            reply = await self._ask(operation, "DELETE", f"/api/chat/sessions/{session.session_id}")
            # A 404 after an attempt without an answer: that one did it.
            if reply is not None and (
                reply.status == 200 or (reply.status == 404 and operation.attempts > 1)
            ):
                operation.status = 200
                return True
            if reply is not None and not _may_be_retried(reply):
                session.wrong.append(f"refused delete: {_text(reply)}")
                return False
            if operation.left or time.monotonic() - operation.began > INSISTENCE_SECONDS:
                return False
            await asyncio.sleep(self._chance.uniform(0.01, 0.2))

    # The record

    def _begin(self, kind: OperationKind, session: Session | None = None) -> Operation:
        operation = Operation(kind, time.monotonic())
        if session is not None:
            session.operations.append(operation)
        return operation

    async def _ask(
        self,
        operation: Operation,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        instance: int | None = None,
    ) -> Reply | None:
        """One attempt at an operation; None where it had no answer."""
        crowd = self._crowd
        if instance is None:
            # A retry goes elsewhere: the more so where one is at home.
            roams = self._home is None or operation.attempts > 0
            instance = self._chance.randrange(len(crowd.ports)) if roams else self._home
        rude = time.monotonic() < crowd.rude_until and self._chance.random() < 0.3
        operation.instance = instance
        operation.attempts += 1
        try:
            reply = await self._caller.ask(
                instance,
                method,
                path,
                body,
                headers=headers,
                leave_after_seconds=self._chance.uniform(0.0005, 0.02) if rude else None,
            )
        except NoAnswer as exc:
            operation.ended = time.monotonic()
            operation.status = NO_ANSWER
            operation.said = str(exc)
            operation.left = rude
            return None
        operation.ended = time.monotonic()
        operation.status = reply.status
        operation.labelled = reply.labelled
        if reply.status >= 400:
            operation.said = _text(reply)
        return reply

    def _told(self, session: Session, reply: Reply) -> None:
        session.known_seq = max(session.known_seq, int(reply.headers.get(_SEQ, 0)))


def _may_be_retried(reply: Reply) -> bool:
    if reply.status == 409:  # an attempt before this one still runs, or goes on in its place
        return b'"turn_in_progress"' in reply.body or b'"turn_taken_over"' in reply.body
    return reply.status >= 500


def _answered(session: Session, operation: Operation, reply: Reply, min_seq: int | None) -> bool:
    """Notes an answer that nothing excuses; true where there is something to look at."""
    if reply.status in {200, 304}:
        return True
    if reply.status == 409 and min_seq is not None:
        session.wrong.append(f"stale: seq {min_seq} was known, and then not yet visible: {_text(reply)}")
    elif reply.status == 404 and not session.doomed:
        session.wrong.append(f"vanished: instance {operation.instance}: {_text(reply)}")
    elif reply.status not in {404, 503}:
        session.wrong.append(f"unexpected answer: {_text(reply)}")
    # A 404 of a session that is to be deleted is an answer like any other.
    return reply.status == 404


def _messages(session: Session, reply: Reply) -> tuple[UUID, ...]:
    """The ids that were read. What a list says of itself is checked when it is first seen."""
    answer = reply.json()
    if answer["session_id"] != str(session.session_id):
        session.wrong.append(f"wrong session: {answer['session_id']} was answered")
    messages = answer["messages"]
    texts = tuple(message["message_id"] for message in messages)
    known = session.lists.get(texts)
    if known is not None:
        return known
    ids = tuple(map(UUID, texts))
    session.lists[texts] = ids
    if [message["seq"] for message in messages] != list(range(1, len(messages) + 1)):
        session.wrong.append(f"torn: seqs {[message['seq'] for message in messages]}")
    if answer["total_messages"] != len(messages) or reply.headers.get(_SEQ) != str(len(messages)):
        session.wrong.append(
            f"torn: {len(messages)} messages of {answer['total_messages']}, seq {reply.headers.get(_SEQ)}"
        )
    for identity, message in zip(ids, messages, strict=True):
        if message["content"] != session.texts.get(identity, message["content"]):
            session.wrong.append(f"wrong words: message {identity} is {message['content']!r}")
    return ids


def _text(reply: Reply) -> str:
    return f"{reply.status} {reply.body[:300].decode(errors='replace')}"

"""`/`: talk to the assistant. The page shows what was said; a script sends what is said next by the API's own calls."""

import asyncio
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Query, Request, Response

from app.analytics.browse import first_questions
from app.api.requests import Served, only_user
from app.assistants import topics_of
from app.errors import Unavailable
from app.store import History, SessionPage
from app.web.forms import UserId
from app.web.frame import page_router, render
from app.web.languages import language_of
from app.web.sessions import Shown
from app.wiring import Runtime

router = page_router()

#: Who has not said who he is.
GUEST = "guest"

_MESSAGES_SHOWN = 50
_SESSIONS_SHOWN = 20
_TOPICS_SHOWN = 3
# Of a question: the line at the side shows some thirty of them.
_TITLE_CHARACTERS = 80

#: What the script says, by its name there.
_WORDS = ("thinking", "slow", "failed", "resend", "unreachable", "took", "sources")

Session = Annotated[UUID | None, Query()]


@dataclass(frozen=True, slots=True)
class Past:
    """The newest sessions of a user, and what was asked first in those that PostgreSQL has."""

    page: SessionPage
    titles: dict[UUID, str]


@router.get("/")
async def chat(request: Request, runtime: Served, user_id: UserId = "", session: Session = None) -> Response:
    """A session of a user, or the beginning of one. Raises `SessionNotFound` for one of somebody else."""
    language = language_of(request)
    whose = await only_user(runtime, user_id or None) or GUEST
    history, past = await asyncio.gather(_history(runtime, session, whose), _past(runtime, whose))
    return render(
        request,
        "chat.html",
        history=history,
        messages=[Shown.of(line) for line in history.lines] if history is not None else [],
        past=past,
        session=session,
        topics=topics_of(runtime.assistant)[:_TOPICS_SHOWN],
        user=whose,
        words={name: language.text(f"chat.script.{name}") for name in _WORDS}
        | {role: language.text(f"role.{role}") for role in ("user", "assistant")}
        | {"seconds": language.text("unit.seconds")},
    )


@router.get("/chat/past")
async def past_sessions(
    request: Request, runtime: Served, user_id: UserId = "", session: Session = None
) -> Response:
    """The list at the side, for the script: a session that was just begun is in it."""
    whose = await only_user(runtime, user_id or None) or GUEST
    return render(request, "chat_past.html", past=await _past(runtime, whose), session=session, user=whose)


async def _history(runtime: Runtime, session: UUID | None, user: str) -> History | None:
    if session is None:
        return None
    return await runtime.store.read_history(session, max_messages=_MESSAGES_SHOWN, user_id=user)


async def _past(runtime: Runtime, user: str) -> Past | None:
    """None: it can't be said now. A cached transcript is shown all the same."""
    try:
        page = await runtime.store.list_sessions(user, status="all", limit=_SESSIONS_SHOWN)
    except Unavailable:
        return None
    if runtime.database is None or runtime.mode == "redis-only":
        return Past(page, {})
    ids = [one.session_id for one in page.sessions]
    try:
        return Past(page, await first_questions(runtime.database, ids, characters=_TITLE_CHARACTERS))
    except Unavailable:
        return Past(page, {})

"""`/`: talk to the assistant. The page shows what was said; a script sends what is said next by the API's own calls."""

import asyncio
from dataclasses import dataclass
from uuid import UUID

from fastapi import Request, Response

from app.analytics.browse import first_questions
from app.api.requests import only_user
from app.assistants import topics_of
from app.errors import Unavailable
from app.store import History, SessionPage
from app.web.forms import UserId
from app.web.frame import render
from app.web.languages import language_of
from app.web.pieces import TITLE_CHARACTERS
from app.web.routing import Asked, Pages
from app.wiring import Runtime

pages = Pages()

#: Who has not said who he is.
GUEST = "guest"

_MESSAGES_SHOWN = 50
_SESSIONS_SHOWN = 20
_TOPICS_SHOWN = 3
#: What the script says, by its name there.
_WORDS = ("thinking", "slow", "failed", "resend", "unreachable", "took", "sources")


class ChatAsked(Asked):
    user_id: UserId = ""
    session: UUID | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """The newest sessions of a user, and what was asked first in those that PostgreSQL has."""

    page: SessionPage
    titles: dict[UUID, str]


@pages.get("/", ChatAsked)
async def chat(request: Request, runtime: Runtime, asked: ChatAsked) -> Response:
    """A session of a user, or the beginning of one. Raises `SessionNotFound` for one of somebody else."""
    language = language_of(request)
    session, whose = asked.session, await only_user(runtime, asked.user_id or None) or GUEST
    history, past = await asyncio.gather(history_of(runtime, session, whose), past_of(runtime, whose))
    return render(
        request,
        "chat.html",
        history=history,
        past=past,
        session=session,
        topics=topics_of(runtime.assistant)[:_TOPICS_SHOWN],
        user=whose,
        words={name: language.text(f"chat.script.{name}") for name in _WORDS}
        | {role: language.text(f"role.{role}") for role in ("user", "assistant")}
        | {"seconds": language.text("unit.seconds")},
    )


@pages.get("/chat/past", ChatAsked)
async def past_sessions(request: Request, runtime: Runtime, asked: ChatAsked) -> Response:
    """The list at the side, for the script: a session that was just begun is in it."""
    whose = await only_user(runtime, asked.user_id or None) or GUEST
    return render(
        request, "chat_past.html", past=await past_of(runtime, whose), session=asked.session, user=whose
    )


async def history_of(runtime: Runtime, session: UUID | None, user: str) -> History | None:
    if session is None:
        return None
    return await runtime.store.read_history(session, max_messages=_MESSAGES_SHOWN, user_id=user)


async def past_of(runtime: Runtime, user: str) -> Past | None:
    """None: it can't be said now. A cached transcript is shown all the same."""
    try:
        page = await runtime.store.list_sessions(user, status="all", limit=_SESSIONS_SHOWN)
    except Unavailable:
        return None
    if runtime.database is None or runtime.mode == "redis-only":
        return Past(page, {})
    ids = [one.session_id for one in page.sessions]
    try:
        return Past(page, await first_questions(runtime.database, ids, characters=TITLE_CHARACTERS))
    except Unavailable:
        return Past(page, {})

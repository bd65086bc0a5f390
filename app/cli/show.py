"""`chat-sessions show ID`: one session, and where it lives now."""

import asyncio
from typing import Annotated, Any
from uuid import UUID

import typer

from app.chat import ChatSession, Message, format_time, lines_of
from app.cli.output import Json, print_json, print_table, refusals_are_lines
from app.cli.targets import command_settings, patient
from app.coherence.ports import CacheOutage, Entry, GuideEntry
from app.errors import DurableStoreUnavailable, SessionNotFound, StartRefused, Unavailable
from app.postgres.store import PostgresChatSessionStore
from app.redis_sessions.inspect import find_session
from app.settings import Settings
from app.store import History
from app.wiring import open_database, open_redis

#: How it begins what is said of a store that did not answer.
_OUT = "out ("


def show(
    session_id: Annotated[UUID, typer.Argument(help="the session's id")],
    messages: Annotated[int, typer.Option(min=1, max=1000, help="how many of the newest messages")] = 20,
    json: Json = False,
) -> None:
    """Show a session: its owner, its newest messages, what each store holds of it. Changes nothing."""
    with refusals_are_lines():
        found = asyncio.run(_find(command_settings(), session_id, messages))
    if json:
        print_json(found)
        return
    facts = [(name, value) for name, value in found.items() if name != "messages"]
    print_table(["session", str(session_id)], facts)
    print_table(
        ["seq", "at", "role", "content"],
        [(one["seq"], one["timestamp"], one["role"], one["content"]) for one in found["messages"]],
    )


async def _find(settings: Settings, session_id: UUID, count: int) -> dict[str, Any]:
    if settings.database_url is None and settings.redis_url is None:
        raise StartRefused(
            "neither DATABASE_URL nor REDIS_URL is set, and no service with embedded servers runs "
            f"on DATA_DIR={settings.data_dir}",
            hint="set them as for `chat-sessions serve`",
        )
    in_postgres, history = await _in_postgres(settings, session_id, count)
    in_redis, entry = await _in_redis(settings, session_id)
    if history is not None:
        session, lines = history.session, history.lines
    elif entry is not None:
        session = entry.session
        page = entry.newest(min(count, session.message_count - entry.first_seq + 1), None)
        lines = lines_of(page[1]) if page else ()
    else:
        stores = f"PostgreSQL: {in_postgres}. Redis: {in_redis}."
        wrong = [
            name
            for name, found in (("DATABASE_URL", in_postgres), ("REDIS_URL", in_redis))
            if found.startswith(_OUT)
        ]
        if wrong:
            raise Unavailable(
                f"whether there is such a session can't be said. {stores}",
                hint=f"start what is out, or correct {' and '.join(wrong)}",
            )
        raise SessionNotFound(f"Session not found. {stores}")
    return {**_facts(session), "postgres": in_postgres, "redis": in_redis, "messages": _records(lines)}


async def _in_postgres(settings: Settings, session_id: UUID, count: int) -> tuple[str, History | None]:
    if settings.database_url is None:
        return "not asked, DATABASE_URL is not set", None
    async with open_database(settings) as database:
        store = PostgresChatSessionStore(database, ttl_seconds=settings.session_ttl_seconds)
        try:
            history = await store.read_history(session_id, max_messages=count)
        except SessionNotFound:
            return "no row", None
        except DurableStoreUnavailable as exc:
            return f"{_OUT}{exc})", None
    return f"{history.session.message_count} messages", history


async def _in_redis(settings: Settings, session_id: UUID) -> tuple[str, Entry | None]:
    if settings.redis_url is None:
        return "not asked, REDIS_URL is not set", None
    async with open_redis(patient(settings)) as bounded:
        try:
            found = await find_session(bounded, session_id)
        except CacheOutage as exc:
            return f"{_OUT}{exc})", None
    match found.value:
        case Entry() as entry:
            held = entry.session.message_count - entry.first_seq + 1
            whose = "" if entry.owner == "postgres" else ", owned by Redis"
            count = entry.session.message_count
            window = f"the newest {held} of {count} messages{whose}, {found.size_bytes} bytes"
            return f"{window}, expires in {found.ttl_seconds} s", entry
        case GuideEntry():
            return "an entry in the guide's format, not adopted", None
    return ("something that is no session of ours" if found.there else "nothing"), None


def _facts(session: ChatSession) -> dict[str, Any]:
    return {
        "session_id": str(session.session_id),
        "user_id": session.user_id,
        "created_at": format_time(session.created_at),
        "last_activity": format_time(session.last_activity),
        "total_messages": session.message_count,
    }


def _records(lines: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "seq": message.seq,
            "timestamp": format_time(message.created_at),
            "role": message.role,
            "content": message.content,
        }
        for message in map(Message.from_line, lines)
    ]

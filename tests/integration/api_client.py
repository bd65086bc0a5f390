"""The whole application with its lifespan on real stores: over ASGI, or behind a real socket."""

import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta

import httpx
import uvicorn
from redis.asyncio import Redis

from app.application import create_app
from app.chat import format_time, parse_time, utc_now
from app.postgres.engine import Database, create_engine
from app.settings import Settings
from tests.databases import empty
from tests.servers import Servers

MODES = ("hybrid", "redis-only", "postgres")

#: Where a mode keeps what it has acknowledged, as `X-Session-Source` says it.
TRUTH = {"hybrid": "postgres", "redis-only": "redis", "postgres": "postgres"}

SESSIONS = "/api/chat/sessions"
UNKNOWN = "01890000-0000-7000-8000-000000000000"


class Api(httpx.AsyncClient):
    """A client of an application in this process."""

    def __init__(self, app):
        # A failure inside the application is an answer here, as it is for a client behind a socket.
        super().__init__(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://chat.test"
        )
        self.app = app

    @property
    def runtime(self):
        return self.app.state.runtime

    @property
    def assistant(self):
        return self.runtime.assistant

    async def new_session(self, user_id="user123"):
        """The path of a session that was just made."""
        answer = await self.post(SESSIONS, params={"user_id": user_id})
        assert answer.status_code == 201, answer.text
        return f"{SESSIONS}/{answer.json()['session_id']}"

    async def record(self, session, *contents, headers=None):
        """Appends the contents as messages of the user."""
        messages = [{"role": "user", "content": content} for content in contents]
        answer = await self.post(f"{session}/history", json={"messages": messages}, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def contents(self, session):
        """What all messages of a session say."""
        answer = await self.get(f"{session}/history", params={"max_messages": 1000})
        assert answer.status_code == 200, answer.text
        return [message["content"] for message in answer.json()["messages"]]

    async def message_count(self, session):
        answer = await self.get(session)
        assert answer.status_code == 200, answer.text
        return answer.json()["total_messages"]


def for_mode(settings: Settings, mode: str) -> Settings:
    """Hybrid mode's settings, for a mode."""
    return settings.model_copy(
        update={
            "hybrid": {},
            "redis-only": {"database_url": None, "redis_only_mode": True},
            "postgres": {"redis_url": None, "enable_redis_sessions": False},
        }[mode]
    )


async def empty_stores(servers: Servers, database_url: str) -> Settings:
    """Hybrid mode's settings for a whole file of tests; both stores are empty.

    Cheaper than a store of each test's own: sessions do not meet, and a user may be one test's alone.
    """
    database = Database(create_engine(database_url, application_name="tests"))
    try:
        await empty(database)
    finally:
        await database.close()
    for number in (1, 2):
        async with Redis.from_url(servers.redis_url, db=number) as redis:
            await redis.flushdb()
    return Settings(_env_file=None, database_url=database_url, redis_url=servers.redis_url)


def app_for(settings: Settings, *, assistant: str = "echo", **overrides):
    """The application for these settings, with one of `tests/assistants_for_tests.py`."""
    return create_app(
        settings.model_copy(update={"assistant": f"tests.assistants_for_tests:{assistant}", **overrides})
    )


@asynccontextmanager
async def open_api(settings: Settings, *, assistant: str = "echo", **overrides) -> AsyncIterator[Api]:
    """A client of the application over ASGI; the lifespan lasts as long as the client."""
    app = app_for(settings, assistant=assistant, **overrides)
    async with app.router.lifespan_context(app), Api(app) as api:
        yield api


@contextmanager
def serving(settings: Settings, *, assistant: str = "echo") -> Iterator[int]:
    """The application behind a real socket, in a thread; gives the port."""
    config = uvicorn.Config(app_for(settings, assistant=assistant), log_config=None, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                assert time.monotonic() < deadline, "the server did not start in time"
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def assert_problem(answer, status, code):
    """The answer is a problem document (RFC 9457) with this status and code; returns it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), (
        answer.text
    )
    problem = answer.json()
    assert problem["code"] == code
    assert problem["status"] == status
    assert problem["type"] == f"urn:chat-sessions:problem:{code}"
    assert problem["title"]
    assert problem["detail"]
    return problem


def just_now(text):
    """True for a time as we write it, not older than a minute."""
    moment = parse_time(text)
    return format_time(moment) == text and abs(utc_now() - moment) < timedelta(minutes=1)

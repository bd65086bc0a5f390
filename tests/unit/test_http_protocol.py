"""A response leaves in one piece."""

import asyncio
import socket
from typing import Any, ClassVar

import pytest
import uvicorn

from app.cli.http_protocol import OneWriteProtocol

pytestmark = pytest.mark.anyio

BODIES = [b"first", b"second", b"third"]


async def application(scope: dict[str, Any], _receive: Any, send: Any) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]}
    )
    for body in BODIES:
        if scope["path"] == "/slow":
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class Watched(OneWriteProtocol):
    """Notes what is written to the socket's own transport."""

    pieces: ClassVar[list[bytes]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in its base
        super().connection_made(Noted(transport, self.pieces))  # type: ignore[arg-type]  # a transport in all but name


class Noted:
    def __init__(self, transport: asyncio.Transport, pieces: list[bytes]) -> None:
        self._transport = transport
        self._pieces = pieces

    def write(self, data: bytes) -> None:
        self._pieces.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def answers(requests: bytes) -> tuple[bytes, list[bytes]]:
    """All that comes back, and the pieces in which it was written."""
    Watched.pieces.clear()
    config = uvicorn.Config(application, http=Watched, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.Server(config).server_state
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)  # noqa: FBT003 - its only argument
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(
        lambda: Watched(config=config, server_state=state, app_state={}), sock=ours
    )
    await loop.sock_sendall(theirs, requests)
    received = b""
    while piece := await loop.sock_recv(theirs, 65536):
        received += piece
    theirs.close()
    return received, list(Watched.pieces)


async def test_head_and_body_are_written_together() -> None:
    received, pieces = await answers(b"GET /fast HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")

    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received.endswith(b"5\r\nfirst\r\n6\r\nsecond\r\n5\r\nthird\r\n0\r\n\r\n")
    assert pieces == [received]


async def test_what_comes_later_is_not_waited_for() -> None:
    received, pieces = await answers(b"GET /slow HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")

    assert received.endswith(b"5\r\nthird\r\n0\r\n\r\n")
    assert len(pieces) == 4
    assert b"".join(pieces) == received


async def test_answers_keep_the_order_of_their_requests() -> None:
    received, _ = await answers(
        b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\nGET /fast HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    )

    assert received.index(b"x-path: /slow") < received.index(b"third") < received.index(b"x-path: /fast")
    assert received.count(b"third") == 2

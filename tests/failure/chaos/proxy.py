"""The wire between one instance and one server, and what can go wrong on a wire.

| mode | what a client meets |
|---|---|
| ok | nothing |
| cut | its connections are reset, new ones are refused |
| hole | connections are accepted, everything on them is swallowed, both ways; they are reset at the end |
| slow | every piece comes late, in both directions, in order |
| reply_lost | requests arrive and are carried out; at the first piece of a reply the connection is reset |
| late | requests are held; they arrive after the client has given up, or when the mode ends |

No flow control: what a chat session sends fits in memory.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Literal, cast, get_args

Mode = Literal["ok", "cut", "hole", "slow", "reply_lost", "late"]
FAULTY: tuple[Mode, ...] = tuple(mode for mode in get_args(Mode) if mode != "ok")

LOOPBACK = "127.0.0.1"

#: How long a server may still answer a request whose client has gone.
_LAST_WORDS_SECONDS = 0.5


class Link:
    """Listens on a port of its own, 0 for any, and passes on to the port that `upstream` names at that moment."""

    def __init__(self, port: int, upstream: Callable[[], int]) -> None:
        self.port = port
        self.upstream = upstream
        self.mode: Mode = "ok"
        self.delay_seconds = 0.0
        self.pairs: set[_Client] = set()
        #: Whose client has gone, and whose request is still to arrive.
        self.leaving: set[_Client] = set()
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(lambda: _Client(self), LOOPBACK, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    def abandon(self) -> None:
        """Nothing goes on any more, not even what was on its way."""
        self.close()
        for pair in list(self.leaving):
            pair.reset()

    async def change(self, mode: Mode, *, delay_seconds: float = 0.05) -> None:
        """From now on; `delay_seconds` is how slow slow is, and how much later than its client late is."""
        self.mode, self.delay_seconds = mode, delay_seconds
        for pair in list(self.pairs):
            pair.mode_changed()
        if mode == "cut":
            self.close()
        else:
            await self.open()

    def repoint(self, upstream: Callable[[], int]) -> None:
        """A failover, as a client sees one: its connections end, new ones lead elsewhere."""
        self.upstream = upstream
        self.reset()

    def reset(self) -> None:
        for pair in list(self.pairs):
            pair.reset()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()


class _Lane:
    """One direction of one connection. What was delayed stays before what comes after it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at = 0.0

    def pass_on(self, data: bytes, write: Callable[[bytes], None]) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = max(self._free_at, now + self._link.delay_seconds if self._link.mode == "slow" else now)
        if due <= now:
            write(data)
        else:
            self._free_at = due
            loop.call_at(due, write, data)


class _Client(asyncio.Protocol):
    """The client's end of one connection; owns the server's end."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._up, self._down = _Lane(link), _Lane(link)
        self._transport: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._early: list[bytes] = []
        self._held: list[bytes] = []
        # A stream that lost bytes, or its end, can't be gone on with.
        self._torn = False

    # The client's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of a class of their own
        self._link.pairs.add(self)
        if self._link.mode == "hole":
            self._torn = True
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def data_received(self, data: bytes) -> None:
        if self._torn or self._link.mode == "hole":
            self._torn = True
        elif self._link.mode == "late" or self._held:
            self._held.append(data)
        else:
            self._up.pass_on(data, self._write_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.pairs.discard(self)
        self._link.leaving.add(self)
        if self._held and not self._torn:
            loop = asyncio.get_running_loop()
            loop.call_later(self._link.delay_seconds, self._deliver_and_leave)
        else:
            self._leave()

    # The server's side

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: _Server(self), LOOPBACK, self._link.upstream()
            )
        except OSError:
            self.reset()

    def server_made(self, transport: asyncio.Transport) -> None:
        self._server = transport
        early, self._early = self._early, []
        for data in early:
            self._write_up(data)
        if self._transport is None or self._transport.is_closing():
            self._leave_soon()

    def server_data(self, data: bytes) -> None:
        if self._torn or self._link.mode == "hole":
            self._torn = True
        elif self._link.mode == "reply_lost":
            self.reset()
        else:
            self._down.pass_on(data, self._write_down)

    def server_lost(self) -> None:
        self._server = None
        self._link.leaving.discard(self)
        if self._link.mode == "hole":
            self._torn = True  # not even the end gets through
        elif self._transport is not None:
            self._down.pass_on(b"", lambda _: self._transport.close() if self._transport else None)

    # Both

    def mode_changed(self) -> None:
        if self._torn:
            self.reset()
        elif self._link.mode != "late":
            self._deliver()

    def reset(self) -> None:
        """Ends both sides at once; the client gets an RST."""
        for transport in (self._transport, self._server):
            if transport is None or transport.is_closing():
                continue
            if (sock := transport.get_extra_info("socket")) is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        if self._connecting is not None:
            self._connecting.cancel()
        self._held.clear()

    def _write_up(self, data: bytes) -> None:
        if self._server is None:
            self._early.append(data)
        elif not self._server.is_closing():
            self._server.write(data)

    def _write_down(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _deliver(self) -> None:
        held, self._held = self._held, []
        for data in held:
            self._up.pass_on(data, self._write_up)

    def _deliver_and_leave(self) -> None:
        self._deliver()
        self._leave_soon()

    def _leave_soon(self) -> None:
        asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS, self._leave)

    def _leave(self) -> None:
        if self._server is not None and not self._server.is_closing():
            self._server.close()
        else:
            self._link.leaving.discard(self)


class _Server(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client.server_made(cast("asyncio.Transport", transport))

    def data_received(self, data: bytes) -> None:
        self._client.server_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.server_lost()

"""One process that serves: the whole service, or one of several workers.

A worker is started by `app.cli.workers` and by nobody else. It shares the listening socket, and has a channel to its
parent that carries JSON, one object a line:

    parent -> worker   {"settings": {...}, "embedded": false}   once: serve; until then it only gets ready
                       {"tell": true}                           say what you have counted
                       {"all": {"1": {...}, "2": null}}         what all have counted, as you asked
    worker -> parent   {"refused": "..."}, {"serving": true}    once, one of them
                       {"told": {...}}
                       {"ask": true}                            a scrape has come: what have all counted?

The channel's end is the end of the parent, however that came: the worker then ends as by a SIGTERM.
"""

import asyncio
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from app.cli.http_protocol import OneWriteProtocol
from app.errors import ChatError
from app.settings import Settings, read_settings

log = logging.getLogger("chat_sessions.worker")

#: After a SIGTERM, requests in flight have the assistant's deadline and this long to finish.
_GRACE_SECONDS = 10

#: What it may take to close the stores after that.
_CLOSING_SECONDS = 5

#: Between two connections: what a process takes to wake up. Of 32 callers at once two workers get 16 each then, and
#: without it often 30 and 2. A worker takes up to a thousand new connections a second, as many as it can answer.
_OTHERS_SECONDS = 0.001

#: After a file table that was full, for example.
_ACCEPT_AGAIN_SECONDS = 1.0

#: Of a message on the channel; an OPENAI_SYSTEM_PROMPT may be long.
MESSAGE_BYTES_MAX = 2**24

#: The parent waits one second for each worker, for all of them at once.
_ASK_SECONDS_MAX = 2.0


def grace_seconds(settings: Settings) -> int:
    """How long requests in flight may go on after a SIGTERM."""
    return int(settings.assistant_timeout_seconds) + _GRACE_SECONDS


def end_seconds(settings: Settings) -> int:
    """How long after a SIGTERM a process may live at all."""
    return grace_seconds(settings) + _CLOSING_SECONDS


def set_up_log(settings: Settings, worker: int | None = None) -> None:
    who = "" if worker is None else f"worker-{worker} "
    logging.basicConfig(
        level=settings.log_level.upper(), format=f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s"
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop  # noqa: PLC0415 - there is none on Windows

    return uvloop.new_event_loop


async def serve_here(
    settings: Settings,
    listener: socket.socket,
    *,
    embedded: bool,
    on_start: Callable[[], None],
    parent: "Parent | None" = None,
) -> None:
    """Serves until a SIGTERM or SIGINT. Raises `StartRefused` before it accepts anything."""
    from app.api.metrics import own_metrics, share_metrics  # noqa: PLC0415 - 0.4 s that a parent of workers need not pay
    from app.application import create_app  # noqa: PLC0415 - see above

    app = create_app(settings, embedded=embedded)
    config = uvicorn.Config(
        app,
        http=OneWriteProtocol,
        log_config=None,
        access_log=False,
        # Nothing here asks who the client is, or by which scheme he came.
        proxy_headers=False,
        ws="none",
        # The lifespan runs here, not in uvicorn: a start that is refused is one line then.
        lifespan="off",
        timeout_graceful_shutdown=grace_seconds(settings),
    )
    with ended_by_sigterm():
        async with app.router.lifespan_context(app):
            if parent is not None:
                await parent.connect(tell=lambda: own_metrics(app))
                share_metrics(app, parent.ask)
            kind = _Server if parent is None else _SharingServer
            await kind(config, on_start=on_start).serve(sockets=[listener])


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM cancels what the task of this block waits for, and the block is left without an error.

    An exception that a handler raises would come up in any callback of the loop, which logs it as the error of a connection.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in one
    told = False

    def cancel(_number: int, _frame: object) -> None:
        nonlocal told
        told = True
        loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not told:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Says that it listens once it does; ends by returning, so that everything is closed in order."""

    def __init__(self, config: uvicorn.Config, *, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now stays. A full collection that looks at all of it stops the loop for 60 ms, every ten seconds.
        gc.collect()
        gc.freeze()
        self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, which would break off the closing of the stores.
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _SharingServer(_Server):
    """Takes a connection off the socket that the workers share, then leaves a moment to the others. Else whoever
    wakes first takes most callers of a burst, and serves them for as long as they stay connected.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        [self._listener] = sockets or []
        self._listener.setblocking(False)  # noqa: FBT003 - it has no name
        self._connecting: set[asyncio.Task[Any]] = set()
        self._again: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        await super().startup([])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._again is not None:
            self._again.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        await super().shutdown(sockets)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another worker was faster, or the caller has gone
        except OSError as exc:
            log.error("no connection can be accepted, will try again: %s", exc)  # noqa: TRY400 - it says all
            self._rest(_ACCEPT_AGAIN_SECONDS)
            return
        self._rest(_OTHERS_SECONDS)
        connection.setblocking(False)  # noqa: FBT003 - it has no name
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connecting = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    def _rest(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._again = loop.call_later(seconds, loop.add_reader, self._listener, self._accept)

    def _protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def work(number: int, listener_fd: int, channel_fd: int) -> None:
    """A worker's process, from its first line to its last."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(0))
    # While the first one settles the mode, the others get ready.
    import app.application  # noqa: F401, PLC0415 - as in `serve_here`

    for fd in (listener_fd, channel_fd):
        # Else a process that an assistant starts would hold the port.
        os.set_inheritable(fd, False)  # noqa: FBT003 - it has no name
    parent = Parent(number, socket.socket(fileno=channel_fd))
    start = parent.first_message()
    settings = read_settings(_env_file=None, **start["settings"])
    set_up_log(settings, number)
    # Also while the event loop is held up, and before there is one.
    watch = threading.Thread(target=_end_with_parent, args=(channel_fd, end_seconds(settings)), daemon=True)
    watch.start()
    with socket.socket(fileno=listener_fd) as listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            runner.run(
                serve_here(
                    settings, listener, embedded=start["embedded"], on_start=parent.serving, parent=parent
                )
            )
        except ChatError as exc:
            parent.refused(exc)
            sys.exit(1)


def _end_with_parent(channel_fd: int, seconds: int) -> None:
    poll = select.poll()
    poll.register(channel_fd, 0)  # no event but the end of the other side
    while not any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll()):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    os._exit(1)


def encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Until the other side has ended, if need be in the middle of a message."""
    with suppress(ConnectionError):
        async for line in reader:
            if line.endswith(b"\n"):
                yield json.loads(line)


class Parent:
    """The worker's end of the channel."""

    def __init__(self, number: int, channel: socket.socket) -> None:
        self._number = number
        self._channel = channel
        self._all: asyncio.Future[Mapping[str, Any]] | None = None

    def first_message(self) -> dict[str, Any]:
        """Waits for it. Nothing follows it before this worker says that it serves."""
        with self._channel.makefile("rb") as lines:
            line = lines.readline()
        if not line:
            sys.exit(0)
        message: dict[str, Any] = json.loads(line)
        return message

    def refused(self, exc: ChatError) -> None:
        self._channel.settimeout(None)  # the loop has left it otherwise
        self._channel.sendall(encoded({"refused": str(exc)}))

    async def connect(self, *, tell: Callable[[], Mapping[str, Any]]) -> None:
        """`tell` gives what this worker has counted."""
        reader, self._writer = await asyncio.open_unix_connection(
            sock=self._channel.dup(), limit=MESSAGE_BYTES_MAX
        )
        self._tell = tell
        self._listening = asyncio.create_task(self._listen(reader))

    def serving(self) -> None:
        self._send({"serving": True})

    async def ask(self) -> Mapping[str, Mapping[str, Any] | None]:
        """What all workers have counted; this one alone where the parent does not answer."""
        if self._all is None or self._all.done():
            self._all = asyncio.get_running_loop().create_future()
            self._send({"ask": True})
        try:
            async with asyncio.timeout(_ASK_SECONDS_MAX):
                return await asyncio.shield(self._all)
        except TimeoutError:
            return {str(self._number): self._tell()}

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        async for message in messages(reader):
            if "tell" in message:
                self._send({"told": self._tell()})
            elif self._all is not None and not self._all.done():
                self._all.set_result(message["all"])

    def _send(self, message: Mapping[str, Any]) -> None:
        self._writer.write(encoded(message))

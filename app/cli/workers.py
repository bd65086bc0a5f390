"""Several processes behind one port: started, started again when they end, and ended together.

Guaranteed:
- The first worker settles the mode, begins the epoch and makes partitions, as a service of one process does. The others
  serve once it does; they, and whoever replaces a worker, take the mode as they find it. So nobody is refused because
  of its own siblings.
- Until all have served once, one that ends or is refused ends the start, with one line for all. From then on a worker
  that ends is replaced: at once, or after a pause that grows while it does not last.
- A SIGTERM or SIGINT closes the port and ends all as a service of one process ends. A second one, or the end of their
  time, kills them.
- However the parent ends, its workers do (`app.cli.worker`).

The parent answers no request, and opens no connection to a store. Nothing is forked: a worker is a new interpreter.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from app.cli.worker import MESSAGE_BYTES_MAX, encoded, end_seconds, messages
from app.errors import StartRefused
from app.settings import Settings
from app.tasks import all_of, stop

log = logging.getLogger("chat_sessions.workers")

#: A worker that has lasted this long is replaced at once; one that has not, after a pause.
_LASTING_SECONDS = 10.0

_PAUSE_SECONDS = 0.5
_PAUSE_SECONDS_MAX = 30.0

#: One that hangs must not take the others' metrics with it.
_TELL_SECONDS_MAX = 1.0


async def serve_with_workers(
    settings: Settings, listener: socket.socket, *, embedded: bool, on_start: Callable[[], None]
) -> None:
    """Serves until a SIGTERM or SIGINT. Raises `StartRefused` where the workers do; none is left then."""
    workers = _Workers(settings, listener, embedded=embedded)
    ending, hurry = asyncio.Event(), asyncio.Event()

    def note() -> None:
        (hurry if ending.is_set() else ending).set()

    with _signals(note):
        serving = asyncio.create_task(workers.serve(on_start))
        asked = asyncio.create_task(ending.wait())
        try:
            await asyncio.wait([serving, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.set()
            # Else the kernel takes calls that nobody will answer.
            listener.close()
            await stop(serving, asked)
            await workers.end(hurry)
    if not serving.cancelled():
        serving.result()


def next_pause(pause: float, *, lasted_seconds: float) -> float:
    """How long to wait before a worker is replaced; `pause` is how long it was before the one that has ended."""
    if lasted_seconds >= _LASTING_SECONDS:
        return 0.0
    return min(max(_PAUSE_SECONDS, 2 * pause), _PAUSE_SECONDS_MAX)


@contextmanager
def _signals(handle: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = {
        number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(handle))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Workers:
    """All of them, by number; each number has one process after the other."""

    def __init__(self, settings: Settings, listener: socket.socket, *, embedded: bool) -> None:
        self._settings = settings
        self._listener = listener
        self._embedded = embedded
        self._processes: dict[int, _Process] = {}

    async def serve(self, on_start: Callable[[], None]) -> None:
        """Ends only with a start that is refused."""
        numbers = range(1, self._settings.workers + 1)
        await all_of([self._spawn(number) for number in numbers])
        await self._begin(1, self._settings)
        await all_of([self._begin(number, self._as_found) for number in numbers[1:]])
        on_start()
        await all_of([self._keep(number) for number in numbers])

    async def end(self, hurry: asyncio.Event) -> None:
        """As a SIGTERM ends a process. Kills them when `hurry` is set, and when their time is up."""
        processes = list(self._processes.values())
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ended = asyncio.create_task(all_of([process.ended() for process in processes]))
        hurried = asyncio.create_task(hurry.wait())
        limit = end_seconds(self._settings)
        await asyncio.wait([ended, hurried], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            log.warning("workers are killed: %s", "a second signal" if hurry.is_set() else "their time is up")
            for process in processes:
                process.send_signal(signal.SIGKILL)
        await ended
        await stop(hurried)

    @property
    def _as_found(self) -> Settings:
        """For whoever does not settle the mode: where there is a database, the mode that it is in."""
        if self._settings.database_url is None:
            return self._settings
        return self._settings.model_copy(update={"redis_only_mode": None})

    async def _spawn(self, number: int) -> None:
        self._processes[number] = await _Process.spawn(number, self._listener, self._tell_all)

    async def _begin(self, number: int, settings: Settings) -> None:
        process = self._processes[number]
        await process.begin(settings, embedded=self._embedded)
        log.info("worker %d serves as process %d", number, process.pid)

    async def _keep(self, number: int) -> None:
        pause = 0.0
        while True:
            process = self._processes[number]
            how = await process.ended()
            pause = next_pause(pause, lasted_seconds=process.seconds)
            log.error(
                "worker %d (process %d) ended: %s; another is started in %.1f s",
                *(number, process.pid, how, pause),
            )
            await asyncio.sleep(pause)
            await self._spawn(number)
            with suppress(StartRefused):  # the next turn says so
                await self._begin(number, self._as_found)

    async def _tell_all(self) -> dict[int, Any]:
        told = await all_of([process.tell() for process in self._processes.values()])
        return dict(zip(self._processes, told, strict=True))


class _Process:
    """A worker's process, with the parent's end of its channel."""

    @classmethod
    async def spawn(
        cls, number: int, listener: socket.socket, tell_all: Callable[[], Awaitable[Mapping[int, Any]]]
    ) -> Self:
        """It gets ready, and waits for `begin`."""
        here, there = socket.socketpair()
        with there:
            # Not `-m`: that looks into the working folder first, where another `app` may lie.
            code = "import sys; sys.path[:] = {!r}; from app.cli.worker import work; work({}, {}, {})"
            fds = listener.fileno(), there.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code.format(sys.path, number, *fds)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # a Ctrl-C is for the parent, which then ends them in order
            )
        reader, writer = await asyncio.open_unix_connection(sock=here, limit=MESSAGE_BYTES_MAX)
        return cls(process, reader, writer, tell_all)

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tell_all: Callable[[], Awaitable[Mapping[int, Any]]],
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._writer = writer
        self._tell_all = tell_all
        self._began_at = asyncio.get_running_loop().time()
        self._serves = asyncio.Event()
        self._refusal: str | None = None
        self._told: asyncio.Future[Any] | None = None
        self._listening = asyncio.create_task(self._listen(reader))

    @property
    def seconds(self) -> float:
        """For how long it has been there."""
        return asyncio.get_running_loop().time() - self._began_at

    async def begin(self, settings: Settings, *, embedded: bool) -> None:
        """Lets it serve, and returns when it does. Raises `StartRefused` where it ends before."""
        self._send({"settings": settings.model_dump(mode="json"), "embedded": embedded})
        serves, ended = asyncio.create_task(self._serves.wait()), asyncio.create_task(self.ended())
        try:
            await asyncio.wait([serves, ended], return_when=asyncio.FIRST_COMPLETED)
            if not serves.done():
                raise StartRefused(self._refusal or f"a worker ended before it served: {ended.result()}")
        finally:
            await stop(serves, ended)

    async def ended(self) -> str:
        """Waits for its end, and says how that came."""
        code = await self._process.wait()
        await asyncio.wait([self._listening], timeout=_TELL_SECONDS_MAX)  # what it said last
        self._writer.close()
        return self._refusal or (signal.Signals(-code).name if code < 0 else f"status {code}")

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def tell(self) -> Any:
        """What it has counted; None: it does not answer, or does not serve."""
        if not self._serves.is_set() or self._process.returncode is not None:
            return None
        if self._told is None or self._told.done():
            self._told = asyncio.get_running_loop().create_future()
            self._send({"tell": True})
        await asyncio.wait([self._told], timeout=_TELL_SECONDS_MAX)
        return self._told.result() if self._told.done() else None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        answers = set()
        async for message in messages(reader):
            match message:
                case {"serving": True}:
                    self._serves.set()
                case {"refused": str(refusal)}:
                    self._refusal = refusal
                case {"told": told} if self._told is not None and not self._told.done():
                    self._told.set_result(told)
                case {"ask": True}:
                    # Not awaited here: this one is asked too, and answers by the next message.
                    answers.add(answer := asyncio.create_task(self._answer()))
                    answer.add_done_callback(answers.discard)

    async def _answer(self) -> None:
        self._send({"all": await self._tell_all()})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._writer.write(encoded(message))

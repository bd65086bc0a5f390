"""The load generator: a process of its own that keeps connections busy with requests that are bytes already.

Of an answer it reads the status and the Content-Length, nothing else. That it is not the limit is for each run to
show, with a raw ASGI app as the control.

Closed loop (no rate): each connection sends its next request when the last one is answered; a latency is a service
time. Open loop (a rate): requests are due at fixed times, whatever the server does, and latency counts from
then, with the wait for a connection in it, so a stall is everybody's whom it would have hit (wrk2).

It reads orders as lines of JSON and answers each with one: `Order` and `Result` are the two. Used by `over_http`.
"""

import asyncio
import json
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True, kw_only=True)
class Order:
    """`requests` are whole requests; each connection has those of its own index, and goes through them in turn."""

    port: int
    requests: list[str]
    connections: int
    seconds: float
    rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """`failed` are answers other than 2xx. Latencies in milliseconds, by percentile."""

    per_second: float
    failed: int
    percentiles: dict[str, float]


class Connection(asyncio.Protocol):
    def __init__(self, run: "Run", requests: list[bytes]) -> None:
        self._run = run
        self._requests = cycle(requests)
        self._received = b""
        self._missing = 0
        self._began = 0.0
        self._failed = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.over:
            self._run.broken(exc or ConnectionError("the server closed a connection"))

    def ask(self, due: float) -> None:
        self._began = due
        self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._received += data
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._received, 0, end)
            assert length is not None, self._received[:200]
            self._failed = self._received[9:10] != b"2"
            self._missing = end + 4 + int(length[1]) - len(self._received)
            self._received = b""
        if self._missing == 0:
            self._run.answered(self, self._began, failed=self._failed)


class Run:
    """One order, from its first request to its last answer."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._latencies: list[float] = []
        self._failed = 0
        self._free: deque[Connection] = deque()
        self._due: deque[float] = deque()
        self._busy = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends = 0.0
        self.over = False

    async def result(self) -> Result:
        loop = asyncio.get_running_loop()
        requests = [request.encode() for request in self._order.requests]
        connections = []
        for index in range(self._order.connections):
            own = requests[index :: self._order.connections] or requests
            _, connection = await loop.create_connection(
                partial(Connection, self, own), "127.0.0.1", self._order.port
            )
            connections.append(connection)
        began = time.perf_counter()
        self._ends = began + self._order.seconds
        try:
            await (self._closed(connections) if self._order.rate is None else self._open(connections))
            took = time.perf_counter() - began
        finally:
            self.over = True
            for connection in connections:
                connection.transport.close()
        latencies = sorted(self._latencies)
        return Result(
            per_second=len(latencies) / took,
            failed=self._failed,
            percentiles={
                f"p{percent:g}": latencies[min(len(latencies) - 1, int(len(latencies) * percent / 100))] * 1e3
                for percent in _PERCENTILES
            },
        )

    async def _closed(self, connections: list[Connection]) -> None:
        self._busy = len(connections)
        for connection in connections:
            connection.ask(time.perf_counter())
        await self._done

    async def _open(self, connections: list[Connection]) -> None:
        self._free.extend(connections)
        assert self._order.rate is not None
        gap = 1 / self._order.rate
        due = time.perf_counter()
        while due < self._ends:
            now = time.perf_counter()
            while due <= now:
                self._due.append(due)
                due += gap
            self._send_due()
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        while self._due or self._busy:
            await asyncio.sleep(0.001)
            if self._done.done():
                await self._done

    def _send_due(self) -> None:
        while self._due and self._free:
            self._busy += 1
            self._free.popleft().ask(self._due.popleft())

    def answered(self, connection: Connection, began: float, *, failed: bool) -> None:
        now = time.perf_counter()
        self._latencies.append(now - began)
        self._failed += failed
        if self._order.rate is not None:
            self._busy -= 1
            self._free.append(connection)
            self._send_due()
        elif now < self._ends:
            connection.ask(now)
        else:
            self._busy -= 1
            if not self._busy and not self._done.done():
                self._done.set_result(None)

    def broken(self, exc: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(exc)


async def _carried_out(order: Order) -> Result:
    return await Run(order).result()


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            result = runner.run(_carried_out(Order(**json.loads(line))))
            sys.stdout.write(f"{json.dumps(asdict(result))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Over HTTP, one worker: what is left of a route that stores nothing, and how steady it is."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from harness import MESSAGES_BEFORE, QUESTION, TURN, Measure, Pace, Rate, Ratio, Scenario, together
from http_load import Order, Result
from processes import Generator, Served, compared_app, service

from app.embedded import EmbeddedServers

CONNECTIONS = 64
SESSIONS = 256
MESSAGES = 10

#: A step of the open loop: as in wrk2, the rate is known before.
OF_THE_TOP_LOAD = 0.5

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class OverHttp:
    """Our service with its sessions, the apps beside it, and what drives them."""

    generator: Generator
    ours: Served
    fastapi: Served
    raw: Served
    sessions: list[str]
    answer_bytes: int

    def reads(self) -> list[str]:
        return [
            _request("GET", f"/api/chat/sessions/{session}/history?max_messages={MESSAGES}")
            for session in self.sessions
        ]

    def appends(self, prefix: str = "/api/chat") -> list[str]:
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]})
        return [_request("POST", f"{prefix}/sessions/{session}/history", body) for session in self.sessions]

    async def load(
        self, served: Served, requests: list[str], seconds: float, rate: float | None = None
    ) -> Result:
        order = Order(
            port=served.port, requests=requests, connections=CONNECTIONS, seconds=seconds, rate=rate
        )
        return await self.generator.carry_out(order)

    def rate(self, served: Served, requests: list[str]) -> Rate:
        async def per_second(seconds: float) -> float:
            return (await self.load(served, requests, seconds)).per_second

        return per_second


def _request(method: str, path: str, body: str = "") -> str:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
    return f"{head}\r\n{body}"


@asynccontextmanager
async def opened(servers: EmbeddedServers, folder: Path) -> AsyncIterator[OverHttp]:
    """All of it, with sessions that were written by the same calls."""
    with ExitStack() as stack:
        ours = stack.enter_context(service(servers, folder))
        sessions, answer = await _filled(ours)
        fastapi = stack.enter_context(compared_app("fastapi", answer, folder))
        raw = stack.enter_context(compared_app("raw", answer, folder))
        generator = await Generator.started()
        try:
            yield OverHttp(
                generator=generator,
                ours=ours,
                fastapi=fastapi,
                raw=raw,
                sessions=sessions,
                answer_bytes=len(answer),
            )
        finally:
            await generator.stop()


async def _filled(ours: Served) -> tuple[list[str], bytes]:
    """Sessions, and the history of one."""
    messages = [{"role": role, "content": content} for role, content in TURN] * (MESSAGES_BEFORE // len(TURN))
    sessions = []
    async with httpx.AsyncClient(base_url=f"{ours.url}/api/chat", trust_env=False) as client:
        for index in range(SESSIONS):
            made = await client.post("/sessions", params={"user_id": f"user{index}"})
            sessions.append(made.raise_for_status().json()["session_id"])
            written = await client.post(f"/sessions/{sessions[-1]}/history", json={"messages": messages})
            written.raise_for_status()
        history = await client.get(f"/sessions/{sessions[0]}/history", params={"max_messages": MESSAGES})
    return sessions, history.raise_for_status().content


async def http_reads(over: OverHttp, pace: Pace) -> Scenario:
    """Hypothesis: a cached history answers past FastAPI's routing, and its read of Redis, shared with those of the
    same moment, costs less than that routing. So a route of FastAPI's that has nothing to look up is slower.
    Expected: 1.1 times.

    Control: a raw ASGI app with the same bytes, to show that the load generator is not the limit.
    """
    constant = [_request("GET", "/constant")]
    cases = {
        "cached history": over.rate(over.ours, over.reads()),
        "FastAPI constant": over.rate(over.fastapi, constant),
        "raw ASGI constant": over.rate(over.raw, constant),
    }
    scenario = Scenario(
        name=f"HTTP cached history, {CONNECTIONS} connections",
        hypothesis=http_reads.__doc__ or "",
        unit=f"requests a second ({over.answer_bytes:,} bytes)",
        ratios=[
            Ratio(
                name="ours / FastAPI constant",
                over="cached history",
                under="FastAPI constant",
                at_least=1.1,
            ),
            Ratio(name="control: raw ASGI / ours", over="raw ASGI constant", under="cached history"),
        ],
    )
    return await together(scenario, cases, pace)


async def http_appends(over: OverHttp, pace: Pace) -> Scenario:
    """Hypothesis: a durable append, of which a batch commits dozens at once, costs about half as much again as what
    FastAPI needs to parse its body and to store nothing. Expected: at least 0.65 times as many.

    Control: the raw ASGI app, which reads the same body.
    """
    cases = {
        "durable append": over.rate(over.ours, over.appends()),
        "FastAPI, parsed, nothing stored": over.rate(over.fastapi, over.appends("")),
        "raw ASGI, nothing parsed": over.rate(over.raw, over.appends("")),
    }
    scenario = Scenario(
        name=f"HTTP durable append, {CONNECTIONS} connections",
        hypothesis=http_appends.__doc__ or "",
        unit="requests a second",
        ratios=[
            Ratio(
                name="ours / FastAPI, nothing stored",
                over="durable append",
                under="FastAPI, parsed, nothing stored",
                at_least=0.65,
            ),
            Ratio(name="control: raw ASGI / ours", over="raw ASGI, nothing parsed", under="durable append"),
        ],
    )
    return await together(scenario, cases, pace)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """An open loop's latencies in milliseconds, by percentile. A control has no goal."""

    name: str
    rate: float
    seconds: float
    percentiles: dict[str, float]
    is_control: bool = False

    def measures(self) -> list[Measure]:
        shown = [
            Measure(name=f"{self.name}: {percent}", got=self.percentiles[percent], unit="ms")
            for percent in ("p50", "p99", "p99.9")
        ]
        if self.is_control:
            return shown
        tail = Measure(
            name=f"{self.name}: p99 / p50", got=self.percentiles["p99"] / self.percentiles["p50"], at_most=6
        )
        return [*shown, tail]


async def latencies(over: OverHttp, seconds: float) -> list[Latency]:
    """Hypothesis: at half of what it can do at most, a worker answers steadily: batches are short, and what stops it
    (the garbage collector, a checkpoint, the heartbeat) is a few milliseconds. Expected: p99 at most 6 times p50,
    counted from when a request was due.

    Control: a FastAPI route that answers the history's bytes as a constant, at the rate of the histories. It asks no
    store: what it shows is how long the machine keeps a process that is ready from running.
    """
    found = []
    for name, requests in (("cached history", over.reads()), ("durable append", over.appends())):
        top = (await over.load(over.ours, requests, 2)).per_second
        rate = top * OF_THE_TOP_LOAD
        found.append(await _open_loop(over, over.ours, name, requests, rate, seconds))
        if name == "cached history":
            constant = [_request("GET", "/constant")]
            control = await _open_loop(
                over, over.fastapi, "control: FastAPI constant", constant, rate, seconds
            )
            found.append(replace(control, is_control=True))
    return found


async def _open_loop(
    over: OverHttp, served: Served, name: str, requests: list[str], rate: float, seconds: float
) -> Latency:
    result = await over.load(served, requests, seconds, rate)
    return Latency(
        name=f"open loop, {name} at {rate:,.0f}/s", rate=rate, seconds=seconds, percentiles=result.percentiles
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A worker's resident memory, by seconds of full load."""

    mib: list[tuple[float, float]]

    def measures(self) -> list[Measure]:
        name = f"worker under full load, {self.mib[-1][0] / 60:.1f} minutes"
        measures = [
            Measure(name=f"{name}: resident", got=max(mib for _, mib in self.mib), unit="MiB", at_most=160)
        ]
        later = [mib for second, mib in self.mib if second >= _WARM_SECONDS]
        if len(later) > 1:
            growth = later[-1] / later[0]
            measures.append(Measure(name=f"{name}: end / after a minute", got=growth, at_most=_FLAT))
        return measures


#: What is not filled by then is a leak; and what still counts as flat, for the allocator has its own moods.
_WARM_SECONDS = 60
_FLAT = 1.03


async def memory(over: OverHttp, minutes: float) -> Memory:
    """Hypothesis: what a worker keeps is bounded: pools, batches and what waits for them, statements, lease. So its
    memory is flat after the first minute of full load. Expected: at most 1.03 of it in the end, and 160 MiB.

    Half of the connections' requests append, the others read.
    """
    mixed = [request for pair in zip(over.appends(), over.reads(), strict=True) for request in pair]
    samples: list[tuple[float, float]] = []
    began = time.monotonic()

    async def watch() -> None:
        while True:
            samples.append((time.monotonic() - began, resident_mib(over.ours.pid)))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await over.load(over.ours, mixed, minutes * 60)
    watching.cancel()
    return Memory(mib=samples)


def resident_mib(pid: int) -> float:
    """From /proc: this is for Linux."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / MIB
    raise RuntimeError(f"process {pid} has no resident memory")

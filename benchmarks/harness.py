"""What every scenario is made of: loads, rounds, ratios within a round, and the measures that they end in.

Cases that are compared take turns on the same servers: call by call with one caller, A-B-C and then C-B-A with
many. A ratio is taken within a round, and a measure is the median over the rounds. What a baseline's ratio to
itself ("again") strays from 1 is what the machine's noise is worth.
"""

import asyncio
import gc
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Generic, TypeVar
from uuid import UUID

from app.chat import NewMessage, new_uuid, utc_now
from app.store import Append, ChatSessionStore

QUESTION = ("Điều kiện tham gia đấu thầu? " * 5)[:120]
ANSWER = ("Theo Điều 5 của Luật Đấu thầu 2023, nhà thầu phải đáp ứng các điều kiện. " * 6)[:400]
TURN = (("user", QUESTION), ("assistant", ANSWER))
MESSAGES_BEFORE = 20
CALLERS = 32

#: How many sessions are filled at the same time.
_FILLERS = 8

#: The cache may be off just after a start, or for a moment on a busy machine: a lease, and then some.
_CACHED_SECONDS_MAX = 30
_POLL_SECONDS = 0.05

_Session = TypeVar("_Session")

Call = Callable[[], Awaitable[object]]
#: Works for some seconds and says how many a second it did.
Rate = Callable[[float], Awaitable[float]]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long it takes: seconds of a case in a round of many callers, rounds, and calls in a round of one caller."""

    seconds: float
    rounds: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the table. `low` and `high` are the worst and the best of the rounds."""

    name: str
    got: float
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        return (self.at_least is None or self.got >= self.at_least) and (
            self.at_most is None or self.got <= self.at_most
        )

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g} {self.unit}"
        return f"<= {self.at_most:g} {self.unit}" if self.at_most is not None else ""

    def row(self) -> tuple[str, str, str]:
        spread = ""
        if self.low is not None and self.high is not None:
            spread = f" ({number(self.low)} to {number(self.high)})"
        missed = "" if self.met else "  MISSED"
        return self.name, f"{number(self.got)} {self.unit}{spread}", f"{self.goal}{missed}"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A number that is reported: what `over` is of `under`, and its goal, if it has one."""

    name: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(kw_only=True)
class Scenario:
    """Rounds of one number a case, and the ratios between them. `hypothesis` is its function's docstring."""

    name: str
    hypothesis: str
    unit: str
    ratios: Sequence[Ratio]
    rounds: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, one_round: dict[str, float]) -> None:
        for case, value in one_round.items():
            self.rounds.setdefault(case, []).append(value)

    def measures(self) -> list[Measure]:
        """One for each ratio whose two cases were run: a peer may be missing."""
        return [
            self._measure(ratio)
            for ratio in self.ratios
            if ratio.over in self.rounds and ratio.under in self.rounds
        ]

    def _measure(self, ratio: Ratio) -> Measure:
        both = zip(self.rounds[ratio.over], self.rounds[ratio.under], strict=True)
        values = [over / under if under else math.inf for over, under in both]
        return Measure(
            name=f"{self.name}: {ratio.name}",
            got=statistics.median(values),
            at_least=ratio.at_least,
            at_most=ratio.at_most,
            low=min(values),
            high=max(values),
        )


def number(value: float) -> str:
    """Three digits that matter, and no exponent."""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 20 else 2}f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


class Load(Generic[_Session]):
    """Closed loops, each on sessions of its own, one after the other."""

    def __init__(
        self,
        call: Callable[[_Session], Awaitable[object]],
        sessions: Sequence[_Session],
        callers: int = CALLERS,
    ) -> None:
        self._call = call
        self._owned = [cycle(sessions[caller::callers]) for caller in range(callers)]

    async def per_second(self, seconds: float) -> float:
        done = 0
        began = time.perf_counter()

        async def caller(owned: Iterator[_Session]) -> None:
            nonlocal done
            while time.perf_counter() < began + seconds:
                await self._call(next(owned))
                done += 1

        await asyncio.gather(*map(caller, self._owned))
        return done / (time.perf_counter() - began)


async def together(scenario: Scenario, cases: dict[str, Rate], pace: Pace) -> Scenario:
    """Calls a second, case after case, every other round backwards."""
    for rate in cases.values():
        await rate(pace.seconds / 2)  # for connections, prepared statements, scripts
    _keep_what_is_there()
    for index in range(pace.rounds):
        order = list(cases)[:: 1 if index % 2 == 0 else -1]
        rates = {name: await cases[name](pace.seconds) for name in order}
        scenario.add({name: rates[name] for name in cases})
    return scenario


async def alone(scenario: Scenario, cases: dict[str, Call], pace: Pace) -> Scenario:
    """The median time of a call, with one caller: service time, for there is nothing to wait for.

    Cases take turns call by call, so that a slow second of the disk is everybody's.
    """
    order = list(cases.items())
    _keep_what_is_there()
    for index in range(-1, pace.rounds):
        times: dict[str, list[int]] = {name: [] for name in cases}
        for _ in range(pace.calls):
            random.shuffle(order)
            for name, call in order:
                began = time.perf_counter_ns()
                await call()
                times[name].append(time.perf_counter_ns() - began)
        if index >= 0:  # the first was for connections, prepared statements, scripts
            scenario.add({name: statistics.median(of_case) / 1e6 for name, of_case in times.items()})
    return scenario


def _keep_what_is_there() -> None:
    """As a worker does before it serves. Python would look through all that the peers' packages have made, again and
    again, for a tenth of a second each, in whichever case makes the most objects.
    """
    gc.collect()
    gc.freeze()


def append_of(session_id: UUID, *messages: tuple[Any, str]) -> Append:
    return Append(
        session_id=session_id,
        messages=tuple(
            NewMessage(message_id=new_uuid(), role=role, content=content, created_at=utc_now())
            for role, content in messages
        ),
    )


def turn_of(session_id: UUID) -> Append:
    """A question and its answer, as one append."""
    return append_of(session_id, *TURN)


async def filled_sessions(
    store: ChatSessionStore, count: int, messages: int = MESSAGES_BEFORE, *, of_append: int = 100
) -> list[UUID]:
    """Sessions with that many messages, in every store that the store has."""

    async def one(index: int) -> UUID:
        session_id = (await store.create_session(f"user{index}")).session.session_id
        for before in range(0, messages, of_append):
            turns = TURN * (min(of_append, messages - before) // len(TURN))
            await store.append(append_of(session_id, *turns))
        return session_id

    return await in_parallel(one, count)


async def cached(store: ChatSessionStore, sessions: list[UUID]) -> list[UUID]:
    """The same sessions, once each is answered from Redis. Raises `TimeoutError` where one never is."""
    async with asyncio.timeout(_CACHED_SECONDS_MAX):
        for session_id in sessions:
            while (await store.read_history(session_id, max_messages=1)).source != "redis":  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(_POLL_SECONDS)
    return sessions


async def in_parallel(one: Callable[[int], Awaitable[_Session]], count: int) -> list[_Session]:
    at_once = asyncio.Semaphore(_FILLERS)

    async def bounded(index: int) -> _Session:
        async with at_once:
            return await one(index)

    return await asyncio.gather(*(bounded(index) for index in range(count)))

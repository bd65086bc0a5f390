"""Many callers in one process: durable turns and cached reads, against other stores."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import peers
from by_hand import HandWrittenStore
from harness import (
    CALLERS,
    TURN,
    Load,
    Pace,
    Rate,
    Ratio,
    Scenario,
    cached,
    filled_sessions,
    together,
    turn_of,
)
from stores import filled_by_hand, hybrid_of, opened_by_hand, opened_hybrid, opened_redis_only

from app.embedded import EmbeddedServers
from app.store import ChatSessionStore

SESSIONS = 200

HYBRID = "hybrid"
BY_HAND = "hand-written hybrid"
REDIS_ONLY = "Redis-only store (not durable)"
NOTHING = "control: nothing stored"
DECODED = "hybrid, messages decoded"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """All that is open at the same time, each with `SESSIONS` of its own that are filled once: the reads come first,
    while they are as long as they began.
    """

    hybrid: ChatSessionStore
    redis_only: ChatSessionStore
    by_hand: HandWrittenStore
    sessions: list[UUID]
    of_redis: list[UUID]
    of_hand: list[UUID]
    peers: list[tuple[peers.Peer, list[Any]]]
    notes: list[str]


@asynccontextmanager
async def opened(servers: EmbeddedServers, openings: dict[str, peers.Opening]) -> AsyncIterator[Compared]:
    notes: list[str] = []
    async with AsyncExitStack() as stack:
        hybrid = hybrid_of(await stack.enter_async_context(opened_hybrid(servers)))
        redis_only = await stack.enter_async_context(opened_redis_only(servers))
        by_hand = await stack.enter_async_context(opened_by_hand(servers))
        others = await stack.enter_async_context(peers.opened_peers(servers, openings, notes))
        yield Compared(
            hybrid=hybrid,
            redis_only=redis_only,
            by_hand=by_hand,
            sessions=await cached(hybrid, await filled_sessions(hybrid, SESSIONS)),
            of_redis=await filled_sessions(redis_only, SESSIONS),
            of_hand=await filled_by_hand(by_hand, SESSIONS),
            peers=[(peer, await peer.filled(SESSIONS)) for peer in others],
            notes=notes,
        )


def append_to(store: ChatSessionStore, sessions: list[UUID], callers: int = CALLERS) -> Load[UUID]:
    return Load(lambda session_id: store.append(turn_of(session_id)), sessions, callers)


async def many_turns(compared: Compared, pace: Pace) -> Scenario:
    """Hypothesis: with 32 callers the processor is the limit, and then a turn costs what Python does for it. The
    hybrid store shares a transaction, its statements and its round trips among all turns that wait at that moment;
    the others pay for theirs alone, those with an ORM twice, and the hand-written one for the JSON of the whole
    session, too. Expected: 12 times the hand-written one, 15 times SQLAlchemySession, 3.5 times langchain's, and
    0.6 of Redis alone, which commits nothing.

    Control: callers that store nothing, to show that the harness is not the limit.
    """
    sessions, by_hand = compared.sessions, compared.by_hand

    async def nothing(session_id: UUID) -> None:
        turn_of(session_id)

    cases: dict[str, Rate] = {
        HYBRID: append_to(compared.hybrid, sessions).per_second,
        BY_HAND: Load(lambda session_id: by_hand.add_messages(session_id, TURN), compared.of_hand).per_second,
        REDIS_ONLY: append_to(compared.redis_only, compared.of_redis).per_second,
        NOTHING: Load(nothing, sessions, 1).per_second,
    }
    for peer, its_sessions in compared.peers:
        cases[peer.name] = Load(peer.turn, its_sessions).per_second
    goals = {BY_HAND: 12, peers.SQLALCHEMY_SESSION: 15, peers.LANGCHAIN_POSTGRES: 3.5, REDIS_ONLY: 0.6}
    scenario = Scenario(
        name=f"durable turns, {CALLERS} callers",
        hypothesis=many_turns.__doc__ or "",
        unit="turns a second",
        ratios=_over_the_others(cases, goals),
        notes=list(compared.notes),
    )
    return await together(scenario, cases, pace)


async def many_reads(compared: Compared, pace: Pace) -> Scenario:
    """Hypothesis: a cached read is one command to Redis, sent together with those of the same moment, and its
    messages are passed on as they stand there, ready for an HTTP answer. The hand-written one reads all of the
    session's JSON; SQLAlchemySession asks PostgreSQL. Expected: 2.5 and 15 times as many.

    `hybrid, messages decoded` makes objects of them, as the peers do, for who does not want the JSON.
    """
    store, sessions, by_hand = compared.hybrid, compared.sessions, compared.by_hand
    missed = 0

    async def read(session_id: UUID) -> None:
        nonlocal missed
        history = await store.read_history(session_id, max_messages=peers.READ_MESSAGES)
        missed += history.source != "redis"

    async def read_and_decode(session_id: UUID) -> None:
        history = await store.read_history(session_id, max_messages=peers.READ_MESSAGES)
        assert len(history.messages) == peers.READ_MESSAGES

    cases: dict[str, Rate] = {
        HYBRID: Load(read, sessions).per_second,
        BY_HAND: Load(
            lambda session_id: by_hand.history(session_id, peers.READ_MESSAGES), compared.of_hand
        ).per_second,
        DECODED: Load(read_and_decode, sessions).per_second,
    }
    for peer, its_sessions in compared.peers:
        cases[peer.name] = Load(peer.read, its_sessions).per_second
    scenario = Scenario(
        name=f"cached reads, {CALLERS} callers",
        hypothesis=many_reads.__doc__ or "",
        unit="reads a second",
        ratios=_over_the_others(cases, {BY_HAND: 2.5, peers.SQLALCHEMY_SESSION: 15}),
    )
    await together(scenario, cases, pace)
    if missed:
        scenario.notes.append(f"{missed} reads of the hybrid store were answered by PostgreSQL")
    return scenario


def _over_the_others(cases: dict[str, Rate], goals: dict[str, float]) -> list[Ratio]:
    others = [name for name in cases if name not in {HYBRID, NOTHING, DECODED}]
    ratios = [
        Ratio(name=f"hybrid / {other}", over=HYBRID, under=other, at_least=goals.get(other))
        for other in sorted(others, key=lambda name: name not in goals)
    ]
    if NOTHING in cases:
        ratios.append(Ratio(name="control: nothing stored / hybrid", over=NOTHING, under=HYBRID))
    if DECODED in cases:
        ratios.append(Ratio(name="hybrid, decoded / hybrid", over=DECODED, under=HYBRID))
    return ratios

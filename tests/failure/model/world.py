"""One world of a schedule: PostgreSQL, Redis, the instances of the service between them, and what is wrong in it.

The instances run the product's own `HybridChatSessionStore`, `Heartbeat` and `Lease`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from app.chat import CHAIN_START, ChatSession, next_chain
from app.coherence.counts import Counts
from app.coherence.heartbeat import Heartbeat
from app.coherence.lease import LEASE_SECONDS, Lease
from app.coherence.ports import PROTOCOL, CacheState, Entry, Row
from app.hybrid import HybridChatSessionStore
from tests.failure.model import messages
from tests.failure.model.loop import ModelLoop
from tests.failure.model.plan import Plan
from tests.failure.model.postgres import ModelDurable, ModelKeeper, Postgres, Transaction
from tests.failure.model.redis import ModelCache, Node


class Instance:
    """A process of the service on its host: the links to the servers are the host's, and survive a crash."""

    def __init__(self, world: "World", index: int) -> None:
        self._world = world
        self.index = index
        self.redis_up = True
        self.postgres_up = True
        #: The old primary that this host still sees while the network is split.
        self.sees: Node | None = None
        self.transactions: dict[Transaction, None] = {}
        #: Ends a pause, a cut: only the last one of each counts.
        self.cuts: Counter[str] = Counter()
        self.boot()

    def __str__(self) -> str:
        return f"i{self.index}"

    def boot(self) -> None:
        world, plan = self._world, self._world.plan
        self.owner = world.loop.own(str(self))
        self.counts = Counts()
        self.lease = Lease(seconds=LEASE_SECONDS, clock=world.loop.time)
        # A process starts by reading the state; it holds no lease before its first beat.
        self.lease.learn(world.postgres.state)
        cache = ModelCache(world, self)
        self.heartbeat = Heartbeat(self.lease, ModelKeeper(world, self), cache.probe, self.counts)
        self.store = HybridChatSessionStore(
            ModelDurable(world, self),
            cache,
            lease=self.lease,
            heartbeat=self.heartbeat,
            counts=self.counts,
            messages_max=plan.messages_max,
            serve_unverified=plan.serve_unverified,
            verify="always" if self.index in plan.always else "lease",
        )
        world.counts.append(self.counts)
        world.loop.task_of(self.owner, self.heartbeat.run())


class World:
    def __init__(
        self, seed: int, *, faults: Sequence[str] | None = None, draining: bool = False, trace: bool = False
    ) -> None:
        self.chance = random.Random(seed)
        self.random = self.chance.random
        self.plan = Plan.drawn(self.chance, faults=faults, draining=draining)
        self.loop = ModelLoop(self.chance, tick=self.plan.tick)
        self.faults: Counter[str] = Counter()
        self.trace: list[str] | None = [] if trace else None
        self.wrong: list[str] = []
        self.counts: list[Counts] = []
        self.nodes: list[Node] = []
        self._sessions = 0
        self.primary = self.new_node({})
        self.postgres = Postgres(
            self,
            CacheState(
                protocol=PROTOCOL,
                epoch=f"{1:016x}",
                mode="draining" if draining else "hybrid",
                cache="on",
                redis_identity=self.primary.identity,
            ),
        )
        self.instances = [Instance(self, index) for index in range(self.plan.instances)]

    def new_node(self, entries: dict[UUID, Entry]) -> Node:
        node = Node(f"redis {len(self.nodes)}", entries)
        self.nodes.append(node)
        return node

    def new_session_id(self) -> UUID:
        self._sessions += 1
        return messages.session_id(self._sessions)

    def redis_owns(self, session_id: UUID, ids: Sequence[UUID], *, stored: int | None) -> None:
        """As Redis-only mode leaves it: `stored` messages were in PostgreSQL when it gave the session away."""
        session = ChatSession(
            session_id=session_id,
            user_id="user",
            created_at=messages.THEN,
            last_activity=messages.THEN,
            message_count=0,
        )
        if stored is not None:
            self.postgres.insert(Row(session=session, chain=CHAIN_START, owner="redis"))
        # The window may have dropped what is stored.
        dropped = self.chance.randint(0, stored or 0)
        chain = CHAIN_START
        lines = [messages.line(message_id, seq) for seq, message_id in enumerate(ids, 1)]
        for seq, message_id in enumerate(ids, 1):
            chain = next_chain(chain, (message_id,))
            session = replace(session, message_count=seq)
            if seq <= (stored or 0):
                row = Row(session=session, chain=chain, owner="redis")
                self.postgres.append(row, (lines[seq - 1],), message_id)
        session = replace(session, first_available_seq=dropped + 1)
        row = Row(session=session, chain=chain, owner="redis")
        self.primary.put(session_id, Entry.of(row, lines[dropped:]))

    def final(self, session_id: UUID) -> list[UUID]:
        """The messages of a session in the end; of one that was not taken over yet with those in Redis."""
        stored = self.postgres.ids.get(session_id, [])
        entry = self.primary.entries.get(session_id)
        if isinstance(entry, Entry) and entry.owner == "redis":
            return stored + [one.message_id for one in entry.messages if one.message_id not in stored]
        return stored

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.loop.time():9.3f}  {text}")

    def look_at(self, node: Node) -> None:
        """What holds at every step, whether somebody reads then or not: a clean entry of the epoch, in the
        epoch's Redis, equals its row.
        """
        state = self.postgres.state
        if node.identity != state.redis_identity or not state.trusting:
            return
        for session_id, entry in node.entries.items():
            if entry.epoch == state.epoch and not entry.dirty:
                row = self.postgres.rows.get(session_id)
                if row is None or not entry.equals(row):
                    at = row.session.message_count if row is not None else "deleted"
                    text = f"untrue: a clean entry of {entry.session.message_count}, its row {at}"
                    if text not in self.wrong:
                        self.wrong.append(text)
                        self.note(f"UNTRUE {text}")

"""What is done to servers, links and processes, one thing after another at random, until everything is healed."""

from collections.abc import Callable

from app.coherence.heartbeat import next_state
from tests.failure.model.clients import Clients
from tests.failure.model.postgres import IDLE_SECONDS_MAX
from tests.failure.model.world import Instance, World

_SNAPSHOTS_MAX = 4
#: Of what lasts a while, in seconds: from much less than a lease to a few.
_LASTS = (0.05, 0.2, 0.6, 1.2, 2.5)


class Nemesis:
    def __init__(self, world: World, clients: Clients) -> None:
        self._world = world
        self._loop = world.loop
        self._clients = clients
        self._chance = world.chance
        self._random = world.random
        self._snapshots: list[dict] = [{}]
        self._healed = False
        # After the product's module, where a mutant may have changed it.
        self._next_state = next_state

    def start(self) -> None:
        if self._world.plan.kinds:
            self._loop.later(self._wait(), self._strike)
        self._loop.later(self._random() * 0.3, self._snapshot)

    def heal(self) -> None:
        self._healed = True
        world = self._world
        for instance in world.instances:
            instance.redis_up = instance.postgres_up = True
            instance.sees = None
            instance.cuts.clear()
            self._loop.resume(instance.owner)
        world.primary.up = True
        for node in world.nodes:
            node.full = False

    def _wait(self) -> float:
        return self._random() * 2 * self._world.plan.pause_between_faults

    def _lasts(self) -> float:
        return self._random() * 2 * self._chance.choice(_LASTS)

    def _snapshot(self) -> None:
        if not self._healed:
            self._snapshots.append(dict(self._world.primary.entries))
            del self._snapshots[:-_SNAPSHOTS_MAX]
            self._loop.later(self._random() * 0.6, self._snapshot)

    def _strike(self) -> None:
        if self._healed:
            return
        kind = self._chance.choice(self._world.plan.kinds)
        instance = self._chance.choice(self._world.instances)
        if self._world.trace is not None:
            self._world.note(f"-- {kind} ({instance})")
        self._world.faults[kind] += 1
        getattr(self, f"_{kind.replace(' ', '_')}")(instance)
        self._loop.later(self._wait(), self._strike)

    # Processes

    def _crash(self, instance: Instance) -> None:
        self._loop.crash(instance.owner)
        hears = self._random() < 0.5
        for tx in list(instance.transactions):
            # At once, where the host lives on to say so.
            self._loop.later(
                0.0 if hears else self._random() * IDLE_SECONDS_MAX, self._world.postgres.end, tx
            )
        instance.transactions.clear()
        self._clients.crashed(instance)
        instance.cuts["pause"] += 1
        instance.boot()

    def _pause(self, instance: Instance) -> None:
        owner = instance.owner
        lasts = self._lasts()
        self._loop.pause(owner)
        if self._random() < 0.6:
            when = self._random() * lasts
            for tx in list(instance.transactions):
                self._loop.later(when, self._world.postgres.end, tx)

        def resume() -> None:
            if owner is instance.owner:
                self._loop.resume(owner)

        self._for_a_while(instance, "pause", lasts, resume)

    def _for_a_while(self, instance: Instance, what: str, lasts: float, end: Callable[[], None]) -> None:
        """A second one of a kind goes on for longer; it is the last one that ends."""
        instance.cuts[what] += 1
        number = instance.cuts[what]

        def over() -> None:
            if instance.cuts[what] == number:
                if self._world.trace is not None:
                    self._world.note(f"-- end of {what} ({instance})")
                end()

        self._loop.later(lasts, over)

    # Links

    def _redis_cut(self, instance: Instance) -> None:
        def mend() -> None:
            instance.redis_up = True

        instance.redis_up = False
        self._for_a_while(instance, "redis cut", self._lasts(), mend)

    def _postgres_cut(self, instance: Instance, lasts: float | None = None) -> None:
        def mend() -> None:
            instance.postgres_up = True

        instance.postgres_up = False
        for tx in list(instance.transactions):
            if self._random() < 0.7:
                self._loop.later(self._random() * IDLE_SECONDS_MAX, self._world.postgres.end, tx)
        self._for_a_while(instance, "postgres cut", lasts or self._lasts(), mend)

    def _estranged(self, instance: Instance) -> None:
        """The pair of cuts that no protocol can serve both sides of: one host loses PostgreSQL, another Redis."""
        others = [one for one in self._world.instances if one is not instance]
        self._postgres_cut(instance, lasts=1.0 + self._random() * 2)
        other = self._chance.choice(others)
        if self._random() < 0.5:
            self._redis_cut(other)
        else:
            self._failover(other)
            instance.sees = self._world.nodes[-2] if self._world.nodes[-2].up else None

    # Redis

    def _redis_restart(self, _: Instance) -> None:
        """With what an older snapshot holds, or with everything, as another Redis."""
        world = self._world
        old = world.primary
        old.up = False
        keeps = self._random() < 0.2 or world.plan.draining
        entries = dict(old.entries) if keeps else self._chance.choice(self._snapshots)
        world.primary = node = world.new_node(entries)
        if self._random() < 0.4:
            node.up = False
            self._loop.later(self._random() * 0.5, self._up, node)

    def _up(self, node) -> None:
        # Unless another restart has taken its place.
        if node is self._world.primary:
            node.up = True

    def _failover(self, _: Instance) -> None:
        """To a replica that lags behind. Some instances may go on with the old primary, which may stay up."""
        world = self._world
        old = world.primary
        lag = self._random()
        entries = dict(old.entries) if lag < 0.5 else self._chance.choice(self._snapshots)
        world.primary = world.new_node(entries)
        for instance in world.instances:
            instance.sees = old if self._random() < 0.5 else None
        if self._random() < 0.3:
            old.up = False
        self._forget_the_dead()

    def _forget_the_dead(self) -> None:
        for instance in self._world.instances:
            if instance.sees is not None and not instance.sees.up:
                instance.sees = None

    def _split_end(self, _: Instance) -> None:
        """The old primary becomes a replica, for good; or stays as it is, on the sockets that are left to it."""
        for instance in self._world.instances:
            if instance.sees is not None and self._random() < 0.5:
                instance.sees.replica = True
            instance.sees = None

    def _eviction(self, _: Instance) -> None:
        node = self._any_node()
        ours = [key for key, entry in node.entries.items() if entry.owner == "postgres"]
        if ours:
            node.forget(self._chance.choice(ours))

    def _flush(self, _: Instance) -> None:
        node = self._any_node()
        for session_id in list(node.entries):
            node.forget(session_id)

    def _any_node(self):
        return self._world.primary if self._random() < 0.7 else self._chance.choice(self._world.nodes)

    def _out_of_memory(self, _: Instance) -> None:
        node = self._world.primary
        node.full = True

        def free() -> None:
            node.full = False

        self._loop.later(self._lasts(), free)

    def _operator(self, _: Instance) -> None:
        """Turns the cache on or off, or names the Redis that he believes to be the right one."""
        postgres = self._world.postgres
        state = postgres.state
        identity = self._world.primary.identity
        cache = "off" if state.cache == "on" and self._random() < 0.7 else "on"
        postgres.change(state, self._next_state(state, cache=cache, redis_identity=identity))

    # PostgreSQL

    def _terminate(self, instance: Instance) -> None:
        for tx in list(instance.transactions):
            if self._random() < 0.5:
                self._world.postgres.end(tx)

    def _postgres_restart(self, _: Instance) -> None:
        for instance in self._world.instances:
            for tx in list(instance.transactions):
                self._world.postgres.end(tx)

"""The pulse of a process, beat by beat: on a clock that the test turns, on the real database and the real Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest

from app.coherence.counts import Counts
from app.coherence.heartbeat import BEATS_PER_LEASE, Heartbeat, next_state
from app.coherence.lease import Lease
from app.coherence.ports import PROTOCOL, CacheMoved, CacheOutage, CacheState
from app.errors import DurableStoreUnavailable
from app.postgres import statements
from app.postgres.cache_state import GONE_AFTER_SECONDS, PostgresStateKeeper
from app.postgres.engine import Database, create_engine
from app.redis_sessions.cache import RedisSessionCache
from app.tasks import stop
from tests.contract.suite import until
from tests.servers import Servers

pytestmark = pytest.mark.anyio

Probe = Callable[[], Awaitable[str]]


@dataclass
class Pulse:
    """A process's heartbeat, and the hand on its clock."""

    lease: Lease
    heartbeat: Heartbeat
    keeper: PostgresStateKeeper
    counts: Counts
    now: float = 1000.0

    async def beat_at(self, seconds: float) -> CacheState:
        """The state that a beat so many seconds after the start leaves."""
        self.now = 1000.0 + seconds
        await self.heartbeat.beat()
        return await self.keeper.read()

    async def seconds_until_on(self, *, step: float = 0.1) -> float:
        """How long it beats until the cache is on."""
        began = self.now
        while (await self.beat_at(self.now - 1000.0)).cache == "off":
            assert self.now - began < 200
            self.now += step
        return round(self.now - began, 3)


MakePulse = Callable[..., Pulse]


@pytest.fixture
async def probe(servers: Servers) -> AsyncIterator[Probe]:
    cache = RedisSessionCache(
        servers.redis_url, database=1, timeout_seconds=2, ttl_seconds=1, messages_max=1, bytes_max=1
    )
    yield cache.probe
    await cache.close()


@pytest.fixture
def make_pulse(database: Database, probe: Probe) -> MakePulse:
    def make(*, probe: Probe | None = probe, keeper: PostgresStateKeeper | None = None) -> Pulse:
        lease, counts = Lease(clock=lambda: pulse.now), Counts()
        keeper = keeper or PostgresStateKeeper(database)
        pulse = Pulse(lease, Heartbeat(lease, keeper, probe, counts), PostgresStateKeeper(database), counts)
        return pulse

    return make


@pytest.fixture
def pulse(make_pulse: MakePulse) -> Pulse:
    return make_pulse()


@pytest.fixture
def keeper(database: Database) -> PostgresStateKeeper:
    return PostgresStateKeeper(database)


async def turn_off(keeper: PostgresStateKeeper, *, settled: bool = True) -> CacheState:
    state = await keeper.read()
    return await keeper.change(state, replace(state, cache="off", settled=settled))


async def outage() -> str:
    raise CacheOutage("as the test says")


async def replica() -> str:
    raise CacheMoved(None)


async def elsewhere() -> str:
    return "another/one"


# The lease


async def test_a_beat_renews_the_lease_from_when_it_asked(pulse: Pulse, state: CacheState) -> None:
    await pulse.beat_at(0)
    pulse.now += 0.9
    held = pulse.lease.current()
    await pulse.beat_at(0.9)
    pulse.now += 0.9
    renewed = pulse.lease.current()
    pulse.now += 0.1

    assert (held, renewed) == (state, state)
    assert pulse.lease.current() is None


async def test_the_time_that_postgres_takes_to_answer_is_taken_from_the_lease(
    make_pulse: MakePulse, database: Database, state: CacheState
) -> None:
    class Slow(PostgresStateKeeper):
        async def read(self) -> CacheState:
            state = await super().read()
            pulse.now += 0.4
            return state

    pulse = make_pulse(keeper=Slow(database))
    await pulse.heartbeat.beat()
    pulse.now += 0.5
    held = pulse.lease.current()
    pulse.now += 0.1

    assert (held, pulse.lease.current()) == (state, None)


async def test_a_beat_that_finds_nothing_to_change_changes_nothing(pulse: Pulse, state: CacheState) -> None:
    left = [await pulse.beat_at(seconds) for seconds in range(5)]

    assert left == [state] * 5
    assert pulse.counts == Counts()


async def test_without_postgres_a_beat_is_missed_and_raises_nothing(
    make_pulse: MakePulse, state: CacheState
) -> None:
    away = Database(create_engine("postgresql://127.0.0.1:1/away", application_name="tests"))
    pulse = make_pulse(keeper=PostgresStateKeeper(away))
    pulse.lease.learn(state, asked_at=pulse.now)

    await pulse.beat_at(0.9)
    before = pulse.lease.current()
    pulse.now += 0.1

    assert (before, pulse.lease.current()) == (state, None)
    assert pulse.counts.heartbeats_missed == 1
    await away.close()


async def test_a_standby_gives_no_lease(
    pulse: Pulse, state: CacheState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        statements,
        "HEARTBEAT",
        statements.HEARTBEAT.replace("pg_is_in_recovery() AS standby", "true AS standby"),
    )

    await pulse.heartbeat.beat()

    assert pulse.lease.current() is None
    assert pulse.counts.heartbeats_missed == 1


async def test_a_database_without_a_state_gives_no_lease(pulse: Pulse, database: Database) -> None:
    async with database.connection() as conn:
        await conn.execute("TRUNCATE chat.cache_state")

    await pulse.heartbeat.beat()

    assert pulse.lease.state is None
    assert pulse.counts.heartbeats_missed == 1


# Settling


async def test_an_epoch_settles_a_leases_length_after_it_was_seen(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    await pulse.beat_at(0)
    await keeper.change(state, replace(state, settled=False))

    left = [await pulse.beat_at(seconds) for seconds in (0.2, 0.7, 1.19, 1.2, 1.4)]

    assert [one.settled for one in left] == [False, False, False, True, True]
    assert len({one.epoch for one in left}) == 1
    assert pulse.lease.hold_seconds(pulse.lease.state) == 0


async def test_only_the_epoch_that_was_waited_for_is_settled(
    keeper: PostgresStateKeeper, state: CacheState
) -> None:
    one = await keeper.change(state, replace(state, settled=False))
    two = await keeper.change(one, replace(one, settled=False))

    await keeper.settle(one)

    assert await keeper.read() == two


# Which Redis


async def test_another_redis_changes_the_epoch_and_is_waited_for(
    make_pulse: MakePulse, state: CacheState
) -> None:
    pulse = make_pulse(probe=elsewhere)

    left = await pulse.beat_at(0)

    # Not the other one at once: two processes that see different ones would take the epoch from each other.
    assert left == replace(state, epoch=left.epoch, cache="off", settled=False)
    assert left.epoch != state.epoch
    assert pulse.lease.state == left
    assert pulse.lease.current() is None
    assert pulse.counts.epoch_changes == 1


async def test_two_processes_that_find_another_redis_change_the_epoch_once(
    make_pulse: MakePulse, state: CacheState, keeper: PostgresStateKeeper
) -> None:
    pulses = [make_pulse(probe=elsewhere) for _ in range(3)]

    await asyncio.gather(*(one.heartbeat.beat() for one in pulses))

    left = await keeper.read()
    assert left.cache == "off"
    assert [one.lease.state for one in pulses] == [left] * 3


async def test_a_redis_that_became_a_replica_turns_the_cache_off(
    make_pulse: MakePulse, state: CacheState
) -> None:
    """What it answers on the sockets that it had before may be from the past, and says so to nobody."""
    left = await make_pulse(probe=replica).beat_at(0)

    assert left == replace(state, epoch=left.epoch, cache="off", settled=False)
    assert left.epoch != state.epoch


async def test_an_outage_of_redis_is_left_to_the_writers(make_pulse: MakePulse, state: CacheState) -> None:
    """Readers ask PostgreSQL meanwhile, and where nobody writes nothing is to be distrusted."""
    pulse = make_pulse(probe=outage)

    assert await pulse.beat_at(0) == state
    assert pulse.lease.current() == state


async def test_in_redis_only_mode_no_redis_is_asked_for_its_name(
    make_pulse: MakePulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    """There the data is Redis's, wherever that is now: nobody holds a copy that could be stale."""
    only = await keeper.change(state, next_state(state, mode="redis-only", cache="off"))
    pulse = make_pulse(probe=elsewhere)

    left = [await pulse.beat_at(seconds) for seconds in (0.0, 1.0, 5.0)]

    assert left == [only, replace(only, settled=True), replace(only, settled=True)]


async def test_a_process_without_redis_changes_nothing(
    make_pulse: MakePulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    pulse = make_pulse(probe=None)
    assert await pulse.beat_at(0) == state
    off = await turn_off(keeper)

    assert await pulse.beat_at(100) == off


async def test_a_newer_protocol_is_left_alone(
    make_pulse: MakePulse, keeper: PostgresStateKeeper, state: CacheState, database: Database
) -> None:
    await keeper.change(state, replace(state, settled=False))
    async with database.connection() as conn:
        await conn.execute("UPDATE chat.cache_state SET protocol = $1", PROTOCOL + 1)
    newer = await keeper.read()
    pulse = make_pulse(probe=elsewhere)

    left = [await pulse.beat_at(seconds) for seconds in (0.0, 2.0, 4.0)]

    assert left == [newer] * 3
    assert pulse.lease.current() is None


# The way back


async def test_the_cache_is_turned_on_once_redis_was_well_for_a_while(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    off = await turn_off(keeper)

    left = [await pulse.beat_at(seconds) for seconds in (0.0, 0.3, 0.59, 0.6)]

    assert left[:3] == [off] * 3
    assert left[3] == replace(state, epoch=left[3].epoch)
    assert left[3].epoch not in {state.epoch, off.epoch}
    assert pulse.lease.current() is None
    await pulse.beat_at(0.8)
    assert pulse.lease.current() == left[3]


async def test_the_cache_is_not_turned_on_before_the_epoch_has_settled(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    """Else the change would make writers wait that need not; and those that did wait have their turn first."""
    await pulse.beat_at(0)
    await turn_off(keeper, settled=False)

    left = [await pulse.beat_at(seconds) for seconds in (0.1, 0.8, 1.0, 1.1, 1.3, 1.6, 1.8)]

    assert [(one.cache, one.settled) for one in left] == [
        *[("off", False)] * 3,
        *[("off", True)] * 3,
        ("on", True),
    ]


async def test_the_redis_that_is_there_by_then_is_the_one_that_is_trusted(
    make_pulse: MakePulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    await turn_off(keeper)
    pulse = make_pulse(probe=elsewhere)

    await pulse.seconds_until_on()

    left = await keeper.read()
    assert (left.cache, left.redis_identity, left.settled) == ("on", "another/one", True)


@pytest.mark.parametrize("failure", [outage, replica])
async def test_a_redis_that_fails_meanwhile_must_be_well_for_a_while_again(
    make_pulse: MakePulse, keeper: PostgresStateKeeper, probe: Probe, state: CacheState, failure: Probe
) -> None:
    await turn_off(keeper)
    probes = [probe, probe, failure, probe, probe, probe]

    async def next_probe() -> str:
        return await probes.pop(0)()

    pulse = make_pulse(probe=next_probe)

    left = [(await pulse.beat_at(seconds)).cache for seconds in (0.0, 0.4, 0.5, 0.7, 1.2, 1.4)]

    assert left == ["off", "off", "off", "off", "off", "on"]


async def test_the_wait_doubles_each_time_it_failed_again(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    """A link that flaps must not cost a change of the epoch at every turn."""
    waits = []
    for _ in range(5):
        await turn_off(keeper)
        waits.append(await pulse.seconds_until_on())
        # Seen to be on, if only for a moment.
        await pulse.beat_at(pulse.now - 1000.0 + 0.1)

    assert waits == [pytest.approx(wait, abs=0.11) for wait in (0.6, 0.6, 1.2, 2.4, 4.8)]


async def test_the_wait_doubles_too_where_it_failed_before_the_next_beat(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    waits = []
    for _ in range(5):
        await turn_off(keeper)
        waits.append(await pulse.seconds_until_on())

    assert waits == [pytest.approx(wait, abs=0.11) for wait in (0.6, 0.6, 1.2, 2.4, 4.8)]


async def test_the_wait_has_an_end_and_is_short_again_after_a_long_time_without_a_failure(
    pulse: Pulse, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    for _ in range(9):
        await turn_off(keeper)
        longest = await pulse.seconds_until_on(step=5)
    await pulse.beat_at(pulse.now - 1000.0 + 1)
    await pulse.beat_at(pulse.now - 1000.0 + 70)
    await turn_off(keeper)

    assert 60 <= longest <= 65
    assert await pulse.seconds_until_on() == pytest.approx(0.6, abs=0.11)


# Going on


class Stubborn(PostgresStateKeeper):
    """PostgreSQL goes out after the first answer of each beat, for as long as it is `out`."""

    out = True

    async def change(self, old: CacheState, new: CacheState) -> CacheState:
        self._refuse()
        return await super().change(old, new)

    async def settle(self, state: CacheState) -> None:
        self._refuse()
        await super().settle(state)

    def _refuse(self) -> None:
        if self.out:
            raise DurableStoreUnavailable("as the test says")


async def test_what_postgres_refuses_is_tried_again_by_the_next_beat(
    make_pulse: MakePulse, database: Database, keeper: PostgresStateKeeper, state: CacheState
) -> None:
    stubborn = Stubborn(database)
    pulse = make_pulse(probe=elsewhere, keeper=stubborn)

    left = [await pulse.beat_at(0), await pulse.beat_at(0.2)]
    stubborn.out = False
    changed = await pulse.beat_at(0.4)
    stubborn.out = True
    unsettled = await pulse.beat_at(1.5)
    stubborn.out = False
    settled = await pulse.beat_at(1.7)

    assert left == [state, state]
    assert changed.cache == "off"
    assert unsettled == changed
    assert settled == replace(changed, settled=True)


async def test_it_beats_until_it_is_cancelled_whatever_happens(
    database: Database, state: CacheState, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> str:
        raise RuntimeError("as the test says")

    lease = Lease(seconds=0.5)
    beating = asyncio.create_task(Heartbeat(lease, PostgresStateKeeper(database), broken, Counts()).run())

    async def failed_often() -> bool:
        return sum("a heartbeat failed" in record.message for record in caplog.records) > BEATS_PER_LEASE

    await until(failed_often)
    held = lease.current()
    await stop(beating)

    assert held == state
    assert beating.cancelled()


# The one row


async def test_of_two_that_change_one_epoch_one_wins_and_both_learn_the_same(
    database: Database, state: CacheState
) -> None:
    keepers = [PostgresStateKeeper(database) for _ in range(6)]
    wanted = [replace(state, redis_identity=f"{number}/x", settled=False) for number in range(6)]

    learned = await asyncio.gather(
        *(keeper.change(state, new) for keeper, new in zip(keepers, wanted, strict=True))
    )

    assert learned == [learned[0]] * 6
    assert replace(learned[0], epoch=state.epoch) in wanted
    assert await keepers[0].read() == learned[0]


async def test_a_change_draws_an_epoch_that_was_never_there(
    keeper: PostgresStateKeeper, state: CacheState
) -> None:
    epochs = [state.epoch]
    for _ in range(20):
        state = await keeper.change(state, state)
        epochs.append(state.epoch)

    assert len(set(epochs)) == 21
    assert {len(epoch) for epoch in epochs} == {16}


async def test_a_change_of_an_epoch_that_is_gone_changes_nothing(
    keeper: PostgresStateKeeper, state: CacheState
) -> None:
    newer = await keeper.change(state, next_state(state, cache="off"))

    assert await keeper.change(state, replace(state, redis_identity="late/x")) == newer
    assert await keeper.read() == newer


async def test_a_database_that_was_promoted_begins_a_new_epoch_that_is_waited_for(
    keeper: PostgresStateKeeper, state: CacheState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may hold what the new primary never received."""
    before = await keeper.read()
    monkeypatch.setattr(keeper, "_timeline", "0000000F")

    after, next_one = await keeper.read(), await keeper.read()

    assert before == state
    assert after == replace(state, epoch=after.epoch, settled=False)
    assert after.epoch != state.epoch
    assert next_one == after


# Who is there


async def instances(database: Database) -> list[Any]:
    async with database.connection() as conn:
        return await conn.fetch("SELECT * FROM chat.instances ORDER BY started_at")


async def test_a_process_that_serves_says_so_with_its_first_beat_and_each_few(
    database: Database, state: CacheState
) -> None:
    instance_id = uuid4()
    keeper = PostgresStateKeeper(database, instance_id=instance_id, version="1.2.3")
    await keeper.read()
    seen = [await instances(database)]
    for _ in range(5):
        await keeper.read()
        seen.append(await instances(database))

    said = [one[0]["last_seen"] for one in seen]
    assert [len(one) for one in seen] == [1] * 6
    assert (seen[0][0]["instance_id"], seen[0][0]["version"]) == (instance_id, "1.2.3")
    assert seen[0][0]["protocol"] == PROTOCOL
    assert said[:5] == [said[0]] * 5
    assert said[5] > said[0]
    assert seen[5][0]["started_at"] == seen[0][0]["started_at"]


async def test_a_command_is_no_instance(database: Database, state: CacheState) -> None:
    await PostgresStateKeeper(database).read()

    assert await instances(database) == []


async def test_the_others_are_those_that_were_heard_from_lately(
    database: Database, state: CacheState
) -> None:
    one, other, gone = (PostgresStateKeeper(database, instance_id=uuid4()) for _ in range(3))
    command = PostgresStateKeeper(database)
    for keeper in (one, other, gone):
        await keeper.read()
    before = [await keeper.others() for keeper in (one, command)]
    async with database.connection() as conn:
        await conn.execute(
            "UPDATE chat.instances SET last_seen = last_seen - make_interval(secs => $2) WHERE instance_id = $1",
            *(gone._instance_id, GONE_AFTER_SECONDS),
        )

    assert before == [2, 3]
    assert [await keeper.others() for keeper in (one, other, command)] == [1, 1, 2]


async def test_a_process_that_leaves_is_off_the_list_with_those_long_gone(
    database: Database, state: CacheState
) -> None:
    leaving, staying, gone = (PostgresStateKeeper(database, instance_id=uuid4()) for _ in range(3))
    for keeper in (leaving, staying, gone):
        await keeper.read()
    async with database.connection() as conn:
        await conn.execute(
            "UPDATE chat.instances SET last_seen = last_seen - interval '25 hours' WHERE instance_id = $1",
            gone._instance_id,
        )

    await leaving.leave()

    assert [one["instance_id"] for one in await instances(database)] == [staying._instance_id]

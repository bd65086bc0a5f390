"""A process's right to believe Redis, on a clock that the test turns."""

import time
from dataclasses import replace

import pytest

import app.coherence.lease as lease_module
from app.coherence.heartbeat import next_state
from app.coherence.lease import LEASE_SECONDS, Lease, boot_time
from app.coherence.ports import PROTOCOL, CacheState, Mode

ONE, TWO, THREE = ("1" * 16, "2" * 16, "3" * 16)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lease(clock: Clock) -> Lease:
    return Lease(clock=clock)


def new_state(
    epoch: str = ONE,
    *,
    protocol: int = PROTOCOL,
    mode: Mode = "hybrid",
    cache: str = "on",
    identity: str | None = "a/a",
    settled: bool = True,
) -> CacheState:
    return CacheState(
        protocol=protocol, epoch=epoch, mode=mode, cache=cache, redis_identity=identity, settled=settled
    )


# The reader's half


def test_a_process_that_has_heard_nothing_trusts_nothing(lease: Lease) -> None:
    assert lease.current() is None
    assert not lease.still(new_state())


def test_a_lease_ends_its_length_after_it_was_asked_for_not_after_it_was_answered(
    clock: Clock, lease: Lease
) -> None:
    asked_at = clock.now
    clock.now += 0.6
    lease.learn(new_state(), asked_at=asked_at)

    clock.now = asked_at + LEASE_SECONDS - 0.001
    before = lease.current()
    clock.now = asked_at + LEASE_SECONDS

    assert before == new_state()
    assert lease.current() is None
    assert not lease.still(new_state())


def test_an_answer_that_took_longer_than_a_lease_gives_none(clock: Clock, lease: Lease) -> None:
    asked_at = clock.now
    clock.now += LEASE_SECONDS

    lease.learn(new_state(), asked_at=asked_at)

    assert lease.current() is None


def test_each_beat_renews_it(clock: Clock, lease: Lease) -> None:
    for _ in range(10):
        lease.learn(new_state(), asked_at=clock.now)
        clock.now += 0.9 * LEASE_SECONDS
        assert lease.current() is not None


def test_an_overtaken_answer_does_not_shorten_it(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(), asked_at=clock.now)
    lease.learn(new_state(), asked_at=clock.now - 0.9)
    clock.now += 0.5

    assert lease.current() is not None


def test_a_state_learned_by_the_way_gives_no_lease(lease: Lease) -> None:
    """A writer's or a filler's: nobody noted when he asked."""
    lease.learn(new_state())

    assert lease.state == new_state()
    assert lease.current() is None


def test_a_state_learned_by_the_way_takes_no_lease_of_its_epoch(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(), asked_at=clock.now)
    lease.learn(new_state())

    assert lease.current() is not None


def test_a_new_epoch_ends_the_lease_on_the_one_before(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(ONE), asked_at=clock.now)
    lease.learn(new_state(TWO))

    assert lease.current() is None
    assert not lease.still(new_state(ONE))
    assert not lease.still(new_state(TWO))


def test_an_overtaken_answer_about_an_older_epoch_gives_no_lease_on_the_new_one(
    clock: Clock, lease: Lease
) -> None:
    lease.learn(new_state(TWO))
    lease.learn(new_state(ONE), asked_at=clock.now)
    lease.learn(new_state(TWO))

    assert lease.current() is None


def test_a_read_that_began_under_one_epoch_may_not_end_under_another(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(ONE), asked_at=clock.now)
    began_under = lease.current()
    lease.learn(new_state(TWO), asked_at=clock.now)

    assert began_under is not None
    assert not lease.still(began_under)
    assert lease.still(new_state(TWO))


@pytest.mark.parametrize(
    "state",
    [
        new_state(cache="off"),
        new_state(mode="redis-only"),
        new_state(identity=None),
        new_state(protocol=PROTOCOL + 1),
        new_state(protocol=PROTOCOL - 1),
    ],
    ids=["cache off", "redis-only", "no identity", "a newer protocol", "an older protocol"],
)
def test_a_state_that_lets_nobody_believe_redis_gives_no_lease(
    clock: Clock, lease: Lease, state: CacheState
) -> None:
    lease.learn(state, asked_at=clock.now)

    assert not state.trusting
    assert lease.current() is None
    assert lease.state == state


def test_a_drain_gives_leases(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(mode="draining"), asked_at=clock.now)

    assert lease.current() is not None


# The writer's half


def test_a_writer_waits_a_leases_length_from_when_an_unsettled_epoch_was_first_seen(
    clock: Clock, lease: Lease
) -> None:
    unsettled = new_state(settled=False)
    lease.learn(unsettled)
    left = [lease.hold_seconds(unsettled)]
    clock.now += 0.4
    lease.learn(unsettled, asked_at=clock.now)
    left.append(lease.hold_seconds(unsettled))
    clock.now += 0.6

    assert left == [LEASE_SECONDS, pytest.approx(0.6)]
    assert lease.hold_seconds(unsettled) <= 0


def test_a_writer_waits_for_no_settled_epoch(lease: Lease) -> None:
    lease.learn(new_state())

    assert lease.hold_seconds(new_state()) == 0


def test_a_writer_waits_in_full_for_an_epoch_that_was_never_learned(lease: Lease) -> None:
    assert lease.hold_seconds(new_state(settled=False)) == LEASE_SECONDS


def test_an_epoch_that_settles_ends_the_wait(lease: Lease) -> None:
    lease.learn(new_state(settled=False))
    lease.learn(new_state(settled=True))

    assert lease.state is not None
    assert lease.hold_seconds(lease.state) == 0


def test_an_overtaken_answer_does_not_unsettle_an_epoch(clock: Clock, lease: Lease) -> None:
    lease.learn(new_state(settled=True), asked_at=clock.now)
    lease.learn(new_state(settled=False), asked_at=clock.now)

    assert lease.state == new_state(settled=True)


def test_an_overtaken_answer_does_not_begin_a_wait_anew(clock: Clock, lease: Lease) -> None:
    two = new_state(TWO, settled=False)
    lease.learn(two)
    clock.now += 0.7
    lease.learn(new_state(ONE))
    lease.learn(two)

    assert lease.hold_seconds(two) == pytest.approx(0.3)


def test_an_epoch_that_was_forgotten_is_waited_for_in_full_again(clock: Clock, lease: Lease) -> None:
    """Better a wait too many: what is remembered is bounded."""
    first = new_state(settled=False)
    lease.learn(first)
    clock.now += 0.7
    for number in range(20):
        lease.learn(new_state(f"{number:016x}", settled=False))
    forgotten = lease.hold_seconds(first)
    lease.learn(first)

    assert (forgotten, lease.hold_seconds(first)) == (LEASE_SECONDS, LEASE_SECONDS)


def test_whoever_waited_outlasts_every_lease_on_an_older_epoch(clock: Clock) -> None:
    """The two halves together: a reader that asked just before the change, a writer that saw it at once."""
    reader, writer = Lease(clock=clock), Lease(clock=clock)
    one, two = new_state(ONE), new_state(TWO, settled=False)
    asked_at = clock.now
    writer.learn(two)
    clock.now += 0.2
    reader.learn(one, asked_at=asked_at)

    clock.now += writer.hold_seconds(two)

    assert not reader.still(one)


def test_the_clock_goes_on_and_never_back() -> None:
    times = [boot_time() for _ in range(1000)]

    assert times == sorted(times)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no such clock")
def test_the_time_that_the_machine_sleeps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a lease that ended meanwhile would be believed when it wakes. Which clock is asked shows by another's time."""
    assert lease_module._BOOT_CLOCK == time.CLOCK_BOOTTIME
    assert Lease().now is boot_time
    monkeypatch.setattr(lease_module, "_BOOT_CLOCK", time.CLOCK_REALTIME)
    before = time.time()

    assert before <= boot_time() <= time.time()


# What a change owes


ON, OFF, ELSEWHERE = {"cache": "on"}, {"cache": "off"}, {"redis_identity": "b/b"}
REDIS_ONLY, DRAINING = {"mode": "redis-only"}, {"mode": "draining"}


@pytest.mark.parametrize(
    ("old", "changes", "settled"),
    [
        # Nobody may have believed Redis.
        (OFF, ON, True),
        (OFF, ON | ELSEWHERE, True),
        (OFF, DRAINING, True),
        (OFF, {}, True),
        (REDIS_ONLY, DRAINING, True),
        ({"redis_identity": None}, ELSEWHERE, True),
        # Somebody may, and writers go on to mark the very entries that he reads.
        (ON, {}, True),
        (ON, DRAINING, True),
        (DRAINING, {"mode": "hybrid"}, True),
        # Somebody may, and writers mark elsewhere or not at all.
        (ON, OFF, False),
        (ON, ELSEWHERE, False),
        (ON, REDIS_ONLY, False),
        (DRAINING, OFF, False),
        (ON, {"redis_identity": None}, False),
    ],
)
def test_an_epoch_is_settled_where_leases_on_the_one_before_do_no_harm(
    old: dict[str, object], changes: dict[str, object], settled: bool
) -> None:
    before = replace(new_state(), **old)

    after = next_state(before, **changes)

    assert after == replace(before, **changes, settled=settled)


@pytest.mark.parametrize("changes", [{}, ON, OFF, ELSEWHERE, DRAINING, REDIS_ONLY])
@pytest.mark.parametrize("old", [ON, OFF, DRAINING, REDIS_ONLY])
def test_no_change_settles_what_was_not(old: dict[str, object], changes: dict[str, object]) -> None:
    assert not next_state(replace(new_state(settled=False), **old), **changes).settled

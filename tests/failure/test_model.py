"""Random schedules of the coherence protocol: the product's own code on a model of its servers.

Method: `tests/failure/model`. Each seed is one order of steps and faults; a share of them runs here, other ones every
day, and `make model` runs as many as wanted. Mutants show that the model would find what it is there to find.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain

import pytest

from tests.failure.model import mutants, schedule

SCHEDULES = 600

#: A mutant must be found within so many schedules of its kind.
MUTANT_SCHEDULES = 1000

#: The faults under which a rule matters most, and a seed under which it was seen to matter: the first that is tried.
#: A change of the code moves it: a test that then searches for seconds prints the one to put here.
FOCUS: dict[str, tuple[tuple[str, ...] | None, int]] = {
    "no mark": (None, 1),
    "no row lock": (None, 1),
    "no watch": (None, 22),
    "no hold": (("estranged",), 85),
    "no lease": (("estranged",), 26),
    "no identity": (None, 36),
    "clean skeleton": (None, 1),
    "publish anywhere": (None, 22),
    "publish is clean": (None, 9),
    "commit unmarked": (None, 6),
    "believe dirty": (None, 1),
    "believe old epochs": (None, 6),
    "always settled": (("estranged",), 37),
    "skeleton ended by a publish": (None, 540),
    "adopt without proof": (None, 305),
    "adopt without watch": (None, 1),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with schedule.quiet():
        yield


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or datetime.now(UTC).strftime("%Y%m%d"))
    print(f"CHAOS_SEED={chosen}")  # noqa: T201 - pytest shows it where the test fails
    return chosen


def test_no_schedule_loses_a_write_or_answers_with_an_old_one(seed: int) -> None:
    # Far from the seeds of other days.
    results = [schedule.run(seed * 1_000_000 + number) for number in range(SCHEDULES)]

    assert [(one.seed, one.wrong) for one in results if one.wrong] == []
    # Else there was nothing to check.
    assert sum(one.operations for one in results) > 20 * SCHEDULES
    assert sum(one.counts["hits"] for one in results) > 4 * SCHEDULES
    assert sum(one.counts["fills"] for one in results) > SCHEDULES
    assert sum(one.faults.total() for one in results) > 10 * SCHEDULES


def test_a_drain_loses_nothing_and_brings_nothing_back(seed: int) -> None:
    results = [schedule.run(seed * 1_000_000 + number, draining=True) for number in range(SCHEDULES // 4)]

    assert [(one.seed, one.wrong) for one in results if one.wrong] == []
    assert sum(one.counts["adopted"] for one in results) > SCHEDULES // 8


def test_without_faults_nothing_is_refused_and_nothing_waits(seed: int) -> None:
    results = [schedule.run(seed * 1_000_000 + number, faults=()) for number in range(SCHEDULES // 8)]

    assert [(one.seed, one.wrong) for one in results if one.wrong] == []
    assert sum(one.counts["held"] for one in results) == 0
    assert sum(one.counts["epochs"] for one in results) == 0


@pytest.mark.parametrize("mutant", FOCUS)
def test_a_protocol_with_one_rule_less_is_found_wrong(mutant: str) -> None:
    faults, known = FOCUS[mutant]
    draining = mutant in mutants.DRAINING

    with mutants.without(mutant):
        runs = (
            schedule.run(seed, faults=faults, draining=draining)
            for seed in chain([known], range(1, MUTANT_SCHEDULES))
        )
        found = next((run.seed for run in runs if run.wrong), None)

    print(f"{mutant}: found by seed {found}, known {known}")  # noqa: T201 - for `pytest -rP --durations=9`
    assert found is not None


@pytest.mark.parametrize("mutant", [None, "no watch"])
def test_a_seed_is_one_order_of_steps(mutant: str | None, seed: int) -> None:
    with mutants.without(mutant):
        first, second = (schedule.run(seed, trace=True) for _ in range(2))

    assert first.trace == second.trace
    assert len(first.trace or ()) > 50
    assert first.wrong == second.wrong

"""`python -m tests.failure.model`: campaigns of schedules against the product and against its mutants."""
# ruff: noqa: T201 - a command prints

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.failure.model import mutants, schedule
from tests.failure.model.plan import FAULT_KINDS

#: So many schedules are one job: small enough that two processes end together.
_CHUNK = 250

_BAD_KEPT_MAX = 20

_SHOWN_EVERY = 10_000

#: The mutant, the faults, whether it drains, the first seed, and the one after the last.
_Job = tuple[str | None, Sequence[str] | None, bool, int, int]


@dataclass
class Campaign:
    """What a run of schedules came to. `bad` are seeds with what was wrong under them."""

    name: str
    schedules: int = 0
    operations: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, list[str]]] = field(default_factory=list)
    bad_schedules: int = 0
    first_read: int | None = None
    seconds: float = 0.0

    def add(self, result: schedule.Result) -> None:
        self.schedules += 1
        self.operations += result.operations
        self.outcomes += result.outcomes
        self.faults += result.faults
        self.counts += result.counts
        if result.wrong:
            self.bad_schedules += 1
            self.bad.append((result.seed, result.wrong[:3]))
            self.kinds.update({one.split(":")[0] for one in result.wrong})
            if self.first_read is None and any(schedule.is_seen(one) for one in result.wrong):
                self.first_read = result.seed

    def merge(self, other: "Campaign") -> None:
        self.schedules += other.schedules
        self.operations += other.operations
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.counts += other.counts
        self.kinds += other.kinds
        self.bad_schedules += other.bad_schedules
        self.bad = sorted(self.bad + other.bad)[:_BAD_KEPT_MAX]
        seen = [one for one in (self.first_read, other.first_read) if one is not None]
        self.first_read = min(seen, default=None)

    @property
    def injected(self) -> int:
        return self.faults.total()

    def __str__(self) -> str:
        first = f" first seed {self.bad[0][0]} {self.bad[0][1][0]!r}" if self.bad else ""
        faults = " ".join(
            f"{kind.replace(' ', '-')}={number}" for kind, number in sorted(self.faults.items())
        )
        kinds = f" ({', '.join(f'{kind} {number}' for kind, number in self.kinds.most_common())})"
        return (
            f"{self.name}: {self.schedules} schedules, {self.operations} operations, {self.injected} faults "
            f"[{faults}], {self.counts['hits']} hits, {self.counts['fills']} fills, "
            f"{self.counts['validations']} validations, {self.counts['epochs']} changes of the epoch, "
            f"{self.bad_schedules} bad{kinds if self.kinds else ''}{first}, {self.seconds:.0f} s"
        )

    def as_json(self, seed: int) -> str:
        return json.dumps(
            {
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "campaign": self.name,
                "seed": seed,
                "schedules": self.schedules,
                "operations": self.operations,
                "outcomes": dict(sorted(self.outcomes.items())),
                "faults": dict(sorted(self.faults.items())),
                "counts": dict(sorted(self.counts.items())),
                "bad_schedules": self.bad_schedules,
                "kinds": dict(self.kinds),
                "first_bad": self.bad[:3],
                "first_seen_by_a_client": self.first_read,
                "seconds": round(self.seconds, 1),
            }
        )


def chunk(job: _Job) -> Campaign:
    """The schedules from `first` to before `last`, of a mutant or of the product."""
    mutant, faults, draining, first, last = job
    done = Campaign(mutant or "product")
    # Cycles are many and short-lived: in the generations' own rhythm they cost a fifth of the time.
    gc.disable()
    with schedule.quiet(), mutants.without(mutant):
        for seed in range(first, last):
            done.add(schedule.run(seed, faults=faults, draining=draining))
            if seed % 50 == 0:
                gc.collect()
    return done


def campaign(
    mutant: str | None,
    *,
    schedules: int,
    seed: int,
    processes: int,
    faults: Sequence[str] | None = None,
    draining: bool = False,
    enough: int = 0,
) -> Campaign:
    """`enough`: ends early after so many bad schedules."""
    began = time.monotonic()
    total = Campaign(
        (mutant or "product")
        + (" while draining" if draining else "")
        + ("" if faults is None else f" with {', '.join(faults) or 'no faults'}")
    )
    end = seed + schedules
    jobs = [(mutant, faults, draining, first, min(first + _CHUNK, end)) for first in range(seed, end, _CHUNK)]
    for part in _parts(jobs, processes):
        total.merge(part)
        if mutant is None:
            # At once: the end may be an hour away.
            for bad, wrong in part.bad:
                print(f"seed {bad}: {'; '.join(wrong)}", file=sys.stderr, flush=True)
        if total.schedules // _SHOWN_EVERY > (total.schedules - part.schedules) // _SHOWN_EVERY:
            # So that a run which is ended from outside has shown what it had.
            told = f"{total.schedules} schedules, {total.operations} operations, {total.bad_schedules} bad"
            print(f"{total.name}: {told}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if enough and total.bad_schedules >= enough:
            break
    total.seconds = time.monotonic() - began
    return total


def _parts(jobs: list[_Job], processes: int) -> Iterator[Campaign]:
    if processes == 1:
        yield from map(chunk, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(chunk, jobs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.failure.model", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--faults", nargs="*", choices=FAULT_KINDS, help="these instead of some at random; none: none"
    )
    parser.add_argument("--draining", action="store_true", help="Redis owns the first sessions")
    parser.add_argument("--mutants", action="store_true", help="each of them instead of the product")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="one of them")
    parser.add_argument("--enough", type=int, default=0, help="end a campaign after so many bad schedules")
    parser.add_argument("--replay", type=int, metavar="SEED", help="print the steps of one schedule")
    parser.add_argument("--report", type=Path, help="append a JSON line a campaign")
    given = parser.parse_args()
    if given.replay is not None:
        return replay(given)
    failed = False
    for name in sorted(mutants.MUTANTS) if given.mutants else [given.mutant]:
        found = campaign(
            name,
            schedules=given.schedules,
            seed=given.seed,
            processes=given.processes,
            faults=given.faults,
            draining=given.draining or name in mutants.DRAINING,
            enough=given.enough,
        )
        print(found, flush=True)
        if given.report is not None:
            with given.report.open("a") as report:
                report.write(found.as_json(given.seed) + "\n")
        # Nothing found in the product, something in each mutant that can be found.
        survives = name is not None and name not in mutants.EQUIVALENT and not found.bad_schedules
        failed |= survives or (name is None and found.bad_schedules > 0)
    return 1 if failed else 0


def replay(given: argparse.Namespace) -> int:
    with schedule.quiet(), mutants.without(given.mutant):
        result = schedule.run(
            given.replay,
            faults=given.faults,
            draining=given.draining or given.mutant in mutants.DRAINING,
            trace=True,
        )
    print("\n".join(result.trace or ()))
    print("\n".join(result.wrong) or "nothing is wrong")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

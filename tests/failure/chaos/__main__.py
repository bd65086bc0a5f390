"""`python -m tests.failure.chaos`: one run on real processes. Exit code 1 where it found something."""

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import uvloop

from tests.failure.chaos.run import PROJECT, Options, Outcome, keep_failure, run

#: Beyond this a write waited longer than the protocol may make it wait.
_WRITE_PAUSE_SECONDS_MAX = 3.0

_SHOWN_OF_A_KIND_MAX = 4


def main() -> int:
    arguments = _parser().parse_args()
    logging.disable(logging.WARNING)  # asyncio on connections that we cut ourselves
    options = Options(
        seconds=arguments.duration,
        seed=arguments.seed,
        profile=arguments.profile,
        instances=arguments.instances or (2 if arguments.profile == "short" else 2 + arguments.seed % 2),
        clients=arguments.clients,
        surgery=arguments.surgery,
        project=arguments.project.resolve(),
    )
    # A SIGTERM ends like a Ctrl-C: with everything stopped and removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say(f"seed {options.seed}, profile {options.profile}, {options.seconds:g} s ...")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(run(options))
    failed = _failures(outcome, strict_pause=arguments.strict_pause)
    write_report(outcome, arguments.report, failed=bool(failed))
    say("\n".join(told(outcome, failed)))
    if failed:
        say(f"the history is in {arguments.report / f'failed-{options.seed}'}")
    say(f"{'FAILED' if failed else 'passed'}, seed {options.seed}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.failure.chaos", description=__doc__)
    parser.add_argument("--duration", type=float, default=60, help="seconds of faults and load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", choices=["hybrid", "flips", "short"], default="hybrid")
    parser.add_argument("--report", type=Path, default=PROJECT / "build" / "chaos", metavar="DIR")
    parser.add_argument("--instances", type=int, help="default: 2 or 3, by the seed")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--strict-pause", action="store_true", help="fail where a write waits over 3 s")
    parser.add_argument(
        "--surgery", action="store_true", help="REPLICAOF there and back leaves connections alive"
    )
    parser.add_argument("--project", type=Path, default=PROJECT, help="whose `app` is run; default: this one")
    return parser


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _failures(outcome: Outcome, *, strict_pause: bool) -> list[str]:
    failures = list(outcome.verdict.wrong)
    if strict_pause:
        failures += [
            f"write pause: {seconds:.3f} s, {kind}"
            for kind, seconds in outcome.verdict.write_pauses.items()
            if seconds > _WRITE_PAUSE_SECONDS_MAX
        ]
    return failures


def write_report(outcome: Outcome, folder: Path, *, failed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.jsonl").open("a") as runs:
        runs.write(json.dumps(outcome.summary()) + "\n")
    (folder / "last.json").write_text(json.dumps(outcome.timeline()))
    if failed:
        keep_failure(outcome, folder / f"failed-{outcome.options.seed}")


def told(outcome: Outcome, failed: list[str]) -> list[str]:
    """The run for people."""
    summary = outcome.summary()
    counted = ", ".join(f"{count} {what}" for what, count in summary["operations"].items())
    faults = Counter(summary["faults"])
    pauses = Counter(summary["longest_write_pause_seconds"])
    lines = [
        f"{counted} ({summary['operations_a_second']} a second)",
        f"{faults.total()} faults of {len(faults)} kinds ({summary['faults_a_second']} a second):",
        "  " + ", ".join(f"{name} {count}" for name, count in faults.most_common()),
        "longest writes: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in pauses.most_common(6)),
        f"longest read: {summary['longest_read_seconds']:.2f} s",
    ]
    if outcome.options.profile == "flips":
        lines.append(
            f"flips: {summary['flips']}, {summary['flips_failed']} failed; failed reads: {summary['failed_reads']}"
        )
        lines += [f"  ... {line[-300:]}" for line in sorted(set(outcome.record.flips_failed))[:3]]
    shown: Counter[str] = Counter()
    for line in failed:
        kind = line.partition(":")[0]
        shown[kind] += 1
        if shown[kind] <= _SHOWN_OF_A_KIND_MAX:
            lines.append(f"VIOLATION {line}")
    if failed:
        counted = ", ".join(f"{kind} {count}" for kind, count in shown.most_common())
        lines.append(f"{len(failed)} violations: {counted}")
    return lines


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

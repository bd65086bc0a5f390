"""`python -m tests.failure.chaos.report DIR`: a page and a picture of the runs in DIR."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

#: What one more clean operation could not have told apart from never: the rule of three.
_RULE_OF_THREE = 3

_BAD = (
    "lost",
    "stale",
    "non_monotonic",
    "duplicates",
    "no_prefix",
    "resurrected",
    "wrong_session",
    "failed_reads",
)

_WIDTH, _HEIGHT = 960, 360
_LEFT, _RIGHT, _TOP = 56, 16, 40
_CHART, _PAUSES = 170, 70

#: (colour by day, colour by night) of each family of faults.
_FAMILIES = {
    "redis": ("#c2410c", "#fb923c"),
    "link": ("#6d28d9", "#a78bfa"),
    "postgres": ("#1d4ed8", "#60a5fa"),
    "app": ("#be123c", "#fb7185"),
    "client": ("#4b5563", "#9ca3af"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.failure.chaos.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    (folder / "README.md").write_text(page(runs))
    (folder / "runs.svg").write_text(picture(json.loads((folder / "last.json").read_text())))


def page(runs: list[dict[str, Any]]) -> str:
    operations: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    pauses: dict[str, float] = {}
    for run in runs:
        operations.update(run["operations"])
        faults.update(run["faults"])
        if run["profile"] != "flips":
            # Where Redis owns the sessions, a write waits for Redis as long as that is out.
            for kind, seconds in run["longest_write_pause_seconds"].items():
                pauses[kind] = max(pauses.get(kind, 0.0), seconds)
    checked = operations["reads"] + operations["acked writes"]
    # Where Redis owns the sessions a read may fail with PostgreSQL and without: it is reported, not counted.
    bad = {
        name: sum(run[name] for run in runs if (name, run["profile"]) != ("failed_reads", "flips"))
        for name in _BAD
    }
    seconds = sum(run["seconds"] for run in runs)
    versions = sorted({run["version"] for run in runs})
    violations = sum(run["violations"] for run in runs)
    lines = [
        "# Runs of the chaos harness",
        "",
        (
            f"{len(runs)} runs, {seconds / 60:.0f} minutes, versions {', '.join(versions)}. "
            "How they work: `tests/failure/chaos`. To repeat one: `make chaos DURATION=seconds SEED=n`."
        ),
        "",
        "![Operations a second, faults and write pauses of the last run](runs.svg)",
        "",
        (
            f"**{violations} violations in {checked:,} checked operations under {faults.total():,} faults "
            f"of {len(faults)} kinds.**"
        ),
        "",
        _bound(violations, checked),
        "",
        "| checked | count |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in sorted(operations.items(), key=lambda one: -one[1])),
        "",
        "| found | count |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {count:,} |" for name, count in bad.items()),
        f"| all violations | {violations:,} |",
        "",
        (
            "Labelled reads carry `X-Cache-Freshness`: they say themselves that PostgreSQL could not be asked, and "
            "may be old. A failed read is one that failed although PostgreSQL, the instance and the wire between them "
            "had been left alone for 3 s. Unknown writes never had an answer: they may be there or not, once."
        ),
        "",
        "| fault | times | longest write around it, s |",
        "|---|---|---|",
        *(
            f"| {kind} | {count:,} | {f'{pauses[kind]:.2f}' if kind in pauses else ''} |"
            for kind, count in sorted(faults.items(), key=lambda one: -one[1])
        ),
        f"| all | {faults.total():,} | |",
        "",
        (
            "Writes are timed in hybrid mode, where nothing but Redis was disturbed; faults overlap. With no fault around, the longest took "
            f"{pauses.get('none', 0.0):.2f} s."
        ),
        "",
        f"Longest read, PostgreSQL and its instance undisturbed: {max(run['longest_read_seconds'] for run in runs):.2f} s.",
        *_flips(runs),
        "",
        "| seed | profile | instances | seconds | operations | faults | violations | version |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {run['seed']} | {run['profile']} | {run['instances']} | {run['seconds']:.0f} "
            f"| {sum(run['operations'].values()):,} | {sum(run['faults'].values()):,} | {run['violations']} "
            f"| {run['version']} |"
            for run in runs
        ),
        "",
    ]
    return "\n".join(lines)


def _bound(violations: int, checked: int) -> str:
    if violations or not checked:
        return "There is no bound to state: see the failing histories."
    return (
        f"Zero in {checked:,} means: with 95 % confidence fewer than 3/{checked:,} = {_RULE_OF_THREE / checked:.1e} "
        "of such operations go wrong, **under these faults**. It says nothing about others."
    )


def _flips(runs: list[dict[str, Any]]) -> list[str]:
    flips: Counter[str] = Counter()
    for run in runs:
        flips.update(run["flips"])
    if not flips:
        return []
    said = ", ".join(f"{count:,} to {mode}" for mode, count in sorted(flips.items()))
    failed = sum(run["flips_failed"] for run in runs)
    return [
        "",
        f"Changes of the mode under load: {said}; {failed} more were refused or broken off by a fault.",
    ]


def picture(run: dict[str, Any]) -> str:
    """Operations a second as an area, write pauses as bars below, each fault as a tick with its name as title."""
    reads, writes, pauses = run["reads"], run["writes"], run["longest_write_seconds"]
    length = max(len(reads), 1)
    step = (_WIDTH - _LEFT - _RIGHT) / length
    most = _round_up(max([read + write for read, write in zip(reads, writes, strict=True)], default=1))
    longest = max(*pauses, 1.0)
    base, floor = _TOP + _CHART, _TOP + _CHART + 60 + _PAUSES

    def area(values: list[int]) -> str:
        points = [
            f"{_LEFT + index * step:.1f},{base - value / most * _CHART:.1f}"
            for index, value in enumerate(values)
        ]
        end = _LEFT + (length - 1) * step
        return f"{_LEFT},{base} {' '.join(points)} {end:.1f},{base}"

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="Operations a second, faults and longest writes of the run with seed {run["seed"]}">'
        ),
        f"<style>{_style()}</style>",
        f'<text x="{_LEFT}" y="20" class="title">Operations a second, seed {run["seed"]}</text>',
        *_key(),
    ]
    for share in (0, 0.5, 1):
        y = base - share * _CHART
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="end">{most * share:.0f}</text>',
        ]
    total = [read + write for read, write in zip(reads, writes, strict=True)]
    parts += [
        f'<polygon points="{area(total)}" class="reads"/>',
        f'<polygon points="{area(writes)}" class="writes"/>',
    ]
    for fault in run["faults"]:
        x = _LEFT + fault["began"] * step
        width = max((fault["ended"] - fault["began"]) * step, 1.5)
        family = next((name for name in _FAMILIES if fault["kind"].startswith(name)), "client")
        row = base + 6 + 8 * list(_FAMILIES).index(family)
        parts.append(
            f'<rect x="{x:.1f}" y="{row}" width="{width:.1f}" height="6" class="{family}">'
            f"<title>{fault['kind']} at {fault['began']:.1f} s</title></rect>"
        )
    for index, seconds in enumerate(pauses):
        height = seconds / longest * _PAUSES
        if seconds:
            parts.append(
                f'<rect x="{_LEFT + index * step:.1f}" y="{floor - height:.1f}" width="{max(step - 1, 0.6):.1f}" '
                f'height="{height:.1f}" class="pause"><title>{seconds:.2f} s</title></rect>'
            )
    parts += [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}" class="grid"/>',
        f'<text x="{_LEFT - 8}" y="{floor - _PAUSES + 6}" class="end">{longest:.1f} s</text>',
        f'<text x="{_LEFT - 8}" y="{floor + 4}" class="end">0</text>',
        f'<text x="{_LEFT}" y="{floor + 18}">0 s</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{floor + 18}" class="end">{length} s</text>',
        f'<text x="{_WIDTH / 2:.0f}" y="{floor + 18}" class="middle">longest write that was answered in each second</text>',
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def _key() -> list[str]:
    parts, x = [], 330
    for css, text in [("reads", "reads"), ("writes", "writes"), *((name, name) for name in _FAMILIES)]:
        if css == next(iter(_FAMILIES)):
            parts.append(f'<text x="{x + 20}" y="20">faults of</text>')
            x += 80
        parts += [
            f'<rect x="{x}" y="11" width="10" height="10" class="{css}"/>',
            f'<text x="{x + 14}" y="20">{text}</text>',
        ]
        x += 76
    return parts


def _style() -> str:
    """The page behind is white by day and dark by night: the picture has no ground of its own."""

    def colours(index: int) -> str:
        return " ".join(f".{name}{{fill:{pair[index]}}}" for name, pair in _FAMILIES.items())

    day = f"text{{fill:#374151}} .grid{{stroke:#d1d5db}} .reads{{fill:#93c5fd}} .writes{{fill:#0f766e}} .pause{{fill:#b45309}} {colours(0)}"
    night = f"text{{fill:#d1d5db}} .grid{{stroke:#4b5563}} .reads{{fill:#1e5a8a}} .writes{{fill:#2dd4bf}} .pause{{fill:#fbbf24}} {colours(1)}"
    shape = "text{font:11px system-ui,sans-serif} .title{font-weight:600;font-size:13px} .end{text-anchor:end} .middle{text-anchor:middle}"
    return f"{shape} {day} @media (prefers-color-scheme:dark){{{night}}}"


def _round_up(value: float) -> int:
    step = 10 ** max(len(str(int(value))) - 1, 1)
    return max(int(-(-value // step) * step), step)


if __name__ == "__main__":
    main()

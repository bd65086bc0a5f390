"""What a run leaves: the table, the JSON with every round's numbers, and the Markdown report with its plots."""

import inspect
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import Measure, Scenario, number, table
from over_http import Latency, Memory
from plots import bars, line


@dataclass(kw_only=True)
class Results:
    """Everything that was measured, in the order in which it was."""

    facts: dict[str, str]
    scenarios: list[Scenario] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, scenario: Scenario) -> None:
        self.scenarios.append(scenario)
        self.measures += scenario.measures()
        self.notes += scenario.notes
        print(f"\n{rounds_table(scenario)}", flush=True)

    @property
    def met(self) -> bool:
        return all(measure.met for measure in self.measures)

    def with_goals(self) -> list[Measure]:
        return [measure for measure in self.measures if measure.goal]

    def text(self) -> str:
        rows = [("measure", "got", "goal"), *(measure.row() for measure in self.measures)]
        return "\n".join(["", table(rows), *(f"note: {note}" for note in self.notes)])

    def json(self) -> str:
        values = {**asdict(self), "measures": [{**asdict(one), "met": one.met} for one in self.measures]}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def rounds_table(scenario: Scenario) -> str:
    rows = [(scenario.name, "min", "median", "max"), *_rounds(scenario)]
    return f"{table(rows)}\n{scenario.unit}, {len(next(iter(scenario.rounds.values())))} rounds"


def _rounds(scenario: Scenario) -> list[tuple[str, str, str, str]]:
    return [
        (name, number(min(values)), number(statistics.median(values)), number(max(values)))
        for name, values in scenario.rounds.items()
    ]


def write_report(results: Results, folder: Path, command: str) -> None:
    """`README.md`, `results.json` and a plot a scenario, below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.json(), encoding="utf-8")
    missed = [measure for measure in results.with_goals() if not measure.met]
    how = (
        f"Written by `{command}`. Only ratios mean anything on another machine: they are taken within a round, "
        "and a measure is their median, with the worst and the best round in brackets."
    )
    parts = [
        "# Benchmarks",
        how,
        f"{len(results.with_goals()) - len(missed)} of {len(results.with_goals())} goals are met.",
        _markdown([("", ""), *results.facts.items()]),
        _markdown([("measure", "got", "goal"), *(measure.row() for measure in results.measures)]),
        *([f"- {note}" for note in results.notes]),
    ]
    for scenario in results.scenarios:
        parts += _section(scenario, folder)
    for latency in results.latencies:
        rows = [("percentile", "ms"), *((name, number(ms)) for name, ms in latency.percentiles.items())]
        parts += [f"## {latency.name}", f"{latency.seconds:.0f} seconds.", _markdown(rows)]
    if results.memory is not None:
        plot = line("Resident memory of a worker under full load", "MiB", results.memory.mib, "seconds")
        (folder / "memory.svg").write_text(plot, encoding="utf-8")
        parts += ["## Memory", "![Resident memory over time](memory.svg)"]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(scenario: Scenario, folder: Path) -> list[str]:
    title = f"{scenario.name}: {scenario.ratios[0].name}"
    file = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".svg"
    shown = {name: values for name, values in scenario.rounds.items() if not name.startswith("control")}
    plot = bars(scenario.name, scenario.unit, shown, next(iter(shown)))
    (folder / file).write_text(plot, encoding="utf-8")
    return [
        f"## {scenario.name}",
        inspect.cleandoc(scenario.hypothesis),
        f"![{scenario.name}]({file})",
        _markdown([(scenario.unit, "min", "median", "max"), *_rounds(scenario)]),
    ]


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)

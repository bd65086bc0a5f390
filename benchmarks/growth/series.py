"""Times of a call along something that grows, and what is said about them."""

import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

#: A call in milliseconds. What has to be prepared for it is not in the time.
Timed = Callable[[], Awaitable[float]]


async def milliseconds(call: Awaitable[Any]) -> float:
    began = perf_counter_ns()
    await call
    return (perf_counter_ns() - began) / 1e6


@dataclass(kw_only=True)
class Curve:
    """One call at each point of the axis, in rounds. What is compared was measured in the same round."""

    name: str
    unit: str = "ms"
    rounds: dict[int, list[list[float]]] = field(default_factory=dict)

    def p50(self, point: int) -> float:
        return statistics.median(value for one in self.rounds[point] for value in one)

    def p95(self, point: int) -> float:
        values = sorted(value for one in self.rounds[point] for value in one)
        return values[min(len(values) - 1, int(len(values) * 0.95))]

    def ratios(self, over: int, under: int) -> list[float]:
        """Of the medians, a round each."""
        return [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(self.rounds[over], self.rounds[under], strict=True)
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "points": {
                point: {"p50": self.p50(point), "p95": self.p95(point), "calls": sum(map(len, rounds))}
                for point, rounds in self.rounds.items()
            },
        }


@dataclass(kw_only=True)
class Figure:
    """Curves over one axis: a plot."""

    name: str
    title: str
    axis: str
    curves: list[Curve] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the table: `got` is the median over the rounds."""

    name: str
    values: Sequence[float]
    at_most: float | None = None

    @property
    def got(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        return self.at_most is None or self.got <= self.at_most

    def row(self) -> tuple[str, str, str]:
        goal = "" if self.at_most is None else f"<= {self.at_most:g} x{'' if self.met else '  MISSED'}"
        return self.name, f"{self.got:.2f} x ({min(self.values):.2f} to {max(self.values):.2f})", goal

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "got": self.got, "rounds": list(self.values), "at_most": self.at_most}


async def in_turns(name: str, cases: Mapping[int, Timed], *, calls: int, rounds: int) -> Curve:
    """The same call at each point, in an order that is drawn anew for each call: a slow second of the machine is
    everybody's, and none is always the one after itself, as the outer ones of A-B-C, C-B-A would be.

    The first round was for connections, prepared statements, scripts.
    """
    curve = Curve(name=name, rounds={point: [] for point in cases})
    order = list(cases)
    for index in range(-1, rounds):
        times: dict[int, list[float]] = {point: [] for point in cases}
        for _ in range(calls):
            random.shuffle(order)
            for point in order:
                times[point].append(await cases[point]())
        if index >= 0:
            for point, values in times.items():
                curve.rounds[point].append(values)
    return curve


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def digits(value: float) -> str:
    """Three digits that matter, and no exponent."""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 20 else 2}f}"


def text_of(figure: Figure) -> str:
    points = sorted({point for curve in figure.curves for point in curve.rounds})
    rows = [(f"{figure.title}, p50 (p95)", "unit", *map(short, points))]
    for curve in figure.curves:
        shown = (
            f"{digits(curve.p50(point))} ({digits(curve.p95(point))})" if point in curve.rounds else ""
            for point in points
        )
        rows.append((curve.name, curve.unit, *shown))
    return table(rows)


def short(count: int) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size} {letter}"
    return f"{count:,}"

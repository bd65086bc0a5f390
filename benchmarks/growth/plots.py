"""Plots by hand: lines over a logarithmic axis, in colours that are read on white and on black."""

import math
from html import escape

from benchmarks.growth.series import Curve, Figure, short

_WIDTH, _HEIGHT = 820, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 290, 44, 54
#: Of middle lightness, so that the page behind them may be either.
_INK = "#7d8590"
_COLOURS = ("#3b82f6", "#e0722b", "#22a06b", "#b65fd0", "#c9a227", "#d64550", "#14a3b8", "#8d7b68")


def svg_of(figure: Figure) -> str:
    """A line is the p50, the dashed one of its colour the p95."""
    points = [point for curve in figure.curves for point in curve.rounds]
    values = [value for curve in figure.curves for point in curve.rounds for value in _both(curve, point)]
    across = _Scale(min(points), max(points), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(values) / 1.2, max(values) * 1.2, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">'
        ),
        f"<title>{escape(figure.title)}</title>",
        f'<text x="{_LEFT}" y="22" font-size="15" font-weight="600">{escape(figure.title)}</text>',
    ]
    for value in _steps(up.least, up.most):
        y = up.at(value)
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_INK}" stroke-opacity="0.25"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>',
        ]
    parts += [
        f'<text x="{across.at(point):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{short(point)}</text>'
        for point in sorted(set(points))
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(figure.axis)}</text>')
    for index, curve in enumerate(figure.curves):
        parts += _lines(curve, _COLOURS[index % len(_COLOURS)], across, up)
        y = _TOP + 12 + index * 20
        parts += [
            (
                f'<line x1="{_WIDTH - _RIGHT + 16}" x2="{_WIDTH - _RIGHT + 40}" y1="{y - 4}" y2="{y - 4}" '
                f'stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="2.5"/>'
            ),
            f'<text x="{_WIDTH - _RIGHT + 46}" y="{y}">{escape(f"{curve.name}, {curve.unit}")}</text>',
        ]
    legend = _TOP + 20 + len(figure.curves) * 20
    parts += [
        f'<text x="{_WIDTH - _RIGHT + 16}" y="{legend}" font-size="11">line: p50, dashed: p95</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """A logarithmic one."""

    def __init__(self, least: float, most: float, begin: float, end: float) -> None:
        self.least, self.most = least, most
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        span = math.log(self.most / self.least) or 1.0
        return self._begin + math.log(value / self.least) / span * (self._end - self._begin)


def _both(curve: Curve, point: int) -> tuple[float, float]:
    return curve.p50(point), curve.p95(point)


def _steps(least: float, most: float) -> list[float]:
    """1, 2, 5, 10, ... between the two."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [
        step * 10.0**power for power in powers for step in (1, 2, 5) if least <= step * 10.0**power <= most
    ]


def _lines(curve: Curve, colour: str, across: _Scale, up: _Scale) -> list[str]:
    points = sorted(curve.rounds)
    parts = []
    for values, style in (
        (
            [curve.p95(point) for point in points],
            'stroke-width="1.2" stroke-dasharray="4 3" stroke-opacity="0.7"',
        ),
        ([curve.p50(point) for point in points], 'stroke-width="2.5"'),
    ):
        path = " ".join(
            f"{across.at(point):.1f},{up.at(value):.1f}" for point, value in zip(points, values, strict=True)
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>')
    parts += [
        f'<circle cx="{across.at(point):.1f}" cy="{up.at(curve.p50(point)):.1f}" r="3" fill="{colour}"/>'
        for point in points
    ]
    return parts

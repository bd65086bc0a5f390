"""Plots as SVG text, with no library: bars with their spread, and lines."""

from collections.abc import Sequence
from html import escape

from harness import number

_WIDTH = 760
_LABEL = 290
_BAR = 26
_TEXT = 'font-family="system-ui, sans-serif" font-size="13"'
_OURS, _OTHERS, _AXIS = "#2a6f97", "#a9b4bd", "#6b7780"


def bars(title: str, unit: str, rounds: dict[str, list[float]], ours: str) -> str:
    """The median of each case, with a whisker from its worst round to its best."""
    top = max(max(values) for values in rounds.values())
    scale = (_WIDTH - _LABEL - 90) / top
    parts = []
    for index, (name, values) in enumerate(rounds.items()):
        y = 40 + index * _BAR
        middle = sorted(values)[len(values) // 2]
        low, high, end = (_LABEL + value * scale for value in (min(values), max(values), middle))
        colour = _OURS if name == ours else _OTHERS
        parts += [
            f'<text x="{_LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{end - _LABEL:.1f}" height="{_BAR - 8}" fill="{colour}"/>',
            f'<path d="M{low:.1f} {y + 9}H{high:.1f}" stroke="{_AXIS}" stroke-width="2"/>',
            f'<text x="{max(end, high) + 6:.1f}" y="{y + 13}">{number(middle)}</text>',
        ]
    return _svg(title, unit, parts, 48 + len(rounds) * _BAR)


def line(title: str, unit: str, points: Sequence[tuple[float, float]], across: str) -> str:
    """Values from 0 upwards over seconds, or what `across` says."""
    height, left, bottom = 260, 60, 220
    last, top = points[-1][0] or 1, max(value for _, value in points) * 1.1
    path = " ".join(
        f"{left + x / last * (_WIDTH - left - 20):.1f},{bottom - y / top * (bottom - 40):.1f}"
        for x, y in points
    )
    parts = [
        f'<path d="M{left} 40V{bottom}H{_WIDTH - 20}" fill="none" stroke="{_AXIS}"/>',
        f'<polyline points="{path}" fill="none" stroke="{_OURS}" stroke-width="2"/>',
        f'<text x="{left - 8}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{left - 8}" y="52" text-anchor="end">{number(top)}</text>',
        f'<text x="{_WIDTH - 20}" y="{bottom + 20}" text-anchor="end">{number(last)} {escape(across)}</text>',
    ]
    return _svg(title, unit, parts, height)


def _svg(title: str, unit: str, parts: list[str], height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" {_TEXT}>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n<g fill="#1c2730">\n'
        f'<text x="12" y="22" font-weight="600">{escape(title)}</text>'
        f'<text x="{_WIDTH - 12}" y="22" text-anchor="end" fill="{_AXIS}">{escape(unit)}</text>\n'
        + "\n".join(parts)
        + "\n</g>\n</svg>\n"
    )

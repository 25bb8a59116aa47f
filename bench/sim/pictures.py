"""Line charts as SVG, by hand: nothing is needed to draw them, and a diff of one can be read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

Point = tuple[float, float, float]
"""x, y, and half the width of y's confidence interval (0: none is drawn)."""

WIDTH: Final = 760
HEIGHT: Final = 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 52
COLOURS: Final = (
    "#d62728",
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
)


@dataclass(slots=True, frozen=True)
class Axis:
    """From `low` to `high`, with these ticks; `log`: equal ratios are equally far apart."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value is between both ends, which it does not leave."""
        value = min(max(value, self.low), self.high)
        scale: Callable[[float], float] = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def chart(title: str, x: Axis, y: Axis, lines: Mapping[str, Sequence[Point]]) -> str:
    """One picture; the first line is drawn thick, and on top."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(value: float) -> str:
        return f"{LEFT + wide * x.share(value):.1f}"

    def down(value: float) -> str:
        return f"{TOP + high * (1 - y.share(value)):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x.label)}</text>',
        f'<text transform="translate(18 {TOP + high / 2}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>',
    ]
    for tick in x.ticks:
        parts.append(f'<path d="M{across(tick)} {TOP}V{TOP + high}" stroke="#ddd"/>')
        parts.append(f'<text x="{across(tick)}" y="{TOP + high + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        parts.append(f'<path d="M{LEFT} {down(tick)}H{LEFT + wide}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(down(tick)) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for index, (name, points) in reversed(list(enumerate(lines.items()))):
        colour, stroke = COLOURS[index % len(COLOURS)], 3 if index == 0 else 1.5
        if points:
            path = "L".join(f"{across(px)} {down(py)}" for px, py, _ in points)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>')
        beside = 3 * (index - len(lines) // 2)  # or the intervals of all lines would lie on each other
        for px, py, half in points:
            if half:
                at = f"{float(across(px)) + beside:.1f}"
                parts.append(f'<path d="M{at} {down(py - half)}V{down(py + half)}" stroke="{colour}" opacity="0.5"/>')
        key = TOP + 10 + 20 * index
        parts.append(f'<path d="M{WIDTH - RIGHT + 16} {key}h24" stroke="{colour}" stroke-width="{stroke}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 48}" y="{key + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"

"""Plots as SVG, which needs no library and which, unlike a picture by matplotlib, a page can colour.

SVG coordinates grow to the right and downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """The rectangle of an SVG in which values are drawn, and the values (low, high) at its edges."""
    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    label_drop: float   # from a grid line down to the baseline of its label
    label_below: float  # from the bottom down to the baseline of an x label

    def x(self, value: float) -> float:
        """The x coordinate of a value."""
        low, high = self.x_range
        return self.left + (self.right - self.left) * (value - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        """The y coordinate of a value; one beyond the range is moved to the edge."""
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (min(max(value, low), high) - low) / ((high - low) or 1)

    def points(self, xs: Sequence[float], ys: Sequence[float | None]) -> list[tuple[float, float]]:
        """The coordinates of the values that are not None."""
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True) if y is not None]

    def grid_line(self, value: float, label: str, look: str) -> str:
        """A horizontal line with its label; `look` is an attribute of the line."""
        y = self.y(value)
        return (f'<path d="M{self.left},{y:.1f}H{self.right}" {look}/><text x="{self.left - 6}" '
                f'y="{y + self.label_drop:.1f}" text-anchor="end">{label}</text>')

    def x_label(self, value: float, anchor: str = "middle") -> str:
        """The label of a value, below the plot."""
        y = self.bottom + self.label_below
        return f'<text x="{self.x(value):.1f}" y="{y}" text-anchor="{anchor}">{value}</text>'


def svg_points(points: Sequence[tuple[float, float]]) -> str:
    """Points in the format of <polyline> and <polygon>."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in numbers]

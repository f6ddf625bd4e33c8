"""Numbers and text formatted for people, in the terminal and on pages."""

import html
import math

from common.errors import visible


def html_text(value) -> str:
    """A value as HTML text."""
    return html.escape(visible(str(value)))


def exact_text(cell) -> str:
    """A cell as SQLite's shell shows it, numbers with all their digits: `x'00ff'` for a blob, `Inf`."""
    if isinstance(cell, bytes):
        return f"x'{cell.hex()}'"
    if isinstance(cell, float) and math.isinf(cell):
        return "Inf" if cell > 0 else "-Inf"
    return str(cell)


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}" + "s" * (count != 1)


def short_number(value: float, share: bool = False) -> str:
    """A number with about three digits: 0.0123, 4.56, 12k, 1e-6; a share in per cent."""
    if share:
        return f"{100 * value:.3g}%"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * share:.1f}"


def signed(value: float) -> str:
    """`+4.2`, `−1.0`, or a dash."""
    return f"{value:+.1f}".replace("-", "−") if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """`45 s`, `6 min 12 s`, `3 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

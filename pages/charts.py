"""Line charts and distributions, as SVG with labels in pixels: readable at every width, without a script."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pages.html import escape, line_key

POINTS = 600  # of a line at most: more than a page has pixels for, and small however long the record is
MARKED = 40  # points of a line, up to which each has a dot
STYLES = 6  # lines that look different
TICKS = 6  # of an axis, about


class Line(NamedTuple):
    """One line of a chart: its points by rising x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The finite points, or of more than `POINTS` the ends, and the lowest and the highest of each of many stretches, in their order."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= POINTS:
        return x, y
    some = [part[[y[part].argmin(), y[part].argmax()]] for part in np.array_split(np.arange(len(x)), POINTS // 2 - 1)]
    keep = np.unique(np.concatenate([[0, len(x) - 1], *some]))
    return x[keep], y[keep]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from ``low`` or below to ``high`` or above."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= rough)
    return [step * number for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number for a tick or a sentence."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis, as logarithms: powers of ten from ``low`` or below to ``high`` or above, and 2 and 5 times them if few."""
    whole = range(math.floor(low + 1e-9), math.ceil(high - 1e-9) + 1)
    factors = (1, 2, 5) if len(whole) <= 3 else (1,)
    every = [power + math.log10(factor) for power in whole for factor in factors]
    first = max(tick for tick in every if tick <= low + 1e-9)
    last = min(tick for tick in every if tick >= high - 1e-9 and tick > first)
    return [tick for tick in every if first <= tick <= last]


def line_chart(
    caption: str, lines: Sequence[Line], aim: tuple[float, str] | None = None, within: Sequence[float] = (), logarithmic: bool = False
) -> str:
    """A chart of lines over a common x; ``aim`` is a level (value, name) to compare them with, ``within`` values that its axis has to span.

    ``logarithmic``: both axes are, and values above 0.
    """
    kept = [(line, *thinned(line.x, line.y)) for line in lines]
    kept = [(line, x, y) for line, x, y in kept if len(x)]
    named = short
    if logarithmic:
        kept = [(line, np.log10(x), np.log10(y)) for line, x, y in kept]
        aim, within = aim and (math.log10(aim[0]), aim[1]), [math.log10(bound) for bound in within]
        named = lambda power: short(10.0**power)  # noqa: E731
    if not kept:
        return f'<figure class="chart"><h3>{escape(caption)}</h3><p class="soft">not measured</p></figure>'
    values = [value for _, _, y in kept for value in (y.min(), y.max())] + ([aim[0]] if aim else []) + list(within)
    marks = powers if logarithmic else ticks
    rows = marks(min(values), max(values))
    low, high = min(x.min() for _, x, _ in kept), max(x.max() for _, x, _ in kept)
    wide = (high - low) or 1.0
    columns = [tick for tick in marks(low, high) if low - 1e-9 <= tick <= high + 1e-9] if high > low else [low]

    def right(x: float) -> float:
        return 1000 * (x - low) / wide

    def down(y: float) -> float:
        return 1000 * (rows[-1] - y) / (rows[-1] - rows[0])

    drawn = [f'<path class="grid" d="{"".join(f"M0 {down(tick):.1f}H1000" for tick in rows)}"/>']
    if aim:
        drawn.append(f'<path class="aim" d="M0 {down(aim[0]):.1f}H1000"/>')
    for number, (_, x, y) in enumerate(kept):
        points, style = [f"{right(a):.1f} {down(b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)], f"l{number % STYLES}"
        drawn.append(f'<path class="{style}" d="M{" ".join(points)}"/>')
        if len(points) <= MARKED:
            drawn.append(f'<path class="{style} points" d="{"".join(f"M{point}h0" for point in points)}"/>')
    labels = [f'<span class="y" style="top:{down(tick) / 10:.2f}%">{named(tick)}</span>' for tick in rows]
    labels += [f'<span class="x" style="left:{right(tick) / 10:.2f}%">{named(tick)}</span>' for tick in columns]
    told = "; ".join(
        f"{line.name}: {len(line.x):,} records, first {named(y[0])}, last {named(y[-1])}, {named(y.min())} to {named(y.max())}" for line, _, y in kept
    )
    keys = [line_key(f"l{number % STYLES}", line.name) for number, (line, _, _) in enumerate(kept)]
    keys += [line_key("aim mark", aim[1])] if aim else []
    legend = f'<figcaption class="legend">{"".join(keys)}</figcaption>' if len(keys) > 1 else ""
    return (
        f'<figure class="chart"><h3>{escape(caption)}</h3><div class="plot"><svg role="img" aria-label="{escape(f"{caption}. {told}")}" '
        f'viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(drawn)}</svg><div aria-hidden="true">{"".join(labels)}</div></div>'
        f"{legend}</figure>"
    )


def strip_chart(caption: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Distributions, one a row (label, values): a dot for each value between the least and the most, and a bar at the median."""
    drawn, told = [], []
    for number, (label, values) in enumerate(rows):
        y, low, wide = number * 56, min(values), (max(values) - min(values)) or None
        place = lambda value, low=low, wide=wide: 50.0 if wide is None else 3 + 94 * (value - low) / wide  # noqa: E731
        middle = statistics.median(values)
        note = f"median {short(middle)}, {short(low)} to {short(max(values))}"
        told.append(f"{label}: {note}, {len(values)} values")
        drawn.append(f'<text x="0" y="{y + 15}">{escape(label)}</text>')
        drawn.append(f'<text class="note" x="0" y="{y + 32}">{escape(note)}</text>')
        drawn.append(f'<rect class="track" x="0" y="{y + 43}" width="100%" height="2"/>')
        drawn += [f'<circle class="dot" cx="{place(value):.2f}%" cy="{y + 44}" r="5"/>' for value in values]
        drawn.append(f'<rect class="median" x="{place(middle):.2f}%" y="{y + 36}" width="3" height="16"/>')
    spoken = escape(f"{caption}. {'; '.join(told)}")
    return (
        f'<figure class="chart strips"><h3>{escape(caption)}</h3><svg role="img" aria-label="{spoken}" height="{len(rows) * 56}">'
        f"{''.join(drawn)}</svg><figcaption>A dot is a run, the bar the median.</figcaption></figure>"
    )

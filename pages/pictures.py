"""Pictures with boxes drawn over them as lines, sharp at every size."""

from collections.abc import Sequence
from typing import NamedTuple

from pages.html import escape


class Box(NamedTuple):
    """A box over a picture."""

    ltrb: Sequence[float]  # in pixels of the picture as it is embedded
    colour: str
    name: str = ""  # shown in its corner
    kind: str = ""  # of its line, a class of the style sheet: forced (dashed), thin


def colour(label: int) -> str:
    """A light colour of a class: neighbouring numbers differ most."""
    return f"hsl({label * 137.5 % 360:.0f} 95% 68%)"


def drawn_over(address: str, width: int, height: int, alt: str, boxes: Sequence[Box]) -> str:
    """A picture (`pages.html.jpeg`) with boxes, the last on top, and their names."""
    paths, names = [], []
    for (left, top, right, bottom), stroke, name, kind in boxes:
        style = f' class="{kind}"' if kind else ""
        paths.append(f'<path{style} stroke="{stroke}" d="M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"/>')
        if name:
            x, anchor = (left + 3, "start") if left < 0.7 * width else (right - 3, "end")
            names.append(f'<text x="{x:.1f}" y="{min(top + 13, height - 3):.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    return (
        f'<div class="picture"><img src="{address}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(paths)}{"".join(names)}</svg></div>'
    )

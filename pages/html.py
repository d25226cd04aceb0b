"""Parts of a page that stands alone: one file, no network, no script, light and dark, narrow and wide.

Tables, charts and captions take plain text, whoever wrote it, and escape it; only ``body`` is markup.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from base.errors import UserError
from pages.text import shown

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2330; --soft: #566070; --line: #d5dae2;
  --a: #1f6fb2; --b: #c9641a; --c: #2b7a4b; --d: #8546ad; --e: #ad2f55; --f: #5f6670; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #14181f; --text: #e6e9ee; --soft: #a4aebb; --line: #363e4a;
    --a: #5aa9e6; --b: #f09a55; --c: #63c48a; --d: #c69be8; --e: #f08aa8; --f: #a9b1bc; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
pre { margin: 0; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.soft, figcaption, li { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.beside { display: grid; gap: 1rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); align-items: start; }
.beside > * { min-width: 0; }
.beside h3 { margin-top: .2rem; }
.scroll { overflow: auto; max-height: 48rem; margin-top: .6rem; }
@media (max-width: 40rem) { .scroll { max-height: 80rem; } }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .22rem .9rem .22rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); font-weight: 400; }
th:first-child { text-align: left; min-width: 7rem; overflow-wrap: anywhere; }
.words th, .words td, .words th:first-child { text-align: left; overflow-wrap: break-word; }
.words td:last-child { min-width: 8rem; }
.heads { color: var(--soft); padding-top: .8rem; }
td { font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); position: sticky; top: 0; background: var(--back); }
summary { cursor: pointer; padding: .2rem 0; overflow-wrap: anywhere; }
ul { margin: .2rem 0 .6rem; padding-left: 2rem; }
figure { margin: 0; min-width: 0; }
figcaption { padding-top: .35rem; line-height: 1.35; }
.chart svg { display: block; width: 100%; overflow: visible; }
.chart text { fill: var(--text); font-size: 14px; }
.chart .note { fill: var(--soft); }
.track { fill: var(--line); opacity: .5; }
.s0 { fill: var(--a); background: var(--a); }
.s1 { fill: var(--b); background: var(--b); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 .9em; border-radius: 2px; }
.key:first-child { margin-left: 0; }
.plot { position: relative; height: 14rem; margin: .7rem 1.6rem 2rem 3.6rem; font-size: .8rem; color: var(--soft); }
.plot svg { height: 100%; }
.plot path, .legend path { fill: none; stroke-width: 1.7; vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .aim { stroke: var(--text); stroke-width: 1; stroke-dasharray: 2 3; }
.plot .points { stroke-width: 6; stroke-linecap: round; stroke-dasharray: none; }
.plot span { position: absolute; white-space: nowrap; line-height: 1; }
.plot .y { right: 100%; padding-right: .45rem; transform: translateY(-50%); }
.plot .x { top: 100%; padding-top: .45rem; transform: translateX(-50%); }
.l0 { stroke: var(--a); }
.l1 { stroke: var(--b); stroke-dasharray: 8 3; }
.l2 { stroke: var(--c); stroke-dasharray: 3 3; }
.l3 { stroke: var(--d); stroke-dasharray: 10 3 2 3; }
.l4 { stroke: var(--e); stroke-dasharray: 14 4; }
.l5 { stroke: var(--f); stroke-dasharray: 2 5; }
.dot { fill: var(--a); fill-opacity: .6; stroke: var(--back); }
.strips { max-width: 46rem; }
.median { fill: var(--b); }
.skip { position: absolute; left: -99rem; padding: .3rem .6rem; background: var(--back); }
.skip:focus { left: 1rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; }
a { color: var(--a); }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
.pairs { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); align-items: start; }
.pair { display: grid; gap: 3px; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); align-items: start; }
.pictures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); align-items: start; }
.picture { position: relative; line-height: 0; }
.picture img { width: 100%; height: auto; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; filter: drop-shadow(0 0 1px #000); }
.picture path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.picture text { fill: #fff; font: 600 13px/1 system-ui, sans-serif; paint-order: stroke; stroke: #000; stroke-width: 2px; }
.picture .thin { stroke-width: 1; opacity: .8; }
.forced { stroke-dasharray: 7 6; }
.legend svg { display: inline-block; width: 3rem; height: .8rem; margin: 0 .35rem 0 0; vertical-align: middle; }
.legend span { display: inline-block; margin-right: 1.2rem; }
.legend .mark { stroke: var(--text); stroke-width: 2; }
.legend .thin { stroke-width: 1; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav, .skip { display: none; }
  .scroll { overflow: visible; max-height: none; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead th { position: static; }
  .words td { overflow-wrap: anywhere; }
  * { print-color-adjust: exact; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser then loads and runs nothing, whatever slips through


def escape(text: object) -> str:
    """Text as it stands in markup, between tags or in an attribute's quotes."""
    return html.escape(shown(text))


def page(title: str, body: str, contents: Sequence[tuple[str, str]] = ()) -> str:
    """The whole file; ``body`` is markup. ``contents``: (id, title) of the sections that stand at its head, with a link past them."""
    links = "".join(f'<li><a href="#{escape(place)}">{escape(name)}</a></li>' for place, name in contents)
    head = f'<a class="skip" href="#main">Skip the contents</a>\n<nav aria-label="Contents"><ul>{links}</ul></nav>\n' if contents else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'</head>\n<body>\n{head}<main id="main">\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n'
    )


def write(out: Path, text: str) -> str:
    """Writes a page → the line that says so. Raises UserError if it cannot be written."""
    content = text.encode()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from error
    return f"page: {out} ({len(content) / 1e6:.2f} MB)"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], words: bool = False) -> str:
    """A table of figures, or of ``words``, which stand at the left; a large one scrolls by itself.

    The first column names the row, and a row with nothing else heads those below.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *others in rows:
        kind = 'scope="row"' if any(others) else f'class="heads" colspan="{len(head)}"'
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others if any(others))
        lines.append(f"<tr><th {kind}>{escape(first)}</th>{cells}</tr>")
    label, body, kind = escape(" ".join(head).strip()), "\n".join(lines), ' class="words"' if words else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{kind}><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, lines: Sequence[str]) -> str:
    """Lines that show when their summary is opened."""
    return f"<details><summary>{escape(summary)}</summary><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul></details>"


def line_key(kind: str, text: str) -> str:
    """One entry of a paragraph or caption of the class ``legend``: a line of the style ``kind``, and what it stands for."""
    return f'<span><svg viewBox="0 0 48 12" aria-hidden="true"><path class="{kind}" d="M1 6h46"/></svg>{escape(text)}</span>'


def bar_chart(caption: str, rows: Sequence[tuple[str, Sequence[float], str]], series: Sequence[str] = ()) -> str:
    """Horizontal bars, one a row: (label, the lengths of its parts, a note at the right end); ``series`` names up to two parts.

    Lengths in per cent of the page's width and letters in pixels: readable at every width without a script.
    """
    longest = max((sum(parts) for _, parts, _ in rows), default=0) or 1
    drawn = []
    for number, (label, parts, note) in enumerate(rows):
        y, left = number * 38, 0.0
        drawn.append(
            f'<text x="0" y="{y + 15}">{escape(label)}</text><text class="note" x="100%" y="{y + 15}" text-anchor="end">{escape(note)}</text>'
        )
        drawn.append(f'<rect class="track" x="0" y="{y + 21}" width="100%" height="9"/>')
        for place, part in enumerate(parts):
            width = 100 * part / longest
            drawn.append(f'<rect class="s{place}" x="{left:.3f}%" y="{y + 21}" width="{width:.3f}%" height="9"/>')
            left += width
    keys = "".join(f'<span class="key s{place}"></span>{escape(name)}' for place, name in enumerate(series))
    legend = f"<figcaption>{keys}</figcaption>" if series else ""
    spoken = escape(f"{caption}: " + "; ".join(f"{label} {note}" for label, _, note in rows))
    return (
        f'<figure class="chart"><h3>{escape(caption)}</h3><svg role="img" aria-label="{spoken}" height="{len(rows) * 38}">{"".join(drawn)}</svg>'
        f"{legend}</figure>"
    )


def jpeg(picture: Image.Image, side: int, most: int) -> tuple[str, int, int]:
    """A picture reduced to ``side`` pixels, or further until it takes at most ``most`` bytes: its data address, width and height."""
    while True:
        small = picture.copy()
        small.thumbnail((side, side))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=75, optimize=True)
        address = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
        if len(address) <= most or side <= 32:
            return address, *small.size
        side = side * 3 // 4

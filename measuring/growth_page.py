"""The page of ``python -m base bench --growth``: log-log plots and fitted exponents."""

from collections.abc import Sequence

from measuring.figures import aligned
from measuring.growth import Fit, Growth, in_words
from pages.charts import Line, line_chart
from pages.html import escape, page, table

HEAD = ("part", "by", "backend", "exponent", "between the two largest", "growth", "seconds, smallest … largest size")


def exponent(fit: Fit) -> str:
    return f"{fit.exponent:.2f}" + ("" if fit.error is None else f" ± {fit.error:.2f}")


def rows_of(growth: Growth) -> list[tuple[str, ...]]:
    rows = []
    for name, fit in growth.fits().items():
        ends = f"{growth.seconds[name][0]:.3g} … {growth.seconds[name][-1]:.3g}"
        rows.append((growth.part, growth.what, name, exponent(fit), f"{fit.last:.2f}", in_words(fit), ends))
    return rows


def text(found: Sequence[Growth]) -> str:
    return aligned([HEAD, *(row for growth in found for row in rows_of(growth))])


def chart(growth: Growth) -> str:
    lines = [Line(f"{name}, exponent {exponent(fit)}", growth.sizes, growth.seconds[name]) for name, fit in growth.fits().items()]
    return line_chart(f"{growth.part}, seconds by {growth.what}", lines, logarithmic=True)


def growth_page(found: Sequence[Growth], about: dict[str, str], quick: bool) -> str:
    """One file that stands alone."""
    told = "Seconds a call by size, both axes logarithmic: a straight line is a power of the size, and its slope the exponent. "
    told += "Exponents are fitted by least squares, ± their standard error; medians of interleaved rounds."
    told += " QUICK: the smallest sizes and few rounds; not to be compared with full figures." if quick else ""
    body, parts = [f"<p>{escape(told)}</p>", table(("machine", ""), list(about.items()), words=True)], list(dict.fromkeys(g.part for g in found))
    for part in parts:
        of_it = [growth for growth in found if growth.part == part]
        charts = [chart(growth) for growth in of_it]
        rows = [row[1:] for growth in of_it for row in rows_of(growth)]
        body.append(f'<h2 id="{escape(part)}">{escape(part)}</h2>{table(HEAD[1:], rows, words=True)}<div class="beside">{"".join(charts)}</div>')
    return page("Growth of costs", "\n".join(body), [(part, part) for part in parts])

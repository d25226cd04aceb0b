"""Several runs beside each other: what differs in configuration, environment and figures, and trials that repeat each other."""

import json
from collections.abc import Mapping, Sequence

from pages.charts import Line, line_chart, strip_chart
from pages.html import escape, table
from report.figures import Figure, figures, rates
from report.folder import RunFolder

MARK = "≠"
OWN = ("seed", "runs_dir")  # keys in which trials of one configuration may differ
SPREAD = {"mAP": "mAP", "time to target": "time to target, s", "epochs to target": "epochs to target", "images/s": "images/s in training"}


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: of those that are called alike with the folder above it, or else a number."""
    names = [run.name for run in runs]
    names = [name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}" for name, run in zip(names, runs, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


def differing(columns: Sequence[Mapping[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows (key, mark, value of each) of what differs, and of what is the same; a key that one does not have differs."""
    unlike, alike = [], []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "–") for column in columns]
        same = all(value == values[0] for value in values)
        (alike if same else unlike).append([key, "" if same else MARK, *values])
    return unlike, alike


def difference_tables(names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
    """A table of what differs, and folded one of what does not."""
    unlike, alike = differing(columns)
    if not unlike and not alike:
        return "<p>not known</p>"
    head = ["key", "", *names]
    told = table(head, unlike, words=True) if unlike else "<p>Nothing differs.</p>"
    rest = f"<details><summary>{len(alike)} the same</summary>{table(head, alike, words=True)}</details>" if alike else ""
    return f"{told}{rest}"


def figure_table(names: Sequence[str], columns: Sequence[Mapping[str, Figure]]) -> str:
    """The figures of all runs; those after the first with their distance from it."""
    rows = []
    for key, first in columns[0].items():
        cells = [first.text]
        for column in columns[1:]:
            value, text = column[key]
            known = value is not None and first.value
            cells.append(f"{text} ({value / first.value - 1:+.1%})" if known else text)
        rows.append([key, MARK if len({column[key].value for column in columns}) > 1 else "", *cells])
    return table(["figure", "", *names], rows, words=True)


def curves(names: Sequence[str], runs: Sequence[RunFolder]) -> str:
    """Loss, mAP and throughput of all runs in common charts."""
    named = list(zip(names, runs, strict=True))
    train = {key: [Line(name, *columns(run.lines["train"], "step", key)) for name, run in named] for key in ("loss", "learning_rate")}
    charts = [
        line_chart("Loss, by step", train["loss"]),
        line_chart("Learning rate, by step", train["learning_rate"], within=[0.0]),
        line_chart("mAP, by epoch", [Line(name, *columns(run.lines["evaluation"], "epoch", "AP")) for name, run in named], within=[0.0]),
        line_chart("Images/s in training, by step", [Line(name, *rates(run)) for name, run in named], within=[0.0]),
    ]
    return f'<div class="beside">{"".join(charts)}</div>'


def columns(lines: Sequence[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two numbers of each record."""
    return [line[x] for line in lines], [line[y] for line in lines]


def trials(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs of one backend that have the same configuration but for the seed, if there are two or more."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        if run.values:
            key = json.dumps([run.backend, {k: v for k, v in run.values.items() if k not in OWN}], sort_keys=True, default=str)
            groups.setdefault(key, []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def trial_charts(runs: Sequence[RunFolder]) -> str:
    """How the figures of repeated trials are spread."""
    parts = []
    for group in trials(runs):
        known = [(text, [found[name].value for found in map(figures, group) if found[name].value is not None]) for name, text in SPREAD.items()]
        rows = [(f"{text} ({len(values)} of {len(group)} runs)", values) for text, values in known if values]
        seeds = ", ".join(str(run.values.get("seed")) for run in group)
        title = f"{len(group)} trials of one configuration: {', '.join(run.name for run in group)}; seeds {seeds}"
        parts.append(strip_chart(title, rows) if rows else f"<p>{escape(title)}: nothing measured yet.</p>")
    return "".join(parts) or "<p>No two of these runs have the same configuration but for the seed.</p>"

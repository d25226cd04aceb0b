"""``python -m base trials RUN…``: repeated runs in a table, with median, spread and MLPerf's Olympic mean.

RUN is a run's folder, or one that ``run_training.sh --trials`` made, which closes with this table and keeps it as trials.txt. Exit code 1:
more trials missed their target than MLPerf allows to fail.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.tools.finished import ended, members_of
from submission.runs import ALLOWED_FAILURES, Run, differences_of, read, score

RATES = {"images/s raw": "images_per_second_raw", "images/s training": "images_per_second_training", "images/s compute": "images_per_second_compute"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base trials", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run, or of trials")
    given = parser.parse_args(arguments).runs
    runs = [read(run) for folder in given for run in members_of(folder, "trial") or [folder]]
    text, code = closing(runs)
    print(text)
    if len(given) == 1 and members_of(given[0], "trial"):
        try:
            (given[0] / "trials.txt").write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{given[0] / 'trials.txt'} cannot be written ({error.strerror})") from error
    return code


def closing(runs: Sequence[Run]) -> tuple[str, int]:
    """The table, and the exit code."""
    head = ("trial", "seed", "to target, s", "epochs", *RATES, "mAP")
    columns = [[60 * run.minutes if run.reached else None for run in runs], [run.epochs if run.reached else None for run in runs]]
    ends = [ended(run.folder) or {} for run in runs]
    columns += [[end.get(key) for end in ends] for key in (*RATES.values(), "AP")]
    forms = ("{:,.1f}", "{:,g}", *["{:,.1f}"] * len(RATES), "{:.4f}")
    aimless = all(run.config.target is None for run in runs)
    absent = ("no target" if aimless else "not reached", *["–"] * (len(columns) - 1))
    rows = [
        (run.folder.name, str(run.config.seed), *(_said(column[place], form, no) for column, form, no in zip(columns, forms, absent, strict=True)))
        for place, run in enumerate(runs)
    ]
    known = [[value for value in column if value is not None] for column in columns]
    rows.append(("median", "", *(form.format(statistics.median(some)) if some else "–" for some, form in zip(known, forms, strict=True))))
    spreads = (f"{form.format(min(some))} … {form.format(max(some))}" if some else "–" for some, form in zip(known, forms, strict=True))
    rows.append(("spread", "", *spreads))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    line = "─" * max(map(len, table))
    last, code = _mean(runs) if not aimless else ("Olympic mean: none without a target", 0)
    bounds = "to target: from MLPerf's run_start to run_stop; median and spread are of the trials that have a figure"
    return "\n".join([line, *table, line, bounds, last]), code


def _said(value: float | None, form: str, absent: str) -> str:
    return absent if value is None else form.format(value)


def _mean(runs: Sequence[Run]) -> tuple[str, int]:
    """MLPerf's Olympic mean in words, and the exit code."""
    failed = [run.folder.name for run in runs if not run.reached]
    missed = f"; the target was not reached by {', '.join(failed)}" * bool(failed)
    for other in runs[1:]:
        if differences := differences_of(runs[0], other):
            return f"Olympic mean: none, {other.folder.name} differs from {runs[0].folder.name} in {differences[0]}{missed}", int(bool(failed))
    if len(runs) < 3:
        return f"Olympic mean: not measured, it takes 3 trials or more{missed}", int(bool(failed))
    if len(failed) > ALLOWED_FAILURES:
        return f"Olympic mean: none{missed}, and MLPerf allows {ALLOWED_FAILURES} of the runs to fail", 1
    result = score(runs)
    dropped = f"{runs[result.fastest].folder.name}, the fastest, and {runs[result.slowest].folder.name}, the slowest, dropped"
    return f"Olympic mean (MLPerf): {60 * result.mean:,.1f} s = {result.mean:.3f} minutes, {dropped}{missed}", 0

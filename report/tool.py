"""``python -m base report RUN…``: what runs did, as one page that needs no network.

One run: its figures, curves, components, environment and configuration, and, if its data are there, AP a class, detections and
training images. Several runs, or one with stages: what differs, and how repeated trials are spread.
"""

import argparse
from pathlib import Path

from base.errors import UserError
from base.tools.detector import flags_of_data
from pages.html import write
from pages.text import shown
from report.folder import read_folder, runs_in
from report.page import one_run, several_runs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html; of several runs runs/report.html)")
    parser.add_argument("--no-pictures", "--no_pictures", dest="pictures", action="store_false",
                        help="leave out AP a class, detections and training images, which need data, checkpoint and time")  # fmt: skip
    parser.add_argument("--images", type=int, metavar="N", help="look at N of the validation images only, evenly spaced (default: all)")
    parser.add_argument("--device", default="auto", help="torch device type for the detections (default: what the backend asks for)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of the loader (default: 2)")
    flags_of_data(parser, " for pictures")
    flags = parser.parse_args(arguments)
    if flags.images is not None and flags.images < 1:
        raise UserError(f"--images {flags.images} must be 1 or more")
    folders = list(dict.fromkeys(folder for given in flags.runs for folder in runs_in(given)))
    runs = [read_folder(folder) for folder in folders]
    out = flags.out or (flags.runs[0] if len(flags.runs) == 1 else Path("runs")) / "report.html"
    written = write(out, one_run(runs[0], flags) if len(runs) == 1 else several_runs(runs))
    for run in runs:
        for text in run.missing:
            print(shown(f"{run.name}: {text}"))
    print(written)
    return 0

"""``python -m base data DIR``: what a data set is, before anything is trained on it.

Counts, classes, sizes, how well the default boxes of a model fit its boxes, and what is broken: on the terminal, and with charts
and sample images as one page that needs no network. Exit code 1: there are image files that training would refuse.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from base.boxes import DefaultBoxes
from base.config import Config
from base.errors import UserError
from data_sets import layout
from data_sets.coco_json import EXAMPLES
from data_sets.coverage import BY_FORCE, THRESHOLD, model_boxes
from data_sets.index import AnnotationIndex
from data_sets.look_page import MOST_SAMPLES, data_page
from data_sets.pack import faults, parts_of
from data_sets.survey import CHECKED, REFUSED, Part, class_table, ends, facts_table, fit_table, look
from pages.html import write
from pages.text import shown

CLASSES_SHOWN = 24  # half of them the commonest, half the rarest


def show(head: list[str], rows: list[list[str]], console: Console) -> None:
    """A table on the terminal; a class's name is text there, not markup."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, title in enumerate(head):
        table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print()


def files_report(part: Part) -> list[str]:
    """Lines about the image files of a part, with examples."""
    wrong = sum(map(len, part.bad.values()))
    lines = [f"  image files: {part.checked:,} of {len(part.index):,} read, {wrong:,} not as they should be ({part.images})"]
    for kind, files in sorted(part.bad.items()):
        lines += [f"    {len(files):,} × {kind}", *(f"      {file}" for file in files[:EXAMPLES])]
    return lines


def meaning_of_fit(defaults: DefaultBoxes, image_size: tuple[int, int], strides: Sequence[int]) -> str:
    """What the tables call a fit, and of what default boxes."""
    levels = ", ".join(f"{rows}×{columns}" for rows, columns in defaults.feature_sizes)
    what = f"image size {image_size[0]}×{image_size[1]}, strides {' '.join(map(str, strides))}: {len(defaults):,} on {levels}"
    return f"A box fits if it has a default box at an IoU above {THRESHOLD} ({what})"


def main(arguments: list[str]) -> int:
    usual = Config()
    words = lambda values: " ".join(map(str, values))  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m base data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set's folder")
    parser.add_argument("--image_size", "--image-size", type=int, nargs=2, metavar=("H", "W"), default=usual.image_size,
                        help=f"of the model whose default boxes are meant (default: {words(usual.image_size)})")  # fmt: skip
    parser.add_argument("--strides", type=int, nargs=6, metavar="S", default=usual.strides,
                        help=f"of that model, as in training (default: {words(usual.strides)})")  # fmt: skip
    parser.add_argument("--check_images", "--check-images", choices=("sample", "all"), default="sample",
                        help=f"read {CHECKED} image files of each part, or all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=24, help="images on the page (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn by chance (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="the page (default: runs/data-NAME/index.html)")
    layout.flags(parser, *layout.PARTS)
    flags = parser.parse_args(arguments)
    if not 0 <= flags.samples <= MOST_SAMPLES:
        raise UserError(f"--samples {flags.samples} is not within 0 and {MOST_SAMPLES}")
    if flags.seed < 0:
        raise UserError(f"--seed {flags.seed} is below 0")
    size, name = tuple(flags.image_size), flags.folder.resolve().name or "data"
    defaults, quiet = model_boxes(size, flags.strides), not sys.stderr.isatty()
    parts = []
    for part, (annotations, images) in parts_of(flags.folder, layout.stated(flags)).items():
        index = AnnotationIndex.open(annotations, log=lambda line: print(line, file=sys.stderr, flush=True))
        parts.append(look(part, index, images, defaults, flags.check_images == "all", flags.seed, quiet))

    console, about = Console(highlight=False), meaning_of_fit(defaults, size, flags.strides)
    show(*facts_table(parts), console)
    head, rows = class_table(parts)
    show(head, ends(rows, CLASSES_SHOWN), console)
    print(f"{about}. {BY_FORCE}\n")
    show(*fit_table(parts, size), console)
    for part in parts:
        print("\n".join(map(shown, [f"{part.name}, {part.index.annotation_file}", *faults(part.index), *files_report(part), ""])))
    out = flags.out or Path("runs") / f"data-{name}" / "index.html"
    print(write(out, data_page(name, parts, size, about, flags.samples, flags.seed)))
    return 1 if any(kind in part.bad for part in parts for kind in REFUSED) else 0

"""``python -m base index --data_dir DIR``: pack (or open) both annotation files of a data set and report what was found."""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_sets import layout
from data_sets.index import AnnotationIndex
from pages.text import shown


def describe(index: AnnotationIndex, seconds: float) -> str:
    """A few lines about one index: its counts, and every row of its report with examples."""
    crowd = int(index.crowd.sum())
    counts = {
        "images": f"{len(index):,}, {int((np.diff(index.first_box) > 0).sum()):,} with boxes",
        "boxes": f"{len(index.boxes):,}, {crowd:,} of them crowd",
        "classes": f"{len(index.category_ids):,}",
        "index": f"{index.origin} in {seconds:.2f} s, {index.stored_in}",
    }
    return "\n".join([str(index.annotation_file), *(f"  {name:8} {value}" for name, value in counts.items()), *faults(index)])


def faults(index: AnnotationIndex) -> list[str]:
    """Lines about what was dropped or mended, with examples."""
    lines = []
    for kind in ("dropped", "mended"):
        rows = index.report[kind]
        lines.append(f"  {kind:8} {sum(row['count'] for row in rows.values()):,}")
        for reason, row in sorted(rows.items()):
            lines += [f"    {row['count']:,} × {reason}", *(f"      {shown(example)}" for example in row["examples"])]
    return lines


def parts_of(folder: Path, given: Mapping[str, str] | None = None) -> dict[str, tuple[Path, Path]]:
    """train, val → the annotation file and the folder of images, as `layout.find` finds them. Raises UserError."""
    paths, found = layout.find(folder, given=given)
    if found:
        print(f"data found in {folder}: {found}", flush=True)
    return {part: (folder / paths[f"{part}_annotations"], folder / paths[f"{part}_images"]) for part in layout.PARTS}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base index", description=__doc__)
    parser.add_argument("--data_dir", "--data-dir", type=Path, required=True, help="folder of the data set, in a layout of COCO or Pascal VOC")
    layout.flags(parser, *layout.PARTS)
    options = parser.parse_args(arguments)
    for annotations, _ in parts_of(options.data_dir, layout.stated(options)).values():
        began = time.perf_counter()
        index = AnnotationIndex.open(annotations, log=lambda line: print(line, file=sys.stderr, flush=True))
        print(describe(index, time.perf_counter() - began), flush=True)
    return 0

"""``python -m base index --data_dir DIR``: pack (or open) both annotation files of a data set and report what was found."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from base.errors import UserError
from base.index import AnnotationIndex
from data_sets.coco_json import GET_DATA


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
            lines += [f"    {row['count']:,} × {reason}", *(f"      {example}" for example in row["examples"])]
    return lines


def parts_of(folder: Path) -> dict[str, tuple[Path, Path]]:
    """train, val → the annotation file and the folder of images. Raises UserError if the folder is no data set."""
    annotations = folder / "annotations"
    if not annotations.is_dir():
        raise UserError(f"there is no folder {annotations}; name the data set's folder, or {GET_DATA}")
    return {part: (annotations / f"instances_{part}2017.json", folder / f"{part}2017") for part in ("train", "val")}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base index", description=__doc__)
    parser.add_argument("--data_dir", "--data-dir", type=Path, required=True, help="COCO folder: annotations/, train2017/, val2017/")
    options = parser.parse_args(arguments)
    for annotations, _ in parts_of(options.data_dir).values():
        began = time.perf_counter()
        index = AnnotationIndex.open(annotations, log=lambda line: print(line, file=sys.stderr, flush=True))
        print(describe(index, time.perf_counter() - began), flush=True)
    return 0

"""``python -m base index --data_dir DIR``: pack (or open) both annotation files of a data set and report what was found."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from base.index import AnnotationIndex
from data_sets import layout


def describe(index: AnnotationIndex, seconds: float) -> str:
    """A few lines about one index: its counts, and every row of its report with examples."""
    crowd = int(index.crowd.sum())
    counts = {
        "images": f"{len(index):,}, {int((np.diff(index.first_box) > 0).sum()):,} with boxes",
        "boxes": f"{len(index.boxes):,}, {crowd:,} of them crowd",
        "classes": f"{len(index.category_ids):,}",
        "index": f"{index.origin} in {seconds:.2f} s, {index.stored_in}",
    }
    lines = [str(index.annotation_file), *(f"  {name:8} {value}" for name, value in counts.items())]
    for kind in ("dropped", "mended"):
        rows = index.report[kind]
        lines.append(f"  {kind:8} {sum(row['count'] for row in rows.values()):,}")
        for reason, row in sorted(rows.items()):
            lines += [f"    {row['count']:,} × {reason}", *(f"      {example}" for example in row["examples"])]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base index", description=__doc__)
    parser.add_argument("--data_dir", "--data-dir", type=Path, required=True, help="folder of the data set, in a layout of COCO or Pascal VOC")
    layout.flags(parser, *layout.PARTS)
    options = parser.parse_args(arguments)
    paths, found = layout.find(options.data_dir, given=layout.stated(options))
    if found:
        print(f"data found in {options.data_dir}: {found}", flush=True)
    for part in layout.PARTS:
        began = time.perf_counter()
        file = options.data_dir / paths[f"{part}_annotations"]
        index = AnnotationIndex.open(file, log=lambda line: print(line, file=sys.stderr, flush=True))
        print(describe(index, time.perf_counter() - began), flush=True)
    return 0

"""The annotation index at the size of COCO's training set: packing, opening, memory."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from measuring.figures import Figure, Log

IMAGES, BOXES, CLASSES = 118_287, 860_001, 80  # COCO train2017
PACK_SECONDS, OPEN_SECONDS, MEMORY_MB = 60, 1.0, 150
OPENINGS = 5
PART = f"""annotation index, made-up COCO file of {IMAGES:,} images, {BOXES:,} boxes and polygons, about 450 MB
  pack     AnnotationIndex.open without an index: reading, parsing, checking, writing, loading (file in the page cache)
  open     AnnotationIndex.open with an index, in a fresh process: the call alone, imports not timed
  memory   the whole of that process after opening (Python, numpy, index): resident (VmRSS) and its peak (VmHWM)"""

OPEN = """
import json, sys, time
from data_sets.index import AnnotationIndex
began = time.perf_counter()
index = AnnotationIndex.open(sys.argv[1])
seconds = time.perf_counter() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
memory = [int(status[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM")]
print(json.dumps([seconds, *memory, index.origin, len(index), len(index.boxes)]))
"""


def generate(file: Path, images: int, boxes: int, log: Log, points: int = 23) -> None:
    """Write a COCO-like annotation file: always the same bytes; ``points`` is the mean number of polygon corners."""
    rng = np.random.default_rng(1)
    category_ids = np.sort(rng.choice(np.arange(1, 91), CLASSES, replace=False)).tolist()
    sizes = rng.integers(200, 641, (images, 2)).tolist()
    image_ids = np.sort(rng.choice(581_922, images, replace=False)).tolist()
    with_boxes = max(1, round(images * 117_266 / 118_287))
    owners = np.concatenate([np.arange(with_boxes), rng.integers(0, with_boxes, max(0, boxes - with_boxes))])[:boxes]
    rng.shuffle(owners)
    with open(file, "w") as out:
        filler = {"license": 3, "coco_url": "x" * 56, "flickr_url": "x" * 60, "date_captured": "2013-11-14 11:18:45"}  # as long as COCO's
        rows = (
            {**filler, "id": key, "file_name": f"{key:012d}.jpg", "height": height, "width": width}
            for key, (height, width) in zip(image_ids, sizes, strict=True)
        )
        out.write('{"info": {"description": "made up"}, "images": [' + ", ".join(map(json.dumps, rows)) + '], "annotations": [\n')
        for start in range(0, boxes, 20_000):
            stop = min(start + 20_000, boxes)
            corners = rng.random((stop - start, 4))
            counts = rng.integers(points // 2, points * 3 // 2, stop - start)
            coordinates = (rng.integers(100, 64_000, (counts.sum() * 2)) / 100).tolist()
            place, lines = 0, []
            columns = zip(owners[start:stop].tolist(), corners.tolist(), counts.tolist(), strict=True)
            for number, (owner, (u, v, s, t), count) in enumerate(columns, start + 1):
                height, width = sizes[owner]
                x, y = round(u * width * 0.9, 2), round(v * height * 0.9, 2)
                w, h = round(max(1.0, s * (width - x - 0.01)), 2), round(max(1.0, t * (height - y - 0.01)), 2)
                polygon, place = coordinates[place : place + 2 * count], place + 2 * count
                entry = {"segmentation": [polygon], "area": round(w * h * 0.6, 4), "iscrowd": int(s < 0.012), "image_id": image_ids[owner]}
                entry |= {"bbox": [x, y, w, h], "category_id": category_ids[int(s * 1e6) % CLASSES], "id": number}
                lines.append(json.dumps(entry))
            out.write(",\n".join(lines) + (",\n" if stop < boxes else "\n"))
            if start % 100_000 == 0:
                log(f"writing the annotation file: {stop:,} of {boxes:,} boxes")
        out.write('], "categories": ' + json.dumps([{"id": key, "name": f"class {key}"} for key in category_ids]) + "}")


def measure(log: Log, names: Sequence[str] = ()) -> list[Figure]:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}

    def opened(file: Path) -> list:
        done = subprocess.run([sys.executable, "-c", OPEN, str(file)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"opening {file} failed: {done.stderr}")
        return json.loads(done.stdout)

    with tempfile.TemporaryDirectory(prefix="ssd-bench-index-") as folder:
        file = Path(folder) / "instances_train2017.json"
        began = time.perf_counter()
        generate(file, IMAGES, BOXES, log)
        log(f"annotation file of {file.stat().st_size / 1e6:.0f} MB written in {time.perf_counter() - began:.0f} s; packing")
        pack_seconds, _, pack_peak, origin, images, boxes = opened(file)
        if (origin, images, boxes) != ("packed", IMAGES, BOXES):
            raise RuntimeError(f"expected {IMAGES} images and {BOXES} boxes packed, got {origin} {images} {boxes}")
        log(f"packed; opening {OPENINGS} times")
        runs = [opened(file) for _ in range(OPENINGS)]
        if any(run[3] != "current" for run in runs):
            raise RuntimeError(f"an opening did not use the stored index: {[run[3] for run in runs]}")
        index_mb = file.with_name("instances_train2017.index.npz").stat().st_size / 1e6
        json_mb = file.stat().st_size / 1e6
    figures = [Figure("pack", pack_seconds, "s", PACK_SECONDS)]
    rows = [("open", "s", OPEN_SECONDS), ("resident", "MB", MEMORY_MB), ("resident, peak", "MB", MEMORY_MB)]
    for column, (name, unit, limit) in enumerate(rows):
        values = [run[column] for run in runs]
        figures.append(Figure(name, statistics.median(values), unit, limit, OPENINGS, (min(values), max(values))))
    figures.append(Figure("resident, peak, of the process that packed", pack_peak, "MB", MEMORY_MB))
    return [*figures, Figure("annotation file", json_mb, "MB"), Figure("index file", index_mb, "MB")]

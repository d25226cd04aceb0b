"""``python -m base demo-data``: draw the embedded demo data set, a COCO folder of shapes, learnable in minutes.

Every image is a pure function of (seed, split, number): the same bytes for any number of processes.
"""

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from base.errors import UserError

VERSION = 1  # raise it when the drawing changes: older folders are then made again elsewhere
CATEGORIES = {1: "disc", 3: "square", 7: "triangle", 18: "star", 44: "ring"}  # ids with gaps, as COCO's
SPLITS = ("train2017", "val2017")
OVERSAMPLING = 3  # shapes are drawn this much larger, then reduced: smooth edges
ASIDE = 4  # pixels that shapes keep from each other, so that none hides another
EMPTY_SHARE, CROWD_SHARE = 0.02, 0.03  # of the images; besides, number 1 is always empty and number 2 always has a crowd


@dataclass(frozen=True)
class Shape:
    """One drawn object: its outline in image pixels, and for a ring the hole's outline."""

    category_id: int
    outline: np.ndarray  # (n, 2) x, y
    hole: np.ndarray | None

    def bbox(self) -> list[float]:
        low, high = self.outline.min(axis=0), self.outline.max(axis=0)
        return [round(float(value), 2) for value in (*low, *(high - low))]


def _area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _outline(name: str, turn: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline (n, 2), scaled so that its box's longer side is 1 and its top left corner is (0, 0); and a hole's."""
    corners = {"disc": 48, "ring": 48, "square": 4, "triangle": 3, "star": 10}[name]
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, 0.42, 1.0) if name == "star" else np.ones(corners)
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    low, side = points.min(axis=0), np.ptp(points, axis=0).max()
    return (points - low) / side, (points * 0.55 - low) / side if name == "ring" else None


def _dull(rng: np.random.Generator) -> np.ndarray:
    """Two greyish colours for the background: (2, 3) in 0..255."""
    return np.clip(rng.uniform(40, 215) + rng.uniform(-25, 25, (2, 3)), 0, 255)


def _vivid(rng: np.random.Generator, background: np.ndarray) -> tuple[int, int, int]:
    """A saturated colour at least 110 (of 441) away from the background's mean."""
    while True:
        colour = rng.permutation([rng.uniform(200, 255), rng.uniform(0, 60), rng.uniform(0, 255)])
        if np.linalg.norm(colour - background) >= 110:
            return tuple(int(value) for value in colour)


def _background(rng: np.random.Generator, width: int, height: int, pair: np.ndarray) -> Image.Image:
    """A gradient between two colours, with smooth noise."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    angle = rng.uniform(0, 2 * math.pi)
    share = ((x * math.cos(angle) + y * math.sin(angle)) / 2.83 + 0.5)[..., None]
    pixels = pair[0] * (1 - share) + pair[1] * share
    for cells, strength in ((5, 22), (24, 10)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / 255 - 0.5) * 2 * strength
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def _free(box: tuple[float, ...], taken: list[tuple[float, ...]]) -> bool:
    left, top, right, bottom = box
    return all(left >= r + ASIDE or right <= x - ASIDE or top >= b + ASIDE or bottom <= y - ASIDE for x, y, r, b in taken)


def _place(rng: np.random.Generator, width: int, height: int, taken: list, low: float, high: float) -> Shape | None:
    """A shape of a log-uniform size at a free place, or None after 30 attempts."""
    category_id = int(rng.choice(list(CATEGORIES)))
    for _ in range(30):
        side = min(width, height) * math.exp(rng.uniform(math.log(low), math.log(high)))
        unit, hole = _outline(CATEGORIES[category_id], rng.uniform(0, 2 * math.pi))
        extent = unit.max(axis=0) * side
        corner = np.array([rng.uniform(1, width - 1 - extent[0]), rng.uniform(1, height - 1 - extent[1])])
        box = (*corner, *(corner + extent))
        if _free(box, taken):
            taken.append(box)
            # Rounded here, so that box and polygon agree to the last digit.
            return Shape(category_id, np.round(unit * side + corner, 2), None if hole is None else hole * side + corner)
    return None


def _crowd(rng: np.random.Generator, width: int, height: int, taken: list) -> list[Shape]:
    """A cluster of many small shapes of one class in a rectangle of its own."""
    w, h = width * rng.uniform(0.35, 0.5), height * rng.uniform(0.35, 0.5)
    x, y = rng.uniform(1, width - 1 - w), rng.uniform(1, height - 1 - h)
    taken.append((x, y, x + w, y + h))
    category_id = int(rng.choice(list(CATEGORIES)))
    shapes = []
    for _ in range(24):
        side = rng.uniform(0.16, 0.24) * min(w, h)
        unit, hole = _outline(CATEGORIES[category_id], rng.uniform(0, 2 * math.pi))
        corner = np.array([rng.uniform(x, x + w - side), rng.uniform(y, y + h - side)])
        shapes.append(Shape(category_id, unit * side + corner, None if hole is None else hole * side + corner))
    return shapes


def _mask(shapes: list[Shape], width: int, height: int) -> Image.Image:
    """Coverage of the shapes at OVERSAMPLING times the size: 0 or 255."""
    mask = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    pen = ImageDraw.Draw(mask)
    for shape in shapes:  # PIL names a pixel by its centre, a box by its edges: hence the half
        for outline, value in ((shape.outline, 255), (shape.hole, 0)):
            if outline is not None:
                pen.polygon([tuple(point) for point in (outline * OVERSAMPLING - 0.5).tolist()], fill=value)
    return mask


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask (height, width): column by column, beginning with zeros."""
    flat = mask.flatten(order="F").astype(np.int8)
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    counts = np.diff(ends).tolist()
    return [0, *counts] if flat[0] else counts


def _annotate(shape: Shape) -> dict:
    polygon = [round(float(value), 2) for value in shape.outline.ravel()]
    area = _area(shape.outline) - (0 if shape.hole is None else _area(shape.hole))
    return {"category_id": shape.category_id, "bbox": shape.bbox(), "area": round(area, 2), "iscrowd": 0, "segmentation": [polygon]}


def draw(seed: int, split: int, number: int, size: int) -> tuple[bytes, int, int, list[dict]]:
    """One image: its JPEG bytes, height, width, and annotations without ids."""
    rng = np.random.default_rng([seed, split, number])
    width, height = (int(side) for side in rng.integers(round(size * 0.75), round(size * 1.25) + 1, 2))
    pair = _dull(rng)
    mean = pair.mean(axis=0)
    image = _background(rng, width, height, pair)
    taken, annotations, layers = [], [], []
    empty, crowd = rng.random() < EMPTY_SHARE or number == 1, rng.random() < CROWD_SHARE or number == 2
    if crowd and not empty:
        cluster = _crowd(rng, width, height, taken)
        layers += [([shape], _vivid(rng, mean)) for shape in cluster]
        covered = np.asarray(_mask(cluster, width, height).resize((width, height), Image.Resampling.BOX)) > 127
        ys, xs = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        bbox = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]
        runs = {"counts": _run_lengths(covered), "size": [height, width]}
        entry = {"category_id": cluster[0].category_id, "bbox": bbox, "area": int(covered.sum()), "iscrowd": 1, "segmentation": runs}
        annotations.append(entry)
    for position in range(0 if empty else int(rng.integers(1, 6))):
        high = 0.6 if position == 0 else 0.45  # later shapes must find room
        if shape := _place(rng, width, height, taken, 0.15, 0.3 if crowd else high):
            layers.append(([shape], _vivid(rng, mean)))
            annotations.append(_annotate(shape))
    for shapes, colour in layers:
        mask = _mask(shapes, width, height).resize((width, height), Image.Resampling.BOX)
        image.paste(colour, (0, 0), mask)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling=0)
    return out.getvalue(), height, width, annotations


def _make(job: tuple[Path, int, int, int, int]) -> tuple[str, int, int, list[dict]]:
    folder, seed, split, number, size = job
    content, height, width, annotations = draw(seed, split, number, size)
    name = f"{image_id(split, number):012d}.jpg"
    (folder / SPLITS[split] / name).write_bytes(content)
    return name, height, width, annotations


def image_id(split: int, number: int) -> int:
    """Ids with gaps, as COCO's; the two splits share none."""
    return 7 * number + 9 + 3 * split


def _annotation_file(folder: Path, split: int, made: list[tuple[str, int, int, list[dict]]]) -> Path:
    images, annotations = [], []
    for number, (name, height, width, entries) in enumerate(made):
        key = image_id(split, number)
        images.append({"id": key, "file_name": name, "height": height, "width": width})
        for entry in entries:
            annotations.append({"id": 100 + 3 * len(annotations), "image_id": key, **entry})
    categories = [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()]
    content = {"info": {"description": "drawn shapes"}, "images": images, "annotations": annotations, "categories": categories}
    file = folder / "annotations" / f"instances_{SPLITS[split]}.json"
    file.write_text(json.dumps(content, sort_keys=True))
    return file


@dataclass(frozen=True)
class Parameters:
    """What fixes every byte of a demo folder."""

    version: int
    train: int
    val: int
    size: int
    seed: int


def _finished(folder: Path, wanted: Parameters) -> bool:
    """Whether the folder already is the wanted data set; UserError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    fix = "name another folder with --data_dir, or move this one away"
    try:
        record = json.loads((folder / "demo.json").read_text())
        found, hashes = record["parameters"], record["sha256"]
        same = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in hashes.items())
        images = [len(list((folder / split).glob("*.jpg"))) for split in SPLITS]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} exists and holds no demo data ({type(error).__name__}: {error}); {fix}") from error
    if found != asdict(wanted):
        raise UserError(f"{folder} holds demo data of other parameters ({found}, wanted {asdict(wanted)}); {fix}")
    if not same or images != [wanted.train, wanted.val]:
        raise UserError(f"{folder} holds demo data that was changed since ({images} images, annotations {'un' * same}changed); {fix}")
    return True


def generate(
    folder: Path, train: int, val: int, size: int, seed: int, processes: int | None = None, log: Callable[[str], None] | None = None
) -> bool:
    """Make the demo data set; True if it was made, False if the folder already holds it.

    ``train`` and ``val`` count images (3 at least), ``size`` is the mean side in pixels (64 to 1024). The folder appears
    complete or not at all. Raises UserError for impossible parameters and for a folder with other content.
    """
    for name, value, low, high in (("train", train, 3, 10**6), ("val", val, 3, 10**6), ("size", size, 64, 1024), ("seed", seed, 0, 2**63)):
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; give a value from {low} to {high}")
    folder, log, wanted = Path(folder).absolute(), log or (lambda line: None), Parameters(VERSION, train, val, size, seed)
    if _finished(folder, wanted):
        return False
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name in (*SPLITS, "annotations"):
            (temporary / name).mkdir(parents=True)
        jobs = [(temporary, seed, split, number, size) for split, count in enumerate((train, val)) for number in range(count)]
        made = []
        processes = processes or len(os.sched_getaffinity(0))
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for done in pool.imap(_make, jobs, chunksize=16):
                made.append(done)
                if len(made) % 200 == 0 or len(made) == len(jobs):
                    log(f"drawn {len(made)} of {len(jobs)} images")
        files = [_annotation_file(temporary, 0, made[:train]), _annotation_file(temporary, 1, made[train:])]
        hashes = {f"annotations/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        (temporary / "demo.json").write_text(json.dumps({"parameters": asdict(wanted), "sha256": hashes}, indent=1) + "\n")
        if folder.exists():
            folder.rmdir()  # empty, or _finished would have refused it
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"demo data cannot be written to {folder} ({error}); free disk space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def main(arguments: list[str]) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m base demo-data", description="Draw the embedded demo data set.", formatter_class=formatter)
    parser.add_argument("--data_dir", "--data-dir", type=Path, default=Path("data/demo"), help="folder to make")
    parser.add_argument("--train", type=int, default=1200, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--size", type=int, default=160, help="mean side of an image in pixels")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other images")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    progress = lambda line: print(f"\r{line}", end="", file=sys.stderr, flush=True)  # noqa: E731
    made = generate(options.data_dir, options.train, options.val, options.size, options.seed, log=progress)
    if made:
        print(file=sys.stderr)
        print(f"made {options.data_dir}: {options.train} + {options.val} images in {time.perf_counter() - began:.1f} s")
    else:
        print(f"{options.data_dir} already holds this demo data")
    return 0

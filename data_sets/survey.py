"""What is found in one part of a data set: its boxes beside a model's default boxes, its image files, and tables of both."""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from base.backends.reference.images import BadImage, read_rgb
from rich.console import Console
from rich.progress import track

from base.boxes import DefaultBoxes
from data_sets.coco_json import ltrb_of
from data_sets.coverage import CHUNK, Group, best_overlaps, by_area, by_ratio, by_size, fits, groups
from data_sets.index import AnnotationIndex
from pages.text import shown

CHECKED = 200  # image files of a part that are read if not all are
REFUSED = ("missing", "unreadable", "another aspect ratio than recorded")  # by training; the boxes fit what has only another size
LONGEST = 300  # characters about one file
SCALED = "another size than recorded, same aspect ratio: used"


@dataclass(frozen=True, eq=False)
class Part:
    """One of the data set's two parts, and what was found in it. B boxes."""

    name: str  # train or val
    index: AnnotationIndex
    images: Path  # folder
    boxes: np.ndarray  # float32 (B, 4) ltrb in [0, 1], as training has them, crowd included
    fit: np.ndarray  # bool (B,): overlaps a default box by more than the matcher's threshold
    checked: int  # image files that were read
    bad: dict[str, list[str]]  # what is wrong → the files, with why

    @property
    def boxes_an_image(self) -> np.ndarray:
        return np.diff(self.index.first_box)

    @property
    def boxes_a_class(self) -> np.ndarray:
        return np.bincount(self.index.labels, minlength=len(self.index.category_ids) + 1)[1:]

    @property
    def image_of_box(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.index)), self.boxes_an_image)

    def groups(self, image_size: tuple[int, int]) -> dict[str, list[Group]]:
        """Its boxes by what decides whether a default box fits them."""
        return {
            "all boxes": groups(["all"], np.zeros(len(self.boxes), dtype=int), self.fit),
            "by COCO's area": by_area(self.index.areas, self.fit),
            f"by √area in pixels at {image_size[0]}×{image_size[1]}": by_size(self.boxes, image_size, self.fit),
            "by width : height": by_ratio(self.boxes, image_size, self.fit),
        }


def look(name: str, index: AnnotationIndex, images: Path, defaults: DefaultBoxes, check_all: bool, seed: int, quiet: bool) -> Part:
    """Reads one part of a data set: its boxes beside the default boxes, and its image files, all or some."""
    boxes = ltrb_of(index.boxes, np.repeat(index.sizes, np.diff(index.first_box), axis=0))

    def bar(steps: Iterator, total: int, text: str) -> Iterator:
        return track(steps, f"{name}: {text}", total, console=Console(stderr=True), transient=True, disable=quiet)

    best = [np.zeros(0, dtype=np.float32), *bar(best_overlaps(boxes, defaults), -(-len(boxes) // CHUNK), "default boxes")]
    which = range(len(index))
    if not check_all and len(index) > CHECKED:
        which = sorted(np.random.default_rng(seed).choice(len(index), CHECKED, replace=False).tolist())
    bad: dict[str, list[str]] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # decoding releases the interpreter's lock
    try:
        files = pool.map(lambda i: fault_of(images, index.file_name(i), tuple(index.sizes[i].tolist())), which)
        for kind, text in filter(None, bar(files, len(which), "image files")):
            bad.setdefault(kind, []).append(text)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return Part(name, index, images, boxes, fits(np.concatenate(best)), len(which), bad)


def fault_of(folder: Path, file_name: str, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with an image file, if anything: (kind, the file and why). ``size``: recorded height, width."""
    try:
        picture = read_rgb(folder / file_name, size)
    except BadImage as error:
        cause = error.__cause__  # the reader's own finding, the aspect ratio, has none
        kind = REFUSED[2] if cause is None else REFUSED[0] if isinstance(cause, FileNotFoundError) else REFUSED[1]
        return kind, shown(f"{file_name}: {error.reason}", LONGEST)
    if (picture.height, picture.width) != size:
        return SCALED, shown(f"{file_name}: is {picture.width}×{picture.height}, but the annotations say {size[1]}×{size[0]}", LONGEST)
    return None


def facts(part: Part) -> dict[str, str]:
    """What a part holds, in figures."""
    index, counts = part.index, part.boxes_an_image
    heights, widths = index.sizes.T
    spans = {"width of an image, pixels": widths, "height of an image, pixels": heights, "boxes an image": counts}
    return {
        "images": f"{len(index):,}",
        "images with boxes": f"{int((counts > 0).sum()):,}",
        "boxes": f"{len(index.boxes):,}",
        "of them crowd": f"{int(index.crowd.sum()):,}",
        "classes": f"{len(index.category_ids):,}",
        "classes without a box": f"{int((part.boxes_a_class == 0).sum()):,}",
        **{name: f"{values.min():,} to {values.max():,}, median {np.median(values):,.0f}" for name, values in spans.items()},
        "boxes an image, mean": f"{counts.mean():.2f}",
    }


def facts_table(parts: Sequence[Part]) -> tuple[list[str], list[list[str]]]:
    """`facts` of all parts: the head and the rows of a table."""
    columns = [facts(part) for part in parts]
    return ["", *(part.name for part in parts)], [[name, *(column[name] for column in columns)] for name in columns[0]]


def class_table(parts: Sequence[Part]) -> tuple[list[str], list[list[str]]]:
    """Boxes and images of each class with boxes, and the share of its boxes that a default box fits, the commonest class first."""
    found: dict[tuple[int, str], dict[str, tuple[Group, int]]] = {}
    for part in parts:
        index = part.index
        names = ["", *index.category_names]
        pairs = np.unique(part.image_of_box * len(names) + index.labels)  # each image once for each of its classes
        images = np.bincount(pairs % len(names), minlength=len(names)).tolist()
        for key, row, count in list(zip([0, *index.category_ids.tolist()], groups(names, index.labels, part.fit), images, strict=True))[1:]:
            if row.boxes:
                found.setdefault((key, row.name), {})[part.name] = (row, count)
    rows = []
    for (_, name), row in sorted(found.items(), key=lambda item: -sum(group.boxes for group, _ in item[1].values())):
        cells = [(f"{row[p.name][0].boxes:,}", f"{row[p.name][1]:,}", row[p.name][0].share) if p.name in row else ("0", "0", "–") for p in parts]
        rows.append([shown(name, 30), *itertools.chain(*cells)])
    return ["class", *(f"{part.name} {column}" for part in parts for column in ("boxes", "images", "fit"))], rows


def fit_table(parts: Sequence[Part], image_size: tuple[int, int]) -> tuple[list[str], list[list[str]]]:
    """How many boxes of each group a default box fits."""
    rows = []
    for name, columns in zip(parts[0].groups(image_size), zip(*(part.groups(image_size).values() for part in parts), strict=True), strict=True):
        rows.append([name, *[""] * 2 * len(parts)])
        some = [row for row in zip(*columns, strict=True) if any(group.boxes for group in row)]
        rows += [[f"  {row[0].name}", *itertools.chain(*((f"{group.boxes:,}", group.share) for group in row))] for row in some]
    return ["boxes", *(f"{part.name} {column}" for part in parts for column in ("boxes", "fit"))], rows


def ends(rows: list[list[str]], most: int) -> list[list[str]]:
    """The first and the last rows of a longer table, and how many are between."""
    if len(rows) <= most:
        return rows
    return [*rows[: most // 2], [f"… {len(rows) - most // 2 * 2:,} more", *[""] * (len(rows[0]) - 1)], *rows[-(most // 2) :]]

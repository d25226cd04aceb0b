"""How well the default boxes of a model fit the boxes of a data set: for each box the largest IoU with any default box."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from base.backends.reference.matcher import THRESHOLD
from base.backends.reference.model import feature_sizes

from base.boxes import BOXES_PER_CELL, DefaultBoxes, default_boxes

CHUNK = 1 << 15  # boxes at a time: some 20 MB of intermediate arrays
AREA_CLASSES = {"small": 0, "medium": 32**2, "large": 96**2}  # COCO's: from so many square pixels of the original image on
RATIOS = {"under 1:4": 0, "1:4 to 1:2": 1 / 4, "1:2 to 1:1.4": 1 / 2, "1:1.4 to 1.4:1": 0.5**0.5, "1.4:1 to 2:1": 2**0.5,
          "2:1 to 4:1": 2, "over 4:1": 4}  # width : height, from  # fmt: skip
BY_FORCE = (
    "A box that does not fit is matched only by force, to the one default box that it overlaps most, however badly; "
    "where many do not, training sees few and poor positives: try a larger image or smaller strides."
)


class Group(NamedTuple):
    """Some boxes of a data set, and how many of them overlap a default box by more than the matcher's threshold."""

    name: str
    boxes: int
    fit: int

    @property
    def share(self) -> str:
        """The share of boxes that fit, for a person."""
        return f"{self.fit / self.boxes:.1%}" if self.boxes else "–"


def model_boxes(image_size: tuple[int, int], strides: Sequence[int]) -> DefaultBoxes:
    """The default boxes of a model, without its weights. Raises UserError for a size or strides that leave no feature map."""
    return default_boxes(image_size, feature_sizes(image_size, strides))


def best_overlaps(boxes: np.ndarray, defaults: DefaultBoxes) -> Iterator[np.ndarray]:
    """The largest IoU of each box (n, 4) ltrb in [0, 1] with any default box, float32, CHUNK boxes at a time.

    For a default box of one shape the IoU falls as its centre moves away, in x and in y independently. So of each shape
    only the box with the nearest centre is looked at: some thirty instead of thousands.
    """
    levels, start = [], 0
    for (rows, columns), shapes in zip(defaults.feature_sizes, BOXES_PER_CELL, strict=True):
        part = slice(start, start + rows * columns * shapes)
        xywh, ltrb = (values[part].reshape(rows, columns, shapes, 4).numpy() for values in (defaults.xywh, defaults.ltrb))
        levels.append((xywh[0, :, 0, 0], xywh[:, 0, 0, 1], ltrb))  # all shapes of a cell have one centre
        start = part.stop
    for first in range(0, len(boxes), CHUNK):
        some = boxes[first : first + CHUNK]
        x, y = ((some[:, :2] + some[:, 2:]) / 2).T
        best = np.zeros(len(some), dtype=np.float32)
        for xs, ys, ltrb in levels:
            near = ltrb[_nearest(ys, y), _nearest(xs, x)]  # (n, shapes, 4)
            np.maximum(best, _overlap(some[:, None], near).max(1), out=best)
        yield best


def _nearest(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Position of the value in ``ascending`` that is nearest to each of ``values``."""
    return np.searchsorted((ascending[1:] + ascending[:-1]) / 2, values)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (…, 4) ltrb, pair by pair; `base.boxes.iou` takes each with each."""
    shared = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    return shared / (area_a + area_b - shared)


def fits(best: np.ndarray) -> np.ndarray:
    """Whether the matcher finds a default box for a box without force, had the image no other box."""
    return best > THRESHOLD


def groups(names: Sequence[str], numbers: np.ndarray, fit: np.ndarray) -> list[Group]:
    """Boxes counted by the number (n,) of their group."""
    everything, fitting = (np.bincount(some, minlength=len(names)).tolist() for some in (numbers, numbers[fit]))
    return [Group(*row) for row in zip(names, everything, fitting, strict=True)]


def by_area(areas: np.ndarray, fit: np.ndarray) -> list[Group]:
    """By COCO's classes of recorded area."""
    return groups(list(AREA_CLASSES), np.digitize(areas, list(AREA_CLASSES.values())[1:]), fit)


def by_size(boxes: np.ndarray, image_size: tuple[int, int], fit: np.ndarray) -> list[Group]:
    """By the square root of the area in pixels of the resized image, in octaves up to the image's own; under 4 pixels together."""
    height, width = image_size
    side = np.sqrt((boxes[:, 2:] - boxes[:, :2]).astype(np.float64).prod(-1) * height * width)
    last = max(2, math.floor(math.log2(height * width) / 2))
    octave = np.clip(np.floor(np.log2(side)).astype(int), 1, last) - 1
    return groups(["under 4", *(f"{2**power} to {2 ** (power + 1)}" for power in range(2, last + 1))], octave, fit)


def by_ratio(boxes: np.ndarray, image_size: tuple[int, int], fit: np.ndarray) -> list[Group]:
    """By width : height in pixels of the resized image."""
    height, width = image_size
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    return groups(list(RATIOS), np.digitize(w * width / (h * height), list(RATIOS.values())[1:]), fit)

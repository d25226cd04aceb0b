"""What worker processes do for the DALI loader: look at the files' headers, draw, and write down what DALI is to make."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from base.backends.reference import augment as rules
from base.backends.reference import loader as reference
from base.backends.reference.images import DAMAGE, aspect_fits, orientation
from PIL import Image

from base.contracts import Batch
from base.sampling import sample_rng

from .jitter import JITTER, NEUTRAL

MOST_REDUCED = 4  # times; beyond that a picture's edges show that DALI repeats the last row where PIL shortens the filter
END_OF_IMAGE = b"\xff\xd9"


class Order(NamedTuple):
    """What DALI is to make of one file, in the place of a sample's picture."""

    number: int  # of the image
    path: bytes
    start: tuple[int, int]  # x, y of the crop in pixels of the file
    shape: tuple[int, int]  # its width, height
    flip: bool
    amounts: np.ndarray | None  # as in `jitter`, of one picture; None: evaluation
    order: np.ndarray | None


class Work(NamedTuple):
    """A batch of N samples, but for the pictures that DALI makes."""

    keys: list[tuple[int, int]]
    collated: tuple[Batch | None, list, int]  # as of the reference's `collate`, without pictures
    orders: list[Order]  # in the order of the batch
    others: dict[int, np.ndarray]  # place in the batch → finished picture, uint8 (H, W, 3)


def draw(boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator, max_samples: int) -> tuple:
    """What the reference's `augment` draws, and what it makes of boxes float64 (M, 4) and labels (M).

    → (crop as ltrb in [0, 1], flip, amounts and order of the jitter, boxes float32, labels).
    """
    crop, kept = rules.random_crop(boxes, rng, max_samples)
    boxes, labels = rules.clip_to_crop(boxes[kept], crop), labels[kept]
    flip = bool(rng.random() < rules.FLIP_PROBABILITY)
    if flip:
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    boxes = np.clip(boxes, 0, 1).astype(np.float32)
    thick = (boxes[:, :2] < boxes[:, 2:]).all(1)
    amounts = rng.uniform(NEUTRAL - JITTER, NEUTRAL + JITTER)
    return crop, flip, amounts, rng.permutation(len(JITTER)), boxes[thick], labels[thick]


def jpeg_size(path: Path, recorded: tuple[int, int]) -> tuple[int, int] | None:
    """(width, height) of a file, if it is a JPEG that every decoder shows as the reference does; None if it may not be.

    ``recorded``: (height, width) of the annotations.
    """
    try:
        with Image.open(path, formats=("JPEG",)) as file:
            colours = file.mode == "L" or (file.mode == "RGB" and [layer[0] for layer in file.layer] != list(b"RGB"))
            plain = colours and file.info.get("adobe_transform", 1) == 1 and orientation(file) == 1
            file.fp.seek(-len(END_OF_IMAGE), os.SEEK_END)
            whole = file.fp.read() == END_OF_IMAGE
            return file.size if plain and whole and aspect_fits(file.size, recorded) else None
    except DAMAGE:
        return None  # the reference says what is wrong with it


class DaliSamples(reference.Samples):
    """The reference's samples, with an `Order` in the place of the picture where DALI is to make it."""

    refused: frozenset[int] = frozenset()  # numbers of images that DALI turned out unable to decode

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return key, self.find(key)

    def sample(self, epoch: int, number: int) -> tuple:
        image_id, recorded = int(self.index.image_ids[number]), self.index.sizes[number]
        path = self.image_dir / self.index.file_name(number)
        size = None if number in self.refused else jpeg_size(path, tuple(recorded.tolist()))
        if size is None:
            return super().sample(epoch, number)
        boxes, labels = self.index.ltrb(number)
        start, shape, flip, amounts, order = (0, 0), size, False, None, None
        if epoch >= 0:
            rng = sample_rng(self.seed, epoch, image_id)
            crop, flip, amounts, order, boxes, labels = draw(boxes.astype(np.float64), labels, rng, self.max_samples)
            left, top, right, bottom = (int(edge * side) for edge, side in zip(crop, size * 2, strict=True))
            start, shape = (left, top), (max(right - left, 1), max(bottom - top, 1))
        if any(side > MOST_REDUCED * wanted for side, wanted in zip(shape, self.size[::-1], strict=True)):
            return super().sample(epoch, number)
        return Order(number, os.fsencode(path), start, shape, flip, amounts, order), boxes, labels, image_id, recorded


def pack(keyed: list[tuple]) -> Work:
    """(key, sample) of `DaliSamples` → a batch's work."""
    keys, samples = zip(*keyed, strict=True)
    pictures = [sample[0] for sample in samples if sample[0] is not None]  # None: no readable image was found
    without = [sample if sample[0] is None else (np.empty(0, np.uint8), *sample[1:]) for sample in samples]
    orders = [picture for picture in pictures if isinstance(picture, Order)]
    others = {place: picture for place, picture in enumerate(pictures) if not isinstance(picture, Order)}
    return Work(list(keys), reference.collate(without), orders, others)

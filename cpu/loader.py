"""Loading with native code in threads: the reference's samples, decoded, cropped, resized and changed in one call.

The draws, the order of images and what becomes of bad files are the reference's, whose `PlainLoader` this builds on. Native
code writes each sample to its place in the batch and does not hold the GIL, so threads do what processes would: without
their memory, their shared memory, and the copies between them.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from base.backends.reference import augment as rules
from base.backends.reference import loader as reference
from base.backends.reference.images import BadImage, read_rgb

from base.contracts import Batch
from base.sampling import sample_rng

from . import _images

AHEAD = 2  # batches that each thread may be ahead of the receiver
JITTER = np.array([rules.BRIGHTNESS, rules.CONTRAST, rules.SATURATION, rules.HUE])
NEUTRAL = np.array([1, 1, 1, 0])
RULES = _images.Rules(rules.MINIMUM_IOUS, rules.FLIP_PROBABILITY, NEUTRAL - JITTER, NEUTRAL + JITTER)


class NativeSamples(reference.Samples):
    """The reference's samples, written into a batch."""

    def batch(self, keys: list[tuple[int, int]]) -> tuple[Batch | None, list, int]:
        """All samples of a batch → what reference's `collate` makes of them. The GIL is free while native code has the files."""
        images = np.empty((len(keys), *self.size, 3), np.uint8)  # NumPy asks for huge pages
        samples = [self.draw(epoch, self.pool[position]) for epoch, position in keys]
        paths, sizes = [as_bytes(path) for path, *_ in samples], [size for *_, size in samples]
        done = _images.render_files(paths, images, [drawn for _, drawn, *_ in samples], sizes)
        found, rows, bad = [], [], []
        for row, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            if done[row] > 0:
                _, _, *rest = sample
            else:  # not for native code, or bad
                *rest, passed_over = self.find(key, images, row)
                bad += passed_over
                if rest[0] is None:
                    continue
            found.append(rest)
            rows.append(row)
        if not found:
            return None, bad, len(keys)
        if len(rows) < len(keys):
            images = images[rows]
        boxes, labels, ids, sizes = zip(*found, strict=True)
        longest = max(1, *map(len, labels))
        padded_boxes, padded_labels = np.zeros((len(found), longest, 4), np.float32), np.zeros((len(found), longest), np.int64)
        for row, (some, kinds) in enumerate(zip(boxes, labels, strict=True)):
            padded_boxes[row, : len(some)], padded_labels[row, : len(kinds)] = some, kinds
        arrays = images, padded_boxes, padded_labels, np.array(ids, np.int64), np.array(sizes, np.int64)
        return Batch(*map(torch.from_numpy, arrays)), bad, len(keys) - len(found)

    def draw(self, epoch: int, number: int) -> tuple:
        """→ (path, what was drawn, boxes, labels, image id, recorded (height, width)) of a sample; nothing is drawn for evaluation."""
        image_id, size = int(self.index.image_ids[number]), tuple(self.index.sizes[number].tolist())
        boxes, labels = self.index.ltrb(number)
        drawn = None
        if epoch >= 0:
            drawn = _images.draw(sample_rng(self.seed, epoch, image_id), boxes, self.max_samples, RULES)
            boxes, labels = drawn.boxes, labels[drawn.kept]
        return self.image_dir / self.index.file_name(number), drawn, boxes, labels, image_id, size

    def sample(self, epoch: int, number: int, batch: np.ndarray, row: int) -> tuple:
        """Renders one sample into ``batch[row]`` → (boxes, labels, image id, size)."""
        path, drawn, *rest, size = self.draw(epoch, number)
        render(path, batch, row, drawn, size)
        return *rest, size


def as_bytes(path: Path) -> bytes:
    """For the system; empty if no file can have this name."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return b""


def render(path: Path, batch: np.ndarray, row: int, drawn, recorded: tuple[int, int]) -> None:
    """An image file → ``batch[row]``, uint8 (H, W, 3): as drawn, or only resized (None). Raises BadImage.

    Native code reads whole and plain JPEG files. All others go through the reference's reader, which also decides what is bad.
    """
    (done,) = _images.render_files([as_bytes(path)], batch[row : row + 1], [drawn], [recorded])
    if done == _images.TOO_MANY_SCANS:
        raise BadImage(path, f"cannot be decoded: it has more than {_images.MAX_SCANS} scans")
    if done > 0:
        return
    picture = read_rgb(path, recorded)
    if not _images.render_array(np.asarray(picture), batch, row, drawn):  # more than 30 times as large: PIL's sums are wider
        height, width = batch.shape[1:3]
        edges = (0, 0, 1, 1) if drawn is None else drawn.crop
        left, top, right, bottom = (int(edge * side) for edge, side in zip(edges, picture.size * 2, strict=True))
        picture = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
        picture = rules.resize(picture, (height, width))
        whole = drawn and _images.Sample((0, 0, 1, 1), drawn.flip, drawn.order, drawn.amounts)
        _images.render_array(np.asarray(picture), batch, row, whole)


class NativeLoader(reference.PlainLoader):
    """The reference's loader ``plain``, with native samples made by ``workers`` threads; 0: in the caller's own."""

    def __init__(self, plain: reference.PlainLoader, workers: int, epoch: int):
        samples = NativeSamples(**vars(plain.loader.dataset))
        super().__init__(samples, plain.plan, workers=0, gaps=plain.gaps, epoch=epoch)
        self.samples, self.ahead = samples, AHEAD * workers
        self.pool = ThreadPoolExecutor(workers, "loader") if workers else None

    def results(self) -> Iterator[tuple[Batch | None, list, int]]:
        if self.pool is None:
            yield from map(self.samples.batch, self.sampler)
            return
        keys = iter(list(self.sampler))  # a new epoch may be chosen while this one is left early
        waiting = deque(self.pool.submit(self.samples.batch, some) for some in islice(keys, self.ahead))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(self.pool.submit(self.samples.batch, some) for some in islice(keys, 1))
                yield done
        finally:
            for batch in waiting:
                batch.cancel()


def train_loader(*, workers: int, epoch: int = 0, **options) -> NativeLoader:
    """Augmented batches of the images with boxes; arguments as `base.contracts.MakeTrainLoader`."""
    return NativeLoader(reference.train_loader(workers=0, epoch=epoch, **options), workers, epoch)


def eval_loader(*, workers: int, **options) -> NativeLoader:
    """Batches of all images, resized only; arguments as `base.contracts.MakeEvalLoader`."""
    return NativeLoader(reference.eval_loader(workers=0, **options), workers, epoch=0)

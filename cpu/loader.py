"""Loading with native code in worker processes: the reference's samples, decoded, cropped, resized and changed in one call.

The draws, the order of images and what becomes of bad files are the reference's, whose `PlainLoader` this builds on. A
worker writes its images straight into a batch in shared memory, which the receiver maps; nothing is copied or pickled.
The small arrays of a batch travel beside it.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from base.backends.reference import augment as rules
from base.backends.reference import loader as reference
from base.backends.reference.images import BadImage, read_rgb
from torch import Tensor
from torch.utils.data import get_worker_info

from base.contracts import Batch
from base.errors import UserError
from base.sampling import sample_rng

from . import _images

SHARED_MEMORY = Path("/dev/shm")
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # what Ctrl-C and torchrun send to a rank's whole process group
JITTER = np.array([rules.BRIGHTNESS, rules.CONTRAST, rules.SATURATION, rules.HUE])
NEUTRAL = np.array([1, 1, 1, 0])
RULES = _images.Rules(rules.MINIMUM_IOUS, rules.FLIP_PROBABILITY, NEUTRAL - JITTER, NEUTRAL + JITTER)


class NativeSamples(reference.Samples):
    """The reference's samples, written into a batch: ``batch[row]`` is where the next one goes."""

    batch: np.ndarray
    row: int

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[tuple | None, list, int]:
        """All samples of a batch → (images, boxes, labels, image ids, sizes), bad files, samples lost; as reference's `collate`."""
        images = batch_memory(len(keys), *self.size)
        self.batch, self.row, found, bad = images.numpy(), 0, [], []
        for key in keys:
            *sample, passed_over = self[key]
            bad += passed_over
            if sample[0] is not None:
                found.append(sample)
                self.row += 1
        del self.batch
        if not found:
            return None, bad, len(keys)
        _, boxes, labels, ids, sizes = zip(*found, strict=True)
        longest = max(1, *map(len, labels))
        padded_boxes, padded_labels = np.zeros((len(found), longest, 4), np.float32), np.zeros((len(found), longest), np.int64)
        for row, (some, kinds) in enumerate(zip(boxes, labels, strict=True)):
            padded_boxes[row, : len(some)], padded_labels[row, : len(kinds)] = some, kinds
        rest = padded_boxes, padded_labels, np.array(ids, np.int64), np.array(sizes, np.int64)
        return (images[: len(found)], *rest), bad, len(keys) - len(found)

    def sample(self, epoch: int, number: int) -> tuple:
        image_id, size = int(self.index.image_ids[number]), self.index.sizes[number]
        boxes, labels = self.index.ltrb(number)
        drawn = None
        if epoch >= 0:
            drawn = _images.draw(sample_rng(self.seed, epoch, image_id), boxes, self.max_samples, RULES)
            boxes, labels = drawn.boxes, labels[drawn.kept]
        render(self.image_dir / self.index.file_name(number), self.batch, self.row, drawn, tuple(size.tolist()))
        return self.row, boxes, labels, image_id, size


def batch_memory(count: int, height: int, width: int) -> Tensor:
    """uint8 (count, height, width, 3), not yet filled; in a worker shared memory, so that the batch is only mapped by its receiver."""
    shape = count, height, width, 3
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * height * width * 3)  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def render(path: Path, batch: np.ndarray, row: int, drawn, recorded: tuple[int, int]) -> None:
    """An image file → ``batch[row]``, uint8 (H, W, 3): as drawn, or only resized (None). Raises BadImage.

    Native code reads whole and plain JPEG files. All others go through the reference's reader, which also decides what is bad.
    """
    try:
        done = _images.render_file(os.fspath(path), batch, row, drawn, recorded, exact=drawn is None)
    except (ValueError, UnicodeEncodeError):  # a name that no file can have
        done = -1
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
    """The reference's loader ``plain``, with native samples and ``workers`` processes."""

    def __init__(self, plain: reference.PlainLoader, workers: int, epoch: int):
        samples = NativeSamples(**vars(plain.loader.dataset))
        super().__init__(samples, plain.plan, workers, plain.gaps, epoch)
        self.loader.collate_fn, self.loader.worker_init_fn = as_it_is, begin_worker
        if workers > 0:
            largest = max(map(len, self.sampler.batches), default=0)
            check_shared_memory((workers * self.loader.prefetch_factor + 2) * largest * samples.size[0] * samples.size[1] * 3)

    def __iter__(self) -> Iterator[Batch]:
        for images, *rest in super().__iter__():
            yield Batch(images, *map(torch.from_numpy, rest))

    def _started(self) -> Iterator:
        """Workers are born with these signals held back, so that none ends one that has not yet left the process group."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            return super()._started()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(worker: int) -> None:
    reference.leave_group(worker)
    while signal.sigtimedwait(GROUP_SIGNALS, 0):  # meant for the group
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def as_it_is(found: tuple) -> tuple:
    return found


def check_shared_memory(needed: int) -> None:
    """Raises UserError if shared memory has less than ``needed`` bytes left: a worker that writes beyond it is killed."""
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system keeps it elsewhere
        return
    if (left := about.f_bavail * about.f_frsize) < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {left / 1e6:,.0f} MB left, and the batches of the loader's processes need {needed / 1e6:,.0f} MB; "
            "give the container more (docker run --shm-size=8g), or use fewer --workers (0: none) or a smaller --batch_size"
        )


def train_loader(*, workers: int, epoch: int = 0, **options) -> NativeLoader:
    """Augmented batches of the images with boxes; arguments as `base.contracts.MakeTrainLoader`."""
    return NativeLoader(reference.train_loader(workers=0, epoch=epoch, **options), workers, epoch)


def eval_loader(*, workers: int, **options) -> NativeLoader:
    """Batches of all images, resized only; arguments as `base.contracts.MakeEvalLoader`."""
    return NativeLoader(reference.eval_loader(workers=0, **options), workers, epoch=0)

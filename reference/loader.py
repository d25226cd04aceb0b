"""Loading with PIL in worker processes of torch's DataLoader.

The workers are forked, where that is the system's way, from a process that may have threads by then. They touch neither
its accelerator nor its process groups, and torch gives each one thread, so that no lock of a lost thread is waited for.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from base.contracts import Batch
from base.errors import LostProcess, UserError
from base.sampling import eval_shard, sample_rng, train_shard
from data_sets.index import AnnotationIndex

from .augment import augment, resize
from .images import BadImage, read_rgb

REPLACEMENTS = 100  # images tried, itself the first, in the place of one that cannot be read


class Samples(Dataset):
    """Samples by key (epoch, position in ``pool``), a plain tuple each; epoch -1 is evaluation: resized only.

    ``pool`` holds the numbers of the images that take part.
    """

    def __init__(
        self,
        index: AnnotationIndex,
        image_dir: str | Path,
        pool: np.ndarray,
        size: tuple[int, int],
        seed: int,
        max_samples: int,
        skip: bool,
    ):
        self.index, self.image_dir, self.pool, self.size = index, Path(image_dir), pool, tuple(size)
        self.seed, self.max_samples, self.skip = seed, max_samples, skip

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        return self.find(key)

    def find(self, key: tuple[int, int], *where) -> tuple:
        """`sample` of the key's image or, when skipping, of the next that can be read, and the bad files passed over."""
        epoch, position = key
        bad = []
        tries = min(REPLACEMENTS, len(self.pool)) if self.skip and epoch >= 0 else 1
        for candidate in range(position, position + tries):
            try:
                return (*self.sample(epoch, self.pool[candidate % len(self.pool)], *where), bad)
            except BadImage as error:
                bad.append((error.path, error.reason))
        return (None, bad)

    def sample(self, epoch: int, number: int) -> tuple:
        image_id, size = int(self.index.image_ids[number]), self.index.sizes[number]
        image = read_rgb(self.image_dir / self.index.file_name(number), tuple(size.tolist()))
        boxes, labels = self.index.ltrb(number)
        if epoch < 0:
            image = resize(image, self.size)
        else:
            rng = sample_rng(self.seed, epoch, image_id)
            image, boxes, labels = augment(image, boxes.astype(np.float64), labels, self.size, rng, self.max_samples)
        return np.asarray(image), boxes, labels, image_id, size


def collate(samples: list[tuple]) -> tuple[Batch | None, list, int]:
    """Samples → (Batch, bad files, samples lost); boxes padded to the longest of the batch, to at least one."""
    bad = [file for sample in samples for file in sample[-1]]
    lost = sum(sample[0] is None for sample in samples)
    samples = [sample for sample in samples if sample[0] is not None]
    if not samples:
        return None, bad, lost
    images, boxes, labels, ids, sizes, _ = zip(*samples, strict=True)
    longest = max(1, *map(len, labels))
    padded_boxes, padded_labels = torch.zeros(len(samples), longest, 4), torch.zeros(len(samples), longest, dtype=torch.long)
    for row, (b, c) in enumerate(zip(boxes, labels, strict=True)):
        padded_boxes[row, : len(b)], padded_labels[row, : len(c)] = torch.from_numpy(b), torch.tensor(c)
    images, sizes = torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(sizes)).long()
    return Batch(images, padded_boxes, padded_labels, torch.tensor(ids), sizes), bad, lost


class Plan:
    """A batch sampler: the keys of the current epoch's batches. Workers stay alive over epochs, as keys carry the epoch."""

    def __init__(self, batches: list[list]):
        self.batches = batches

    def __iter__(self) -> Iterator[list]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def leave_group(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach a rank's whole process group; only the rank acts on them, and ends its workers."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PlainLoader:
    """`base.contracts.Loader` over `Samples`; ``plan(epoch)`` gives the keys of an epoch's batches.

    ``gaps``: a batch may lack samples that cannot be read.
    """

    def __init__(self, samples: Samples, plan: Callable[[int], list[list]], workers: int, gaps: bool, epoch: int = 0):
        self.plan, self.gaps, self.bad_images = plan, gaps, {}
        self.sampler = Plan(plan(epoch))
        self.batches = len(self.sampler)
        self.skip = samples.skip
        self.loader = DataLoader(
            samples,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=leave_group,
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses what the next iteration gives: the batches of ``epoch`` from ``first_batch`` on."""
        self.sampler.batches = self.plan(epoch)[first_batch:]

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError naming the file that cannot be read, or LostProcess the worker that died."""
        for batch, bad, lost in self.results():
            if lost and not self.gaps:
                path, reason = bad[0]
                if self.skip:
                    raise UserError(f"none of up to {REPLACEMENTS} images in a row can be read, such as {path}: {reason}; mend the data set")
                raise UserError(f"image {path}: {reason}; mend or remove it, or pass --skip-bad-images to go on without it")
            self.bad_images.update(bad)
            if batch is not None:
                yield batch

    def results(self) -> Iterator[tuple[Batch | None, list, int]]:
        """What `collate` makes of each batch's keys, in their order."""
        batches = self._started()
        while True:
            try:
                found = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):  # anything else is an error within a worker
                    raise
                raise LostProcess(f"a loader process ended unexpectedly (out of memory, or killed): {error}") from error
            yield found

    def _started(self) -> Iterator:
        """The DataLoader's iterator, with this process's handling of SIGCHLD kept.

        torch's own would raise a worker's death wherever the main thread is, such as in the middle of a training step.
        Without it, waiting for the next batch notices the death, within five seconds.
        """
        if threading.current_thread() is not threading.main_thread():
            return iter(self.loader)
        own = signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        signal.signal(signal.SIGCHLD, own if own is not None else signal.SIG_DFL)
        return batches


def train_loader(
    *,
    annotation_file: str | Path,
    image_dir: str | Path,
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
    seed: int,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    max_samples: int = 1,
    skip_bad_images: bool = False,
) -> PlainLoader:
    """Augmented batches of the images with boxes; see `base.contracts.MakeTrainLoader`.

    With ``skip_bad_images`` a file that cannot be read is replaced by the next readable image of the data set.
    """
    index = AnnotationIndex.open(annotation_file)
    with_boxes = np.flatnonzero(np.diff(index.first_box))

    def plan(epoch: int) -> list[list]:
        shard = train_shard(len(with_boxes), seed, epoch, batch_size, rank, world_size)
        return [[(epoch, position) for position in batch] for batch in shard.tolist()]

    samples = Samples(index, image_dir, with_boxes, image_size, seed, max_samples, skip_bad_images)
    return PlainLoader(samples, plan, workers, gaps=False, epoch=epoch)


def eval_loader(
    *,
    annotation_file: str | Path,
    image_dir: str | Path,
    image_size: tuple[int, int],
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    skip_bad_images: bool = False,
) -> PlainLoader:
    """Batches of all images, resized only; see `base.contracts.MakeEvalLoader`. A skipped image just has no detections."""
    index = AnnotationIndex.open(annotation_file)
    shard = eval_shard(len(index), batch_size, rank, world_size)
    samples = Samples(index, image_dir, np.arange(len(index)), image_size, 0, 1, skip_bad_images)
    return PlainLoader(samples, lambda epoch: [[(-1, position) for position in batch] for batch in shard], workers, gaps=skip_bad_images)

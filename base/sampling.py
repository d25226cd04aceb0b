"""Which images a rank sees, in which order, with which random draws: pure functions of seed, epoch and image id.

So neither workers, ranks nor a restart change a sample, and a run resumes exactly without saving a loader's state.
"""

import numpy as np

from base.errors import UserError


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled order of an epoch: int64 (images), a permutation of 0…images-1."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def sample_rng(seed: int, epoch: int, image_id: int) -> np.random.Generator:
    """The random numbers of one image's augmentation in one epoch."""
    return np.random.default_rng([seed, epoch, image_id % 2**64])  # ids may be negative, seeds may not


def train_shard(images: int, seed: int, epoch: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The image numbers of one rank's batches: int64 (batches, batch_size).

    Global batch b is ``epoch_order`` from b·G to (b+1)·G with G = batch_size·world_size, whatever G is made of; the ranks
    take its parts in order. What is left after the last full global batch is other images in every epoch, and is skipped.
    """
    whole = batch_size * world_size
    batches = images // whole
    if batches == 0:
        raise UserError(
            f"the data set has {images} training images with boxes, fewer than one global batch of {whole} "
            f"({batch_size} a device × {world_size}); use a smaller --batch_size"
        )
    order = epoch_order(images, seed, epoch)[: batches * whole]
    return order.reshape(batches, world_size, batch_size)[:, rank]


def eval_shard(images: int, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """The image numbers of one rank's evaluation batches: every image once over all ranks; the last batch may be short."""
    mine = np.arange(rank, images, world_size)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

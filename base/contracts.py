"""What flows between components. Boxes are ltrb (left, top, right, bottom) in [0, 1] of the image unless said otherwise.

The slots of a backend and what each callable receives and returns are the ``Protocol`` classes below; `base.backend`
holds a backend to them. Every tensor may live on any device; a component works on the device of its input.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from base.boxes import DefaultBoxes


class Batch(NamedTuple):
    """One batch as a loader gives it, N images, at most M boxes an image."""

    images: Tensor  # uint8 (N, H, W, 3) RGB
    boxes: Tensor  # float32 (N, M, 4) ltrb; rows past an image's boxes are 0
    labels: Tensor  # int64 (N, M) 1..C-1; 0 = padding
    image_ids: Tensor  # int64 (N)
    sizes: Tensor  # int64 (N, 2) original (height, width) in pixels


class Predictions(NamedTuple):
    """The model's output for N images, A default boxes, C classes (class 0 is background)."""

    offsets: Tensor  # (N, A, 4) centre offsets / 0.1 and log sizes / 0.2 against the default boxes
    logits: Tensor  # (N, A, C)


class Targets(NamedTuple):
    """What the loss compares predictions with."""

    offsets: Tensor  # float32 (N, A, 4), encoded as in Predictions; 0 where labels is 0
    labels: Tensor  # int64 (N, A); 0 = background


class Detections(NamedTuple):
    """The D boxes found in one image, by falling score."""

    boxes: Tensor  # (D, 4) ltrb
    labels: Tensor  # int64 (D) 1..C-1
    scores: Tensor  # (D) softmax probabilities


FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # pycocotools' order


class Loader(Protocol):
    """An iterable over one epoch of one rank. A sample is a pure function of (seed, epoch, image id).

    A loader that cannot promise this also has ``state_dict()`` and ``load_state_dict()``, kept in checkpoints. Iterating raises
    UserError for a file that cannot be read, and LostProcess (both of `base.errors`) if a process of its own has died.
    """

    bad_images: dict[str, str]  # file → why it could not be read, as far as iterated (with skip_bad_images)

    def __len__(self) -> int: ...  # batches an epoch
    def __iter__(self) -> Iterator[Batch]: ...  # the batches of the epoch last set, from its first_batch on
    def set_epoch(self, epoch: int, first_batch: int = 0) -> None: ...


class MakeTrainLoader(Protocol):
    """Slot ``train_loader``. Each global batch of ``batch_size * world_size`` images is split over the ranks in order."""

    def __call__(
        self,
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
    ) -> Loader: ...


class MakeEvalLoader(Protocol):
    """Slot ``eval_loader``. Every image once over all ranks, resized only, in the order of image ids; batches may be ragged."""

    def __call__(
        self,
        *,
        annotation_file: str | Path,
        image_dir: str | Path,
        image_size: tuple[int, int],
        batch_size: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        skip_bad_images: bool = False,
    ) -> Loader: ...


class MakeModel(Protocol):
    """Slot ``model``: → nn.Module from float images (N, 3, H, W), any memory format, to Predictions; has ``default_boxes``.

    In training, batch norm takes its statistics over the batches of all ranks of ``norm_group``, a process group.
    """

    def __call__(
        self, *, num_classes: int, image_size: tuple[int, int], strides: tuple[int, ...], backbone: str, norm_group: Any = None
    ) -> nn.Module: ...


class Matcher(Protocol):
    """Slot ``matcher``: boxes float32 (N, M, 4), labels int64 (N, M) with 0 = padding → Targets."""

    def __call__(self, boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets: ...


class Loss(Protocol):
    """Slot ``loss``: → scalar, the mean over images of (smooth L1 + mined cross-entropy) / positives; 0 for an image without."""

    def __call__(self, predictions: Predictions, targets: Targets) -> Tensor: ...


class Decoder(Protocol):
    """Slot ``decoder``: softmax, threshold, per-class non-maximum suppression, best ``max_detections``, for each image."""

    def __call__(
        self,
        predictions: Predictions,
        default_boxes: DefaultBoxes,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        max_detections: int = 200,
    ) -> list[Detections]: ...


class Evaluator(Protocol):
    """What slot ``evaluator`` returns for an annotation file: collects detections, then computes COCO's 12 FIGURES.

    ``curves`` are the precisions of which AP is the mean: float64 (10 IoU thresholds 0.5 … 0.95, 101 recalls 0 … 1, C - 1 classes)
    over boxes of all sizes, 100 detections an image; -1 for a class without boxes in the ground truth.
    """

    def update(self, image_ids: Tensor, sizes: Tensor, detections: list[Detections]) -> None: ...
    def compute(self) -> dict[str, float]: ...
    def curves(self) -> np.ndarray: ...


class MakeEvaluator(Protocol):
    """Slot ``evaluator``: the ground truth of an annotation file, ready for ``update``."""

    def __call__(self, annotation_file: str | Path) -> Evaluator: ...


class MakeOptimizer(Protocol):
    """Slot ``optimizer``: a torch optimizer whose groups obey ``lr``."""

    def __call__(self, parameters: Any, *, momentum: float, weight_decay: float) -> Any: ...


class Step(Protocol):
    """What slot ``step`` returns: normalise → forward → loss → backward → all-reduce → optimizer, for one rank.

    After ``__call__`` parameters, buffers and optimizer state are the same on every rank.
    """

    def __call__(self, batch: Batch, learning_rate: float) -> Tensor: ...  # this rank's loss, a detached scalar
    def predict(self, images: Tensor) -> Predictions: ...  # uint8 (N, H, W, 3) → Predictions, in evaluation mode
    def state_dict(self) -> dict: ...  # what precision needs to resume (a loss scale), beyond model and optimizer
    def load_state_dict(self, state: dict) -> None: ...


class MakeStep(Protocol):
    """Slot ``step``. ``model`` is already on ``device``; ``accumulation`` splits a batch into that many parts.

    Gradients are averaged over ``world_size`` ranks after the backward pass, or in buckets of ``bucket_mb`` MiB beside it, as
    float32, or with ``compression`` as "bf16" or "fp16".
    """

    def __call__(
        self,
        *,
        model: nn.Module,
        optimizer: Any,
        matcher: Matcher,
        loss: Loss,
        device: Any,
        accumulation: int = 1,
        world_size: int = 1,
        bucket_mb: int = 0,
        compression: str = "none",
    ) -> Step: ...

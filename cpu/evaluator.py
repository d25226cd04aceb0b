"""COCO's 12 figures from arrays, in native code: the same numbers as pycocotools, bit for bit."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.contracts import FIGURES, Detections
from data_sets.index import AnnotationIndex

from . import _coco

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as pycocotools makes them: their last bits decide matches
RECALL_THRESHOLDS = np.linspace(0, 1, 101)


class CocoEvaluator:
    """Collects detections of every image, then compares them with the ground truth of ``annotation_file``.

    ``update`` copies and checks; all the rest happens in ``compute``, which keeps the GIL free and may run in a thread of its
    own while training goes on. ``threads`` defaults to torch's number of threads.
    """

    def __init__(self, annotation_file: str | Path, threads: int | None = None):
        self.index = AnnotationIndex.open(annotation_file)
        self.threads = threads or torch.get_num_threads()
        self.seen = np.zeros(len(self.index), dtype=bool)
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.result: tuple[np.ndarray, np.ndarray] | None = None  # of what has been seen so far

    def update(self, image_ids: Tensor, sizes: Tensor, detections: list[Detections]) -> None:
        """Adds the detections of N images: ids int64 (N), original (height, width) (N, 2).

        A box or score that is not a number is kept: it matches nothing and ranks last. Raises ValueError, and adds none of
        them, for an image that is unknown or was seen before, or for arrays that do not fit together.
        """
        ids = np.asarray(image_ids.cpu(), dtype=np.int64)
        if len(ids) != len(detections) or sizes.shape != (len(ids), 2):
            shape = tuple(sizes.shape)
            raise ValueError(f"{len(ids)} image ids, sizes of shape {shape}, detections of {len(detections)} images; N, (N, 2) and N must fit")
        if not len(ids):
            return
        counts = np.array([[len(column) for column in image] for image in detections])
        if len(uneven := np.flatnonzero((counts != counts[:, :1]).any(1))):
            lengths = " boxes, {} labels, {} scores".format(*counts[uneven[0], 1:])
            raise ValueError(f"image {ids[uneven[0]]} has {counts[uneven[0], 0]}{lengths}; there must be as many of each")
        positions = self._positions(ids)
        boxes, labels, scores = (torch.cat(column).detach().cpu() for column in zip(*detections, strict=True))
        if boxes.shape != (len(labels), 4):
            raise ValueError(f"boxes of shape {tuple(boxes.shape)} for {len(labels)} labels; ltrb boxes are (D, 4)")
        first = np.concatenate([[0], counts[:, 0].cumsum()])
        if len(wrong := np.flatnonzero((labels.numpy() < 1) | (labels.numpy() > len(self.index.category_ids)))):
            image = ids[np.searchsorted(first, wrong[0], side="right") - 1]
            raise ValueError(f"image {image} has a detection labelled {labels[wrong[0]]}; labels are 1 to {len(self.index.category_ids)}")
        self.parts.append((positions, _float64(sizes.cpu()), first, _float64(boxes), labels.numpy(), _float64(scores)))
        self.seen[positions] = True
        self.result = None

    def compute(self) -> dict[str, float]:
        """The 12 figures by name; 0 each without any detection, -1 where the ground truth has no such box (as pycocotools)."""
        precisions, recalls = self._compared()
        wanted = (precisions[0], precisions[0, 0], precisions[0, 5], *precisions[1:], *recalls)  # 0 and 5: IoU 0.5 and 0.75
        return dict(zip(FIGURES, map(_mean, wanted), strict=True))

    def curves(self) -> np.ndarray:
        """Precisions (10 IoU thresholds, 101 recalls, C - 1); -1 for a class without boxes."""
        return self._compared()[0][0]

    def _compared(self) -> tuple[np.ndarray, np.ndarray]:
        """Precisions (sizes of boxes, IoU thresholds, recalls, classes) and recalls (rows of figures, IoU thresholds, classes)."""
        if self.result is not None:
            return self.result
        index = self.index
        truth = (index.first_box, index.boxes, index.labels, index.crowd, index.areas, len(index.category_ids))
        self.result = _coco.figures(*truth, list(self.parts), IOU_THRESHOLDS, RECALL_THRESHOLDS, self.threads)
        return self.result

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Where the images stand in the index."""
        known = self.index.image_ids
        positions = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        if (unknown := known[positions] != ids).any():
            raise ValueError(f"image {ids[unknown][0]} is not in {self.index.annotation_file}")
        order = np.sort(positions)
        if len(twice := np.concatenate([positions[self.seen[positions]], order[1:][order[1:] == order[:-1]]])):
            raise ValueError(f"image {known[twice[0]]} was evaluated twice")
        return positions


def _float64(values: Tensor) -> np.ndarray:
    """A copy, made by NumPy: torch would wake its threads for so little, and disturb a training step."""
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().astype(np.float64)


def _mean(values: np.ndarray) -> float:
    """The mean of those with ground truth, added in pycocotools' order."""
    there = values[values > -1]
    return float(np.mean(there)) if there.size else -1.0

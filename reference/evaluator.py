"""COCO's 12 figures by pycocotools, from the packed annotation index."""

import contextlib
import io
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from base.contracts import FIGURES, Detections
from data_sets.index import AnnotationIndex


class CocoEvaluator:
    """Collects detections of every image, then compares them with the ground truth of ``annotation_file``."""

    def __init__(self, annotation_file: str | Path):
        self.index = AnnotationIndex.open(annotation_file)
        self.found: list[dict] = []
        self.seen: set[int] = set()
        self.result: COCOeval | None = None  # of what has been seen so far

    def update(self, image_ids: Tensor, sizes: Tensor, detections: list[Detections]) -> None:
        """Adds the detections of N images: ids int64 (N), original (height, width) (N, 2). An image seen before is refused."""
        self.result = None
        for image_id, (height, width), image in zip(image_ids.tolist(), sizes.tolist(), detections, strict=True):
            if image_id in self.seen:
                raise ValueError(f"image {image_id} was evaluated twice")
            self.seen.add(image_id)
            boxes = image.boxes.double().cpu().numpy() * (width, height, width, height)
            boxes[:, 2:] -= boxes[:, :2]
            categories = self.index.category_ids[image.labels.cpu().numpy() - 1]
            for box, category, score in zip(boxes.tolist(), categories.tolist(), image.scores.tolist(), strict=True):
                self.found.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})

    def compute(self) -> dict[str, float]:
        """The 12 figures by name; 0 each without any detection, -1 where the ground truth has no such box (as pycocotools)."""
        return dict(zip(FIGURES, map(float, self._compared().stats), strict=True))

    def curves(self) -> np.ndarray:
        """Precisions (10 IoU thresholds, 101 recalls, C - 1); -1 for a class without boxes."""
        return self._compared().eval["precision"][:, :, :, 0, -1]  # boxes of all sizes, 100 detections an image

    def _compared(self) -> COCOeval:
        if self.result is not None:
            return self.result
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
            dataset = self.index.to_coco()
            for number, box in enumerate(dataset["annotations"], 1):
                box["id"] = number  # pycocotools takes a match with id 0 for none
            truth = as_coco(dataset)
            # loadRes cannot make a result without detections
            found = truth.loadRes(self.found) if self.found else as_coco({**truth.dataset, "annotations": []})
            result = COCOeval(truth, found, "bbox")
            result.evaluate()
            result.accumulate()
            result.summarize()
        self.result = result
        return result


def as_coco(dataset: dict) -> COCO:
    """A pycocotools ``COCO`` object of a COCO dictionary."""
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco

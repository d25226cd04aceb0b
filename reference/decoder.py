"""From predictions to detections (SSD paper, section 3; MLPerf reference ``Encoder.decode_batch``)."""

import torch
from torch import Tensor

from base.boxes import DefaultBoxes, iou
from base.boxes import decode as decode_offsets
from base.contracts import Detections, Predictions

BEST_A_CLASS = 200  # candidates of a class that enter non-maximum suppression


def decode(
    predictions: Predictions,
    default_boxes: DefaultBoxes,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 200,
) -> list[Detections]:
    """Predictions of N images → N Detections, each by falling score, at most ``max_detections`` long.

    A box is kept if no better box of its class overlaps it with IoU ≥ ``iou_threshold``. Boxes are not clipped to the image.
    """
    boxes = decode_offsets(predictions.offsets.float(), default_boxes.xywh)
    scores = predictions.logits.float().softmax(-1)
    return [decode_image(b, s, score_threshold, iou_threshold, max_detections) for b, s in zip(boxes, scores, strict=True)]


def decode_image(boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int) -> Detections:
    """As `decode`, of boxes (A, 4) ltrb and probabilities (A, C) with background first."""
    found = []
    for label in range(1, scores.shape[1]):  # 0 is background
        candidates = (scores[:, label] > score_threshold).nonzero().flatten()
        if len(candidates) == 0:
            continue
        candidates = candidates[scores[candidates, label].argsort(descending=True, stable=True)[:BEST_A_CLASS]]
        candidates = candidates[suppress(boxes[candidates], iou_threshold)]
        found.append((candidates, torch.full_like(candidates, label), scores[candidates, label]))
    if not found:
        return Detections(boxes.new_zeros(0, 4), torch.zeros(0, dtype=torch.long, device=boxes.device), boxes.new_zeros(0))
    candidates, labels, values = (torch.cat(column) for column in zip(*found, strict=True))
    best = values.argsort(descending=True, stable=True)[:max_detections]
    return Detections(boxes[candidates[best]], labels[best], values[best])


def suppress(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of boxes (K, 4) by falling score → bool (K): which are kept."""
    close = (iou(boxes, boxes) >= iou_threshold).cpu().numpy()
    kept = []
    for number in range(len(boxes)):
        if not close[number, kept].any():
            kept.append(number)
    mask = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    mask[kept] = True
    return mask

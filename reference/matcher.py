"""Matching of ground-truth boxes to default boxes (SSD paper, section 2.2; MLPerf reference ``Encoder.encode``)."""

import torch
from torch import Tensor

from base.boxes import DefaultBoxes, encode, iou
from base.contracts import Targets

THRESHOLD = 0.5  # a default box above this IoU with its best box is positive


def match(boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets:
    """Boxes float32 (N, M, 4) ltrb and labels int64 (N, M), 0 = padding → Targets for the A default boxes.

    Every box also takes the default box that it overlaps most, whatever the IoU; the later box wins a shared one. Equal
    overlaps are common (thin boxes): the default box that is first in the MLPerf order, and the first box, is taken.
    """
    count = len(default_boxes)
    offsets = torch.zeros(len(boxes), count, 4, device=boxes.device)
    classes = torch.zeros(len(boxes), count, dtype=torch.long, device=boxes.device)
    for n, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        real = image_labels > 0
        image_boxes, image_labels = image_boxes[real].float(), image_labels[real]
        if len(image_boxes) == 0:
            continue
        overlaps = iou(image_boxes, default_boxes.ltrb)  # (boxes, A)
        best_overlap, best_box = overlaps.max(0)
        best_default = default_boxes.mlperf_order[overlaps[:, default_boxes.mlperf_order].argmax(1)]
        for number, default_box in enumerate(best_default.tolist()):
            best_overlap[default_box], best_box[default_box] = 2, number
        positive = best_overlap > THRESHOLD
        classes[n, positive] = image_labels[best_box[positive]]
        offsets[n, positive] = encode(image_boxes[best_box[positive]], default_boxes.xywh[positive])
    return Targets(offsets, classes)

"""Default boxes and box arithmetic that every backend shares. NumPy and torch only, on any device."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# SSD paper, section 2.2, as MLPerf's reference sets it for COCO: sizes in pixels of a 300×300 image, one more than levels.
SCALES = (21, 45, 99, 153, 207, 261, 315)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)  # 4 6 6 6 4 4
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2  # SSD paper's code: offsets are divided by these

# At 300×300 MLPerf places centres by these distances in pixels, which are the strides of the paper's network and not
# 300 / cells; at every other size the distance is image / cells (the MLPerf inference model at 1200×1200 does the same).
STEPS_300 = {(38, 19, 10, 5, 3, 1): (8, 16, 32, 64, 100, 300)}


@dataclass(frozen=True, eq=False)
class DefaultBoxes:
    """The A default boxes of a model, ordered level, row, column, box of the cell.

    With heads in channels-last memory the reshape of their output to (N, A, ·) is a view in this order.
    """

    xywh: Tensor  # float32 (A, 4): centre x, centre y, width, height in [0, 1]
    ltrb: Tensor  # float32 (A, 4); may leave [0, 1], as in MLPerf
    mlperf_order: Tensor  # int64 (A): xywh[mlperf_order] is ordered level, box, row, column
    feature_sizes: tuple[tuple[int, int], ...]  # (rows, columns) of each level
    mlperf_rank: Tensor = field(init=False)  # int64 (A): where each default box is in the MLPerf order

    def __post_init__(self):
        object.__setattr__(self, "mlperf_rank", self.mlperf_order.argsort())

    def __len__(self) -> int:
        return len(self.xywh)

    def to(self, device) -> "DefaultBoxes":
        """The same boxes on another device."""
        return DefaultBoxes(self.xywh.to(device), self.ltrb.to(device), self.mlperf_order.to(device), self.feature_sizes)


def default_boxes(image_size: tuple[int, int], feature_sizes: tuple[tuple[int, int], ...]) -> DefaultBoxes:
    """The default boxes of an image (height, width) whose levels have ``feature_sizes`` (rows, columns).

    Source: MLPerf reference ``dboxes300_coco`` (equal to it at 300×300) and, for other sizes, SSD-R34-Large
    (equal to it at 1200×1200 with 50, 25, 13, 7, 3, 3).
    """
    rows, columns = zip(*feature_sizes, strict=True)
    if tuple(image_size) == (300, 300) and rows == columns and rows in STEPS_300:
        pitches = [(step / 300, step / 300) for step in STEPS_300[rows]]
    else:
        pitches = [(1 / r, 1 / c) for r, c in feature_sizes]
    levels, orders, start = [], [], 0
    for level, (r, c) in enumerate(feature_sizes):
        small, large = SCALES[level] / 300, SCALES[level + 1] / 300
        shapes = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in ASPECT_RATIOS[level]:
            wide, narrow = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(wide, narrow), (narrow, wide)]
        y, x = ((torch.arange(cells, dtype=torch.float64) + 0.5) * pitch for cells, pitch in zip((r, c), pitches[level], strict=True))
        boxes = torch.empty(r, c, len(shapes), 4, dtype=torch.float64)
        boxes[..., 0], boxes[..., 1] = x[:, None], y[:, None, None]
        boxes[..., 2:] = torch.tensor(shapes, dtype=torch.float64)
        levels.append(boxes.clamp_(0, 1).float().flatten(0, 2))
        numbers = torch.arange(start, start + len(levels[-1])).reshape(r, c, len(shapes))
        orders.append(numbers.permute(2, 0, 1).flatten())
        start += len(levels[-1])
    xywh = torch.cat(levels)
    return DefaultBoxes(xywh, xywh_to_ltrb(xywh), torch.cat(orders), tuple(map(tuple, feature_sizes)))


def xywh_to_ltrb(boxes: Tensor) -> Tensor:
    """(…, 4) centre x, centre y, width, height → left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def ltrb_to_xywh(boxes: Tensor) -> Tensor:
    """(…, 4) left, top, right, bottom → centre x, centre y, width, height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of a (…, M, 4) with every box of b (…, K, 4), ltrb → (…, M, K)."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp_(min=0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    return shared / (area_a[..., :, None] + area_b[..., None, :] - shared)


def encode(boxes: Tensor, defaults_xywh: Tensor) -> Tensor:
    """Offsets of ltrb ``boxes`` (…, A, 4) against default boxes (A, 4) xywh (SSD paper, equation 2)."""
    xywh = ltrb_to_xywh(boxes)
    centre = (xywh[..., :2] - defaults_xywh[:, :2]) / defaults_xywh[:, 2:] / CENTRE_VARIANCE
    return torch.cat([centre, (xywh[..., 2:] / defaults_xywh[:, 2:]).log() / SIZE_VARIANCE], -1)


def decode(offsets: Tensor, defaults_xywh: Tensor) -> Tensor:
    """The inverse of `encode`: offsets (…, A, 4) → ltrb boxes (…, A, 4)."""
    centre = offsets[..., :2] * CENTRE_VARIANCE * defaults_xywh[:, 2:] + defaults_xywh[:, :2]
    size = (offsets[..., 2:] * SIZE_VARIANCE).exp() * defaults_xywh[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)

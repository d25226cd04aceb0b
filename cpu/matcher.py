"""The reference's matching in native code: most default boxes are passed over by bounds of their blocks."""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from base.boxes import DefaultBoxes
from base.contracts import Targets

from . import _matcher

_prepared: WeakKeyDictionary[DefaultBoxes, _matcher.Defaults] = WeakKeyDictionary()


def match(boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets:
    """Boxes float32 (N, M, 4) ltrb and labels int64 (N, M), 0 = padding → Targets for the A default boxes.

    Equal to `reference.matcher.match`, ties included. A box that is not finite gets offsets that are not finite. Raises
    ValueError if the shapes do not fit or a tensor is not on the CPU.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(f"boxes must be (N, M, 4) and labels (N, M), and are {tuple(boxes.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers, and are {labels.dtype}")
    if elsewhere := {str(t.device) for t in (boxes, labels, default_boxes.ltrb) if t.device.type != "cpu"}:
        raise ValueError(f"the CPU backend's matcher works on the CPU, and a tensor is on {elsewhere.pop()}")
    if default_boxes not in _prepared:
        fields = default_boxes.xywh.float(), default_boxes.ltrb.float(), default_boxes.mlperf_order.long()
        _prepared[default_boxes] = _matcher.Defaults(*(field.detach().contiguous().numpy() for field in fields))
    # NumPy's zeros are pages that nobody has touched yet: only those with a positive are ever written.
    offsets = np.zeros((len(boxes), len(default_boxes), 4), np.float32)
    classes = np.zeros((len(boxes), len(default_boxes)), np.int64)
    given = boxes.detach().float().contiguous().numpy(), labels.long().contiguous().numpy()
    _matcher.match(_prepared[default_boxes], *given, offsets, classes, torch.get_num_threads())
    return Targets(torch.from_numpy(offsets), torch.from_numpy(classes))

"""The reference's decoding in native code: candidates are found while the softmax is taken, and only they are looked at again."""

import torch

from base.boxes import DefaultBoxes
from base.contracts import Detections, Predictions

from . import _decoder


def decode(
    predictions: Predictions,
    default_boxes: DefaultBoxes,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 200,
) -> list[Detections]:
    """Predictions of N images → N Detections in float32; equal to `reference.decoder.decode` but for rounding.

    Raises ValueError if the shapes do not fit, a threshold or limit is no sensible number, or a tensor is not on the CPU.
    """
    offsets, logits = predictions.offsets.detach(), predictions.logits.detach()
    if elsewhere := {str(t.device) for t in (offsets, logits, default_boxes.xywh) if t.device.type != "cpu"}:
        raise ValueError(f"the CPU backend's decoder works on the CPU, and a tensor is on {elsewhere.pop()}")
    if logits.dim() != 3 or offsets.shape != (*logits.shape[:2], 4) or logits.shape[1] != len(default_boxes):
        shapes = f"{tuple(offsets.shape)} and {tuple(logits.shape)} for {len(default_boxes)} default boxes"
        raise ValueError(f"offsets must be (N, A, 4) and logits (N, A, C), and are {shapes}")
    if logits.dtype not in (torch.float32, torch.bfloat16):
        logits = logits.float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dtype is torch.bfloat16:
        logits = logits.view(torch.int16)
    found = _decoder.decode(
        offsets.float().contiguous().numpy(),
        logits.numpy(),
        default_boxes.xywh.detach().float().contiguous().numpy(),
        score_threshold,
        iou_threshold,
        min(max_detections, 2**31),
        torch.get_num_threads(),
    )
    return [Detections(*map(torch.from_numpy, image)) for image in found]

"""Decoding on the host, in the CPU backend's native code: the reference's would wait for the device once a class and image."""

import torch
from base.backends.cpu import decoder as host

from base.boxes import DefaultBoxes
from base.contracts import Detections, Predictions


def decode(
    predictions: Predictions,
    default_boxes: DefaultBoxes,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 200,
) -> list[Detections]:
    """Predictions of N images, on any device → N Detections on the same one; see `cpu.decoder.decode`. Only copies wait for the device."""
    moved = Predictions(*(tensor.detach().cpu() for tensor in predictions))
    found = host.decode(moved, default_boxes.to("cpu"), score_threshold, iou_threshold, max_detections)
    counts, device = [len(image.scores) for image in found], predictions.logits.device
    columns = [torch.cat(column).to(device).split(counts) for column in zip(*found, strict=True)]  # three copies, however many images
    return [Detections(*image) for image in zip(*columns, strict=True)]

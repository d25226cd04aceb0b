"""Decoding on the host, in the CPU backend's native code: the reference's would wait for the device once a class and image."""

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
    """Predictions of N images, on any device → N Detections on the CPU; see `cpu.decoder.decode`. The host waits once, for the copy."""
    moved = Predictions(*(tensor.detach().cpu() for tensor in predictions))
    return host.decode(moved, default_boxes.to("cpu"), score_threshold, iou_threshold, max_detections)

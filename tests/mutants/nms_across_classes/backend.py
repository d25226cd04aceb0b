"""Decoder: a box also drops overlapping boxes of other classes."""

from base.backends.reference.decoder import decode, suppress

from base.backend import Backend
from base.contracts import Detections


def across(predictions, default_boxes, score_threshold=0.05, iou_threshold=0.5, max_detections=200):
    found = decode(predictions, default_boxes, score_threshold, iou_threshold, max_detections)
    return [Detections(*(column[suppress(image.boxes, iou_threshold)] for column in image)) for image in found]


BACKEND = Backend(name="nms_across_classes", decoder=across)

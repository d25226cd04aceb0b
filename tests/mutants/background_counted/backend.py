"""Decoder: background is detected like a class, as the last one."""

import torch
from base.backends.reference.decoder import decode

from base.backend import Backend
from base.contracts import Detections, Predictions


def counted(predictions, default_boxes, *limits, **options):
    logits = predictions.logits
    again = Predictions(predictions.offsets, torch.cat([logits[..., :1] - 1e4, logits[..., 1:], logits[..., :1]], -1))
    return [Detections(*image) for image in decode(again, default_boxes, *limits, **options)]


BACKEND = Backend(name="background_counted", decoder=counted)

"""Evaluator: looks at the first detections of an update only."""

from base.backends.reference.evaluator import CocoEvaluator

from base.backend import Backend
from base.contracts import Detections


class Fewer(CocoEvaluator):
    def update(self, image_ids, sizes, detections):
        super().update(image_ids, sizes, [Detections(*(column[:20] for column in image)) for image in detections])


BACKEND = Backend(name="few_detections", evaluator=Fewer)

"""Step: gradients travel as float32, whatever the compression."""

from base.backends.reference.step import TrainStep

from base.backend import Backend


class Whole(TrainStep):
    def __init__(self, **parts):
        super().__init__(**{**parts, "compression": "none"})


BACKEND = Backend(name="uncompressed", step=Whole)

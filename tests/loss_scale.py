"""A step with loss scaling that is fast on a CPU, which takes a minute for a few in float16; for test_step.py and test_verify.py."""

import torch
from base.backends.reference.step import TrainStep


class ScaledStep(TrainStep):
    """The reference's, in float32, with a loss scale that is too large for the first steps."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**127)

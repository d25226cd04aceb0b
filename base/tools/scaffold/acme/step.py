"""The training step on acme devices: bfloat16 and channels-last memory."""

import torch
from base.backends.reference.step import TrainStep


class AcmeStep(TrainStep):
    """The reference's step; weights, gradients, running statistics and momentum stay float32."""

    memory_format = torch.channels_last

    def precision(self, device: torch.device) -> torch.dtype:
        """bfloat16 on the device; float32 on a CPU, which multiplies that faster and is there for tests."""
        return torch.float32 if device.type == "cpu" else torch.bfloat16

"""The training step on Iluvatar GPUs: float16 with loss scaling, the precision of the recipes, and channels-last memory."""

import torch
from base.backends.reference.step import TrainStep


class HalfStep(TrainStep):
    """The reference's step in float16 and channels-last memory; on a CPU in float32."""

    memory_format = torch.channels_last

    def precision(self, device: torch.device) -> torch.dtype:
        return torch.float16 if device.type == "cuda" else torch.float32

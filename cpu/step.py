"""The training step on x86: channels-last memory, bf16 where the CPU multiplies it, one fused optimizer pass."""

from pathlib import Path
from typing import Any

import torch
from base.backends.reference.step import TrainStep, normalise
from torch import Tensor, nn

from base.contracts import Loss, Matcher, Predictions

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # in it: instructions that multiply bf16


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16; emulated, it would be slower than float32."""
    if not CPUINFO.exists():  # another system, which does not say
        return False
    lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


class CPUStep(TrainStep):
    """The reference's step with another forward pass; weights, gradients, running statistics and momentum stay float32.

    Eager: compiling the model takes longer on a CPU than it saves in the demo, and gains nothing where oneDNN's
    convolutions take nearly all the time.
    """

    def __init__(self, model: nn.Module, optimizer: Any, matcher: Matcher, loss: Loss, device, accumulation: int, world_size: int):
        super().__init__(model.to(memory_format=torch.channels_last), optimizer, matcher, loss, device, accumulation, world_size)
        self.bf16 = has_bf16()

    def forward(self, images: Tensor) -> Predictions:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.model(normalise(images))


def build_step(
    *, model: nn.Module, optimizer: Any, matcher: Matcher, loss: Loss, device, accumulation: int = 1, world_size: int = 1
) -> CPUStep:
    """A `CPUStep` for one rank."""
    return CPUStep(model, optimizer, matcher, loss, device, accumulation, world_size)


def build_optimizer(parameters, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD in one pass over each parameter instead of three."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)

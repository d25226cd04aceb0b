"""The training step on x86: channels-last memory, bf16 where the CPU multiplies it, one fused optimizer pass."""

from pathlib import Path

import torch
from base.backends.reference.step import TrainStep

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
    """The reference's step in bf16 where the CPU multiplies it, in channels-last memory.

    Eager: compiling the model takes longer on a CPU than it saves in the demo, and gains nothing where oneDNN's
    convolutions take nearly all the time.
    """

    memory_format = torch.channels_last

    def precision(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if has_bf16() else torch.float32


def build_optimizer(parameters, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD in one pass over each parameter instead of three."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)

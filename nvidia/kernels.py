"""What the Triton kernels share."""

import torch
import triton
from torch import Tensor

LIBRARY = "ssd_nvidia"  # namespace of the custom operators: torch.ops.ssd_nvidia.…


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: $TRITON_INTERPRET=1 when this process started."""
    return bool(triton.knobs.runtime.interpret)


def on_kernels(tensor: Tensor) -> bool:
    """Whether a tensor's work is done by the kernels; without a GPU and without the interpreter the reference does it."""
    return tensor.device.type == "cuda" or interpreted()


def block(on: Tensor, size: int) -> int:
    """How much one program takes: ``size`` on a GPU, and 32 times that in the interpreter, to which all programs cost alike."""
    return size if on.device.type == "cuda" else 32 * size

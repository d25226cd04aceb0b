"""Tensors as the native code takes them."""

import numpy as np
import torch
from torch import Tensor

KINDS = (torch.float32, torch.bfloat16)  # of floating-point numbers that it works on

def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as NumPy sees it, bfloat16 as 16-bit integers; copied only if its rows are not contiguous."""
    tensor = tensor.detach()
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()

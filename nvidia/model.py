"""The reference's architecture, with batch norm, the shortcut's addition and ReLU as one operation."""

import torch
from base.backends.reference.model import SSD
from torch import Tensor, nn

from .kernels import on_kernels
from .norm import fits, norm_relu


class FusedSSD(SSD):
    """The reference's architecture and weights."""

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        frozen = torch.is_grad_enabled() and not norm.training  # learning with fixed statistics is left to torch
        if frozen or not fits(norm, x, shortcut) or (self.norm_group is not None and not on_kernels(x)):
            return super().apply_norm(norm, x, shortcut, relu)
        return norm_relu(norm, x, shortcut, relu, self.norm_group)

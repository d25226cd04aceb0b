"""The reference's architecture, with batch norm, the shortcut's addition and ReLU as one operation."""

from collections.abc import Sequence

import torch
from base.backends.reference.model import SSD
from torch import Tensor, nn

from .norm import fits, norm_relu


class FusedSSD(SSD):
    """The reference's architecture and weights."""

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        frozen = torch.is_grad_enabled() and not norm.training  # learning with fixed statistics is left to torch
        if frozen or not fits(norm, x, shortcut):
            return super().apply_norm(norm, x, shortcut, relu)
        return norm_relu(norm, x, shortcut, relu)


def build_model(*, num_classes: int, image_size: tuple[int, int], strides: Sequence[int], backbone: str) -> FusedSSD:
    """As `reference.model.build_model`."""
    return FusedSSD(num_classes, image_size, strides, backbone)

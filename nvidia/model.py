"""The reference's architecture, with what tensor cores and memory like better around its convolutions."""

import torch
from base.backends.reference.model import SSD
from torch import Tensor, nn
from torch.nn import functional

from base.contracts import Predictions

from . import heads, pool, stem
from .kernels import on_kernels
from .norm import KINDS, bias_relu, fits, norm_relu


class FusedSSD(SSD):
    """The reference's architecture and weights."""

    def apply_stem(self, convolution: nn.Conv2d, images: Tensor) -> Tensor:
        return stem.stem(images, convolution.weight) if stem.fits(convolution, images) else super().apply_stem(convolution, images)

    def apply_pool(self, pooling: nn.MaxPool2d, x: Tensor) -> Tensor:
        return pool.max_pool(x) if pool.fits(pooling, x) else super().apply_pool(pooling, x)

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        if not self.on_norm_kernels(norm, x, shortcut):
            return super().apply_norm(norm, x, shortcut, relu)
        return norm_relu(norm, x, shortcut, relu, self.norm_group)

    def apply_join(self, norm: nn.Module, x: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        if not self.on_norm_kernels(norm, x, shortcut):
            return super().apply_join(norm, x, shortcut)
        return norm_relu(norm, x, shortcut, True, self.norm_group, twice=True)

    def on_norm_kernels(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None) -> bool:
        frozen = torch.is_grad_enabled() and not norm.training  # learning with fixed statistics is left to torch
        return not frozen and fits(norm, x, shortcut) and (self.norm_group is None or on_kernels(x))

    def apply_extra(self, block: nn.Sequential, x: Tensor) -> Tensor:
        if not on_kernels(x) or x.dtype not in KINDS:
            return super().apply_extra(block, x)
        for convolution in (block[0], block[2]):
            y = functional.conv2d(x, convolution.weight, stride=convolution.stride, padding=convolution.padding)
            x = bias_relu(y, convolution.bias)
        return x

    def apply_heads(self, levels: list[Tensor]) -> Predictions:
        if not heads.fits(self.offset_heads, self.class_heads, levels, self.num_classes):
            return super().apply_heads(levels)
        return heads.apply_heads(self.offset_heads, self.class_heads, levels, self.num_classes)

"""The reference's model, with batch norm in one operation with what follows it, and heads whose backward pass looks only at the cells
that took part in the loss."""

import torch
from base.backends.reference.model import SSD
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .norm import fits, norm_relu


class NativeSSD(SSD):
    """The reference's architecture and weights."""

    def apply_norm(self, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        learns = torch.is_grad_enabled() and not norm.training  # with fixed statistics, which is torch's to differentiate
        if learns or self.norm_group is not None or not fits(norm, x, shortcut):
            return super().apply_norm(norm, x, shortcut, relu)
        return norm_relu(norm, x, shortcut, relu)

    def apply_head(self, head: nn.Conv2d, level: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return head(level)
        return _Head.apply(level, head.weight, head.bias, head.stride[0])


class _Head(torch.autograd.Function):
    """A 3×3 convolution with padding 1. Hard negative mining leaves some hundred default boxes of 8,732 with a gradient, and the heads
    are a tenth of the model's work: the backward pass gathers the few cells that have one."""

    @staticmethod
    def forward(ctx, level: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        output = functional.conv2d(level, weight, bias, stride=stride, padding=1)  # autocast, if on, decides its dtype
        ctx.save_for_backward(level, weight)
        ctx.stride = stride
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):
        level, weight = ctx.saved_tensors
        by_cell = slope.permute(0, 2, 3, 1)
        image, row, column = (by_cell != 0).any(-1).nonzero(as_tuple=True)
        count, outputs, inputs = len(image), *weight.shape[:2]
        cells = by_cell[image, row, column]  # (K, outputs)
        padded = functional.pad(level.to(slope.dtype).permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        places = [(image, row * ctx.stride + y, column * ctx.stride + x) for y in range(3) for x in range(3)]
        seen = torch.stack([padded[place] for place in places], 1)  # (K, 9, inputs)
        to_weight = (cells.T @ seen.view(count, 9 * inputs)).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
        spread = (cells @ weight.to(slope.dtype).permute(0, 2, 3, 1).reshape(outputs, -1)).view(count, 9, inputs)
        to_level = torch.zeros(padded.shape)
        for number, place in enumerate(places):  # within one place no cell comes twice
            to_level[place] += spread[:, number].float()
        to_level = to_level[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        return to_level.to(level.dtype), to_weight.to(weight.dtype), cells.float().sum(0).to(weight.dtype), None

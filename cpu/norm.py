"""Batch norm with the shortcut's addition and ReLU in native code: the forward pass reads x twice, the backward pass x and the gradient.

The floor is memory: 3 tensors' bytes forward (4 with a shortcut) and 5 backward (7), where torch's separate passes move 5 (8) and 8 (8).
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _norm
from .arrays import KINDS, as_array


def fits(norm: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether `norm_relu` knows this kind of batch norm, and the input is in channels-last memory; others are left to torch."""
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
    given = [t for t in tensors if t is not None]
    kinds = {(t.dtype, t.device.type) for t in given}
    known = norm.weight.dtype is torch.float32 and len(kinds) == 1 and kinds <= {(dtype, "cpu") for dtype in KINDS}
    return plain and known and all(t.is_contiguous(memory_format=torch.channels_last) for t in given)


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """ReLU(norm(x) + shortcut) of (N, C, H, W), in channels-last memory; the running statistics change as torch's do."""
    if norm.training:
        if x.numel() <= x.shape[1]:
            raise ValueError(f"batch statistics need more than one value a channel, and x is {tuple(x.shape)}")
        norm.num_batches_tracked += 1
    return _NormReLU.apply(x, shortcut, norm.weight, norm.bias, norm, relu)


def _rows(tensor: Tensor | None):
    """(N, C, H, W) → (N·H·W, C) as the native code takes it; without a copy if it is channels-last."""
    return None if tensor is None else as_array(tensor.detach().permute(0, 2, 3, 1).reshape(-1, tensor.shape[1]))


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        threads, (rows, added) = torch.get_num_threads(), map(_rows, (x, shortcut))
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean, variance = torch.empty_like(mean), torch.empty_like(variance)
            _norm.statistics(rows, mean.numpy(), variance.numpy(), threads)
            count = len(rows)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        numbers = (t.detach().numpy() for t in (mean, variance, weight, bias))
        _norm.apply(rows, added, *numbers, norm.eps, relu, _rows(y), threads)
        ctx.save_for_backward(x, y if relu and shortcut is not None else None, mean, variance, weight, bias)
        ctx.trained, ctx.epsilon, ctx.relu, ctx.has_shortcut = norm.training, norm.eps, relu, shortcut is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):
        x, y, mean, variance, weight, bias = ctx.saved_tensors
        if not ctx.trained:
            raise RuntimeError("batch norm with running statistics has no backward pass here; call .train() first")
        to_x = torch.empty_like(x, memory_format=torch.channels_last)
        to_shortcut = torch.empty_like(to_x) if ctx.has_shortcut else None
        to_weight, to_bias = torch.empty_like(weight), torch.empty_like(bias)
        numbers = (t.detach().numpy() for t in (mean, variance, weight, bias))
        into = _rows(to_x), _rows(to_shortcut), to_weight.numpy(), to_bias.numpy()
        _norm.backward(_rows(slope), _rows(x), _rows(y), *numbers, ctx.epsilon, ctx.relu, *into, torch.get_num_threads())
        return to_x, to_shortcut, to_weight, to_bias, None, None

"""Batch norm with the shortcut's addition and ReLU as Triton kernels over channels-last memory.

The floor is memory: 3 tensors' bytes forward (4 with a shortcut) and 5 backward (7), where torch's separate passes move 5 (8) and
8 (8). Sums are taken in two stages, in an order that depends on the shape alone: the same input gives the same bits.
"""

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import LIBRARY, on_kernels
from .norm_kernels import AGAIN, ALL, OUTPUT, add_moments, add_slopes, apply, finish_moments, finish_slopes, to_input

KINDS = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 128  # channels of one program, at most: with fewer, its rows are whole and one stretch of memory
MOMENTS, SLOPES, MAPPED = 4096, 2048, 4096  # numbers that a program holds at a time: where it adds up x, and slopes, and where it does not
PROGRAMS = 512  # that add up: about four for each multiprocessor of a large GPU, all running at once, whatever the GPU
SUMMING, MAPPING = ({"num_warps": warps, "enable_fp_fusion": True} for warps in (8, 4))
FINISHED = 8, 256  # channels of one program of the second stage, and partial sums that it holds at a time


def fits(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether `norm_relu` knows this kind of batch norm and input; others are left to torch. What is not channels-last is copied."""
    plain = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
    fit = x.dim() == 4 and x.dtype in KINDS and x.numel() > 0 and norm.num_features == x.shape[1]
    same = shortcut is None or (shortcut.shape, shortcut.dtype, shortcut.device) == (x.shape, x.dtype, x.device)
    return plain and fit and same and norm.weight.dtype is torch.float32 and norm.weight.device == x.device


def norm_relu(
    norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, group: dist.ProcessGroup | None = None, twice: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """ReLU(norm(x) + shortcut) of (N, C, H, W), in channels-last memory; the running statistics change as torch's do.

    ``twice``: the same tensor for each of two that take it. Behind a shortcut and ReLU their gradients are added where they are read.

    With a ``group`` of processes, whose batches must be equally large, statistics are those of all their batches together
    (group batch norm); gradients of weight and bias are this process's share of the sum. Where nothing here applies torch
    does it: on the CPU without Triton's interpreter, and where fixed statistics are learned through (evaluation mode with
    gradients). Raises ValueError if statistics would be of one value a channel, or for a group on the CPU.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if norm.training and x.numel() // x.shape[1] * ranks <= 1:
        raise ValueError(f"batch statistics need more than one value a channel, and x is {tuple(x.shape)}")
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, shortcut, norm.weight, norm.bias))
    if not on_kernels(x) or (learned and not norm.training):
        if norm.training and ranks > 1:
            raise ValueError(f"batch norm over {ranks} processes needs a GPU, and x is on {x.device}")
        y = norm(x) if shortcut is None else norm(x) + shortcut
        y = y.relu() if relu else y
        return (y, y) if twice else y
    if not norm.training:
        y = norm_apply(x, shortcut, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, relu)
        return (y, y) if twice else y
    norm.num_batches_tracked += 1
    if ranks == 1:
        mean, variance = norm_statistics(x.detach(), norm.running_mean, norm.running_var, norm.momentum)
    else:
        mean, variance = _group_statistics(norm, x.detach(), group, ranks)
    y, again = _NormReLU.apply(x, shortcut, mean, variance, norm.weight, norm.bias, norm.eps, relu, group, ranks)
    return (y, again) if twice else y


def _group_statistics(norm: nn.BatchNorm2d, x: Tensor, group: dist.ProcessGroup, ranks: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over all ranks. Their moments are added in float64, where the squares of far means do not cancel."""
    mean, variance = (t.double() for t in norm_statistics(x, norm.running_mean, norm.running_var, 0.0))
    moments = torch.stack([mean, variance + mean * mean])
    dist.all_reduce(moments, group=group)
    mean, square = moments / ranks
    variance = (square - mean * mean).clamp(min=0)
    count = x.numel() // x.shape[1] * ranks
    norm.running_mean.lerp_(mean.float(), norm.momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).float(), norm.momentum)
    return mean.float(), variance.float()


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """ReLU(x + bias) of (N, C, H, W) and (C), in x's dtype and channels-last memory: what follows a convolution without a norm."""
    return _BiasReLU.apply(x, bias.float())


class _BiasReLU(torch.autograd.Function):
    """The kernels of a norm whose mean is 0 and whose scale is 1."""

    @staticmethod
    def forward(ctx, x, bias):
        zero, one = torch.zeros_like(bias), torch.ones_like(bias)
        y = norm_apply(x, None, zero, one, one, bias, 0.0, True)
        ctx.save_for_backward(y, zero, one)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        y, zero, one = ctx.saved_tensors
        sums, _, passed = norm_sums(slope, y, y, zero, one, one, zero, 0.0, True)
        return passed, sums[0]


class _NormReLU(torch.autograd.Function):
    """The kernels with their gradient; an all-reduce stands between them, so that it is no single operator."""

    @staticmethod
    def forward(ctx, x, shortcut, mean, variance, weight, bias, epsilon, relu, group, ranks):
        y = norm_apply(x, shortcut, mean, variance, weight, bias, epsilon, relu)
        ctx.save_for_backward(x, y if relu and shortcut is not None else None, mean, variance, weight, bias)
        ctx.epsilon, ctx.relu, ctx.has_shortcut, ctx.group, ctx.ranks = epsilon, relu, shortcut is not None, group, ranks
        ctx.set_materialize_grads(False)
        return y, y.detach()  # one memory for both: neither is written to

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, other):
        x, y, mean, variance, weight, bias = ctx.saved_tensors
        if slope is None or other is None:
            slope, other = other if slope is None else slope, None
        elif y is None:
            slope, other = slope + other, None
        slope = _rows(slope)
        sums, to_weight, passed = norm_sums(slope, x, y, mean, variance, weight, bias, ctx.epsilon, ctx.relu, other)
        to_bias = sums[0].clone()
        if ctx.ranks > 1:
            dist.all_reduce(sums, group=ctx.group)
        through = slope if y is None else passed  # with the output at hand, the gradient behind the ReLU has been written
        again = ctx.relu and y is None
        to_x = norm_to_input(through, x, mean, variance, weight, bias, sums, ctx.ranks, ctx.epsilon, again)
        to_shortcut = through if ctx.has_shortcut else None
        return to_x, to_shortcut, None, None, to_weight, to_bias, None, None, None, None


# Operators. Tensors of images are (N, C, H, W) of one dtype, results in channels-last memory; all others float32 (C).


def _rows(tensor: Tensor) -> Tensor:
    """In channels-last memory: N·H·W rows of C channels, one after the other."""
    return tensor.contiguous(memory_format=torch.channels_last)


def _blocks(x: Tensor, numbers: int) -> tuple[int, int, int, int]:
    """(N·H·W, C) of x, and the rows and channels of a program that holds so many numbers at a time."""
    channels = min(triton.next_power_of_2(x.shape[1]), CHANNELS)
    return x.numel() // x.shape[1], x.shape[1], numbers // channels, channels


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _per_channel(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, x.shape[1], device=x.device)


def _partial(x: Tensor, numbers: int) -> tuple[tuple[int, int], Tensor, int]:
    """The grid that adds up all rows of x, room for its partial sums (2, parts, C), and the parts."""
    rows, count, block, channels = _blocks(x, numbers)
    across = triton.cdiv(count, channels)
    parts = min(triton.cdiv(rows, block), max(1, PROGRAMS // across))
    return (parts, across), _per_channel(x, 2, parts), parts


@torch.library.custom_op(f"{LIBRARY}::norm_statistics", mutates_args=("running_mean", "running_var"))
def norm_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """→ mean and variance (not corrected) of each channel; with a momentum, the running ones follow as torch's do.

    Floor: x's bytes, read once, over the memory's bandwidth.
    """
    x = _rows(x)
    mean, variance = _per_channel(x), _per_channel(x)
    grid, partial, parts = _partial(x, MOMENTS)
    add_moments[grid](x, partial, *_blocks(x, MOMENTS), **SUMMING)
    rows, count = x.numel() // x.shape[1], x.shape[1]
    given = x, partial, mean, variance, running_mean, running_var, momentum, rows / max(rows - 1, 1)
    finish_moments[(triton.cdiv(count, FINISHED[0]),)](*given, rows, count, parts, momentum != 0, *FINISHED, enable_fp_fusion=True)
    return mean, variance


@norm_statistics.register_fake
def _(x, running_mean, running_var, momentum):
    return torch.empty_like(running_mean), torch.empty_like(running_mean)


@torch.library.custom_op(f"{LIBRARY}::norm_apply", mutates_args=())
def norm_apply(
    x: Tensor, shortcut: Tensor | None, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, epsilon: float, relu: bool
) -> Tensor:
    """→ ReLU((x - mean) / √(variance + epsilon) · weight + bias + shortcut). Floor: 2 tensors' bytes, 3 with a shortcut."""
    x, y = _rows(x), _like(x)
    rows, count, block, channels = _blocks(x, MAPPED)
    grid = triton.cdiv(rows, block), triton.cdiv(count, channels)
    added = x if shortcut is None else _rows(shortcut)
    given = x, added, mean, variance, weight, bias, y, epsilon
    apply[grid](*given, rows, count, block, channels, shortcut is not None, relu, **MAPPING)
    return y


@norm_apply.register_fake
def _(x, shortcut, mean, variance, weight, bias, epsilon, relu):
    return _like(x)


@torch.library.custom_op(f"{LIBRARY}::norm_sums", mutates_args=())
def norm_sums(
    slope: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, epsilon: float, relu: bool,
    other: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """→ (2, C) sums over all rows of the gradient behind the ReLU and of its product with x - mean; the gradient of the weight;
    and, where the output ``y`` is given, the gradient behind the ReLU, else nothing, of shape (0). Of two that took the output the
    slopes, ``slope`` and ``other``, are added here; then ``y`` must be given.

    Floor: 2 tensors' bytes, 4 with ``y``, one more with ``other``, over the memory's bandwidth.
    """
    x, slope = _rows(x), _rows(slope)
    mode = ALL if not relu else AGAIN if y is None else OUTPUT
    passed = x.new_empty(0) if y is None else _like(x)
    sums, to_weight = _per_channel(x, 2), _per_channel(x)
    grid, partial, parts = _partial(x, SLOPES)
    given = slope, slope if other is None else _rows(other), x, x if y is None else _rows(y), mean, variance, weight, bias, partial, passed, epsilon
    add_slopes[grid](*given, *_blocks(x, SLOPES), mode.value, other is not None, **SUMMING)
    count = x.shape[1]
    finish_slopes[(triton.cdiv(count, FINISHED[0]),)](partial, variance, sums, to_weight, epsilon, count, parts, *FINISHED, enable_fp_fusion=True)
    return sums, to_weight, passed


@norm_sums.register_fake
def _(slope, x, y, mean, variance, weight, bias, epsilon, relu, other=None):
    return mean.new_empty(2, x.shape[1]), torch.empty_like(mean), x.new_empty(0) if y is None else _like(x)


@torch.library.custom_op(f"{LIBRARY}::norm_to_input", mutates_args=())
def norm_to_input(
    slope: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, ranks: int, epsilon: float, again: bool
) -> Tensor:
    """→ the gradient of x, from that behind the ReLU (or, with ``again``, before it) and its sums over all ``ranks``.

    Floor: 3 tensors' bytes over the memory's bandwidth.
    """
    x, slope, to_x = _rows(x), _rows(slope), _like(x)
    rows, count, block, channels = _blocks(x, MAPPED)
    grid = triton.cdiv(rows, block), triton.cdiv(count, channels)
    given = slope, x, mean, variance, weight, bias, sums, to_x, epsilon, 1 / (rows * ranks)
    to_input[grid](*given, rows, count, block, channels, (AGAIN if again else ALL).value, **MAPPING)
    return to_x


@norm_to_input.register_fake
def _(slope, x, mean, variance, weight, bias, sums, ranks, epsilon, again):
    return _like(x)

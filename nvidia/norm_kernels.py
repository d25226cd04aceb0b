"""The kernels of `norm`. Program (p, q) has a block of rows, or where it adds up every so many-th block, and a block of channels."""

import triton
import triton.language as tl

# How the backward pass knows the sign of a ReLU's input: there was none; it is found again from x; by the output's sign.
ALL, AGAIN, OUTPUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def pivot_of(x, channel, exists):
    """The first row, where it is a number: near enough to the mean that squares do not cancel."""
    first = tl.load(x + channel, mask=exists, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)


@triton.jit
def add_moments(x, partial, rows, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """partial (2, parts, C): the sums of x - pivot and of its square over part p of the rows. Floor: x's bytes."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < count
    pivot = pivot_of(x, channel, exists)[None, :]
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    place = tl.arange(0, ROWS)[:, None] * count + channel[None, :]
    for block in range(part, tl.cdiv(rows, ROWS), parts):
        inside = (block * ROWS + tl.arange(0, ROWS) < rows)[:, None] & exists[None, :]
        start = tl.cast(block, tl.int64) * (ROWS * count)
        value = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, value - pivot, 0.0)
        first += apart
        second += apart * apart
    to = partial + part * count + channel
    tl.store(to, tl.sum(first, 0), mask=exists)
    tl.store(to + parts * count, tl.sum(second, 0), mask=exists)


@triton.jit
def total_of(partial, channel, exists, count, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """The sum over all parts, in float64."""
    total = tl.zeros((PARTS, CHANNELS), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & exists[None, :]
        total += tl.load(partial + part[:, None] * count + channel[None, :], mask=inside, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def finish_moments(
    x, partial, mean, variance, running_mean, running_var, momentum, correction, rows, count, parts, UPDATE: tl.constexpr,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Mean and variance of a block of channels from the partial sums, which are in the cache."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < count
    apart = total_of(partial, channel, exists, count, parts, CHANNELS, PARTS) / rows
    square = total_of(partial + parts * count, channel, exists, count, parts, CHANNELS, PARTS) / rows
    spread = square - apart * apart
    spread = tl.where(spread < 0, 0.0, spread).to(tl.float32)  # what is not a number stays
    middle = (pivot_of(x, channel, exists) + apart).to(tl.float32)
    tl.store(mean + channel, middle, mask=exists)
    tl.store(variance + channel, spread, mask=exists)
    if UPDATE:
        old = tl.load(running_mean + channel, mask=exists)
        tl.store(running_mean + channel, old + momentum * (middle - old), mask=exists)
        old = tl.load(running_var + channel, mask=exists)
        tl.store(running_var + channel, old + momentum * (spread * correction - old), mask=exists)


@triton.jit
def line_of(mean, variance, weight, bias, channel, exists, epsilon):
    """What makes y of x: (x - mean) · scale + bias."""
    middle = tl.load(mean + channel, mask=exists, other=0.0)
    spread = tl.load(variance + channel, mask=exists, other=1.0)
    scale = tl.load(weight + channel, mask=exists, other=0.0) * tl.rsqrt(spread + epsilon)
    return middle[None, :], scale[None, :], tl.load(bias + channel, mask=exists, other=0.0)[None, :]


@triton.jit
def block_of(rows, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's channels, which of them and of its numbers exist, and where the latter are: behind ``start``, which may be far."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < count
    inside = (tl.program_id(0) * ROWS + tl.arange(0, ROWS) < rows)[:, None] & exists[None, :]
    start = tl.program_id(0).to(tl.int64) * (ROWS * count)
    return channel, exists, inside, start, tl.arange(0, ROWS)[:, None] * count + channel[None, :]


@triton.jit
def apply(
    x, shortcut, mean, variance, weight, bias, y, epsilon, rows, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr, ADD: tl.constexpr,
    RELU: tl.constexpr
):  # fmt: skip
    """y of a block. Floor: the bytes of x, y and the shortcut, if there is one."""
    channel, exists, inside, start, place = block_of(rows, count, ROWS, CHANNELS)
    middle, scale, summand = line_of(mean, variance, weight, bias, channel, exists, epsilon)
    z = (tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32) - middle) * scale + summand
    if ADD:
        z += tl.load(shortcut + start + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z < 0, 0.0, z)  # what is not a number passes, as in torch
    tl.store(y + start + place, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_slopes(
    slope, other, x, y, mean, variance, weight, bias, partial, passed, epsilon, rows, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    MODE: tl.constexpr, TWO: tl.constexpr
):  # fmt: skip
    """partial (2, parts, C): the sums over part p of the rows of the gradient g behind the ReLU and of g · (x - mean).

    A ReLU let through where its input was above zero, or not a number. Floor: the bytes of x and the slope, and with OUTPUT of y
    and g, which is written.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < count
    middle, scale, summand = line_of(mean, variance, weight, bias, channel, exists, epsilon)
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    place = tl.arange(0, ROWS)[:, None] * count + channel[None, :]
    for block in range(part, tl.cdiv(rows, ROWS), parts):
        inside = (block * ROWS + tl.arange(0, ROWS) < rows)[:, None] & exists[None, :]
        start = tl.cast(block, tl.int64) * (ROWS * count)
        apart = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32) - middle
        g = tl.load(slope + start + place, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            g += tl.load(other + start + place, mask=inside, other=0.0).to(tl.float32)
        if MODE == AGAIN:
            g = tl.where(apart * scale + summand <= 0, 0.0, g)
        if MODE == OUTPUT:
            g = tl.where(tl.load(y + start + place, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, g)
            tl.store(passed + start + place, g.to(passed.dtype.element_ty), mask=inside)
        first += g
        second += g * apart  # outside, g is 0
    to = partial + part * count + channel
    tl.store(to, tl.sum(first, 0), mask=exists)
    tl.store(to + parts * count, tl.sum(second, 0), mask=exists)


@triton.jit
def finish_slopes(partial, variance, sums, to_weight, epsilon, count, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """The sums (2, C) of a block of channels, and the weight's gradient, from the partial sums, which are in the cache."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < count
    first = total_of(partial, channel, exists, count, parts, CHANNELS, PARTS).to(tl.float32)
    second = total_of(partial + parts * count, channel, exists, count, parts, CHANNELS, PARTS).to(tl.float32)
    spread = tl.load(variance + channel, mask=exists, other=1.0)
    tl.store(sums + channel, first, mask=exists)
    tl.store(sums + count + channel, second, mask=exists)
    tl.store(to_weight + channel, second * tl.rsqrt(spread + epsilon), mask=exists)


@triton.jit
def to_input(
    slope, x, mean, variance, weight, bias, sums, to_x, epsilon, share, rows, count, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    MODE: tl.constexpr
):  # fmt: skip
    """scale · (g - mean of g - (x - mean) / (variance + epsilon) · mean of g · (x - mean)) of a block. Floor: 3 tensors' bytes."""
    channel, exists, inside, start, place = block_of(rows, count, ROWS, CHANNELS)
    middle, scale, summand = line_of(mean, variance, weight, bias, channel, exists, epsilon)
    spread = tl.load(variance + channel, mask=exists, other=1.0) + epsilon
    level = (tl.load(sums + channel, mask=exists, other=0.0) * share)[None, :]
    tilt = (tl.load(sums + count + channel, mask=exists, other=0.0) * share / spread)[None, :]
    apart = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32) - middle
    g = tl.load(slope + start + place, mask=inside, other=0.0).to(tl.float32)
    if MODE == AGAIN:
        g = tl.where(apart * scale + summand <= 0, 0.0, g)
    tl.store(to_x + start + place, (scale * (g - level - apart * tilt)).to(to_x.dtype.element_ty), mask=inside)

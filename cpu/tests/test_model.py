"""The heads' sparse backward pass against torch's own."""

import pytest
import torch
from base.backends.cpu.model import _Head
from torch.nn import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size, share", [((19, 19), 0.06), ((5, 3), 0.0), ((5, 3), 1.0), ((1, 1), 0.5), ((38, 38), 0.02)])
def test_gradients_of_a_head_equal_torchs(dtype, stride, size, share):
    generator = torch.Generator().manual_seed(1)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    given = some(2, 32, *size).to(memory_format=torch.channels_last), some(24, 32, 3, 3), some(24)
    given = [t.requires_grad_() for t in given]
    output = functional.conv2d(*given, stride=stride, padding=1)
    slope = some(*output.shape) * (torch.rand(2, 1, *output.shape[2:], generator=generator) < share)
    wide = [t.detach().float().requires_grad_() for t in given]  # torch's own of bfloat16 has leftovers of memory in it where the level is 1×1
    want = torch.autograd.grad(functional.conv2d(*wide, stride=stride, padding=1), wide, slope.float())
    sparse = _Head.apply(*given, stride)
    assert torch.equal(sparse, output)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for expected, got in zip(want, torch.autograd.grad(sparse, given, slope), strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        apart = (got.float() - expected).norm()
        assert apart <= tolerance * expected.norm() + 1e-9


def test_no_image_without_a_gradient_is_missed():
    """Also a gradient in a single channel, and one that is not a number."""
    level, weight, bias = torch.randn(1, 4, 6, 6).requires_grad_(), torch.randn(5, 4, 3, 3), torch.randn(5)
    slope = torch.zeros(1, 5, 6, 6)
    slope[0, 3, 2, 4], slope[0, 0, 5, 0] = 1e-30, float("nan")
    (found,) = torch.autograd.grad(_Head.apply(level, weight, bias, 1), [level], slope)
    assert found[0, :, 5, 0].isnan().all() and (found[0, :, 2, 4] != 0).all() and not found[0, :, 0, 0].any()

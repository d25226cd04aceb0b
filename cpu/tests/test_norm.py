"""Batch norm with the shortcut and ReLU against torch's own, in float64."""

import copy

import pytest
import torch
from base.backends.cpu.model import NativeSSD
from base.backends.cpu.norm import norm_relu
from torch import nn


def given(shape, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
    tensors = [(torch.randn(shape, generator=generator) * 2 + 3).to(dtype).to(memory_format=torch.channels_last) for _ in range(3)]
    return norm, *tensors


def apart(got, expected):
    return ((got.double() - expected).norm() / (expected.norm() + 1e-9)).item()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 19, 13), (3, 37, 5, 5), (1, 3, 2, 4), (2, 1, 3, 1), (2, 100, 30, 20)], ids=str)
def test_results_and_gradients_equal_torchs(shape, dtype, with_shortcut, relu):
    norm, x, shortcut, slope = given(shape, dtype)
    wide = copy.deepcopy(norm).double()
    inputs = [t.requires_grad_() for t in ([x, shortcut] if with_shortcut else [x])]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    y = norm_relu(norm, *inputs, *[None] * (not with_shortcut), relu)
    want = wide(doubles[0]) + (doubles[1] if with_shortcut else 0)
    want = want.relu() if relu else want
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    rounding = 5e-5 if dtype == torch.float32 else 4e-3  # the weight's gradient feels the rounding of a mean far from zero
    assert apart(y, want) < rounding
    found = torch.autograd.grad(y, [*inputs, norm.weight, norm.bias], slope)
    expected = torch.autograd.grad(want, [*doubles, wide.weight, wide.bias], slope.double())
    assert all(apart(*pair) < rounding for pair in zip(found, expected, strict=True))
    for name in ("running_mean", "running_var"):
        assert apart(getattr(norm, name), getattr(wide, name)) < 1e-5
    assert norm.num_batches_tracked == 1


def test_evaluation_takes_the_running_statistics():
    norm, x, shortcut, _ = given((2, 64, 7, 9), torch.float32)
    norm(x * 3 + 1)
    norm.eval()
    with torch.no_grad():
        assert torch.allclose(norm_relu(norm, x, shortcut, True), (norm(x) + shortcut).relu(), atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    norm, x, shortcut, slope = given((4, 64, 40, 40), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = copy.deepcopy(norm)
            y = norm_relu(own, x.requires_grad_(), shortcut, True)
            results.append([y, *torch.autograd.grad(y, [x, own.weight, own.bias], slope), own.running_mean, own.running_var])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_far_mean_does_not_cancel():
    """Numbers whose mean is a thousand deviations from zero."""
    x = torch.randn(2, 16, 40, 40, generator=torch.Generator().manual_seed(1)) + 1000
    norm = nn.BatchNorm2d(16)
    y = norm_relu(norm, x, None, False)
    assert apart(y, copy.deepcopy(norm).double()(x.double())) < 1e-3


def test_what_is_not_a_number_passes():
    norm, x, _, slope = given((2, 32, 4, 4), torch.float32)
    x[0, 5, 1, 1], x[1, 7, 0, 0] = float("nan"), float("inf")
    y = norm_relu(norm, x.requires_grad_(), None, True)
    assert y[:, 5].isnan().all() and y[:, 7].isnan().any() and y[:, 6].isfinite().all()
    (to_x,) = torch.autograd.grad(y, x, slope)
    assert to_x[:, 5].isnan().all() and to_x[:, 6].isfinite().all()


def test_a_single_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value a channel"):
        norm_relu(nn.BatchNorm2d(3), torch.ones(1, 3, 1, 1), None, True)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_a_model_with_fixed_statistics_can_still_learn(backbone):
    """Frozen batch norm is torch's, and agrees with the native one."""
    torch.manual_seed(0)
    model = NativeSSD(num_classes=3, image_size=(96, 96), strides=(1,) * 6, backbone=backbone).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, 96, 96).to(memory_format=torch.channels_last)
    with torch.no_grad():
        still = model(images)
    learning = model(images)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(still, learning, strict=True))
    learning.offsets.sum().backward()
    assert model.backbone.bn1.weight.grad.isfinite().all()

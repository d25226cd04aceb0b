"""Batch norm with the shortcut and ReLU against torch's own, in float64."""

import copy

import pytest
import torch
from base.backends.nvidia import norm as module
from base.backends.nvidia.kernels import interpreted
from base.backends.nvidia.norm import fits, norm_apply, norm_relu, norm_statistics, norm_sums, norm_to_input
from base.backends.nvidia.tests.interpreted import two_ranks
from torch import nn

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or interpreted()), reason="needs a GPU or Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given(shape, dtype=torch.float32, seed=1):
    """A batch norm, x, a shortcut, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=generator))
        norm.bias.copy_(torch.randn(shape[1], generator=generator))
    tensors = [(torch.randn(shape, generator=generator) * 2 + 3).to(DEVICE, dtype).to(memory_format=torch.channels_last) for _ in range(3)]
    return norm.to(DEVICE), *tensors


def apart(got, expected):
    return ((got.double() - expected).norm() / (expected.norm() + 1e-9)).item()


def plain(norm, x, shortcut, relu):
    y = norm(x) if shortcut is None else norm(x) + shortcut
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 19, 13), (3, 37, 5, 5), (1, 3, 2, 4), (2, 1, 3, 1), (2, 140, 9, 10)], ids=str)
def test_results_and_gradients_equal_torchs(shape, dtype, with_shortcut, relu):
    norm, x, shortcut, slope = given(shape, dtype)
    assert fits(norm, x, shortcut)
    wide = copy.deepcopy(norm).double()
    inputs = [t.requires_grad_() for t in ([x, shortcut] if with_shortcut else [x])]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    y = norm_relu(norm, *inputs, *[None] * (not with_shortcut), relu)
    want = plain(wide, doubles[0], doubles[1] if with_shortcut else None, relu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if interpreted() else 4e-3}[dtype]  # the interpreter cuts bits off
    assert apart(y, want) < rounding
    found = torch.autograd.grad(y, [*inputs, norm.weight, norm.bias], slope)
    expected = torch.autograd.grad(want, [*doubles, wide.weight, wide.bias], slope.double())
    assert all(got.dtype == leaf.dtype for got, leaf in zip(found, [*inputs, norm.weight, norm.bias], strict=True))
    assert all(apart(*pair) < rounding for pair in zip(found, expected, strict=True))
    for name in ("running_mean", "running_var"):
        assert apart(getattr(norm, name), getattr(wide, name)) < 1e-5
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("with_shortcut", [True, False])
def test_many_blocks_of_rows_in_few_programs(with_shortcut, monkeypatch):
    """As it is for many rows: a program adds up several blocks, and there are more partial sums than are added at once."""
    monkeypatch.setattr(module, "PROGRAMS", 6)
    monkeypatch.setattr(module, "MOMENTS", 64)
    monkeypatch.setattr(module, "SLOPES", 64)
    monkeypatch.setattr(module, "FINISHED", (4, 2))
    norm, x, shortcut, slope = given((2, 11, 9, 7))
    wide = copy.deepcopy(norm).double()
    inputs = [x, shortcut][: 1 + with_shortcut]
    found, expected = [], []
    for own, result, to in ((norm, found, norm_relu), (wide, expected, plain)):
        leaves = [t.to(own.weight.dtype).detach().requires_grad_() for t in inputs]
        y = to(own, *leaves, *[None] * (not with_shortcut), True)
        result += [y, *torch.autograd.grad(y, [*leaves, own.weight, own.bias], slope.to(y.dtype)), own.running_mean, own.running_var]
    assert all(apart(*pair) < 1e-5 for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("with_shortcut", [True, False])
def test_any_memory_format(with_shortcut):
    """Also of the gradient, which comes expanded from a sum."""
    norm, x, shortcut, _ = given((2, 6, 5, 4))
    wide, inputs = copy.deepcopy(norm).double(), [x.contiguous(), shortcut.contiguous()][: 1 + with_shortcut]
    found, expected = [], []
    for own, result, to in ((norm, found, norm_relu), (wide, expected, plain)):
        leaves = [t.to(own.weight.dtype).detach().requires_grad_() for t in inputs]
        y = to(own, *leaves, *[None] * (not with_shortcut), True)
        result += [y, *torch.autograd.grad(y.sum(), [*leaves, own.weight, own.bias])]
    assert all(apart(got, want) < 1e-5 or (got - want).abs().max() < 1e-5 for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("takers", ["both", "first", "second"])
def test_two_that_take_the_output(with_shortcut, takers):
    """Their gradients are added; of one alone it is that."""
    norm, x, shortcut, slope = given((2, 20, 6, 5))
    wide, inputs = copy.deepcopy(norm).double(), [x, shortcut][: 1 + with_shortcut]
    leaves, doubles = ([t.to(kind).detach().requires_grad_() for t in inputs] for kind in (torch.float32, torch.float64))
    first, second = norm_relu(norm, *leaves, *[None] * (not with_shortcut), True, twice=True)
    want = plain(wide, *doubles, *[None] * (not with_shortcut), True)
    factors = {"both": (1.0, -3.0), "first": (1.0, 0.0), "second": (0.0, -3.0)}[takers]
    used = [(y, factor * slope) for y, factor in zip((first, second), factors, strict=True) if factor]
    found = torch.autograd.grad([y for y, _ in used], [*leaves, norm.weight, norm.bias], [s for _, s in used])
    expected = torch.autograd.grad(want, [*doubles, wide.weight, wide.bias], sum(factors) * slope.double())
    assert all(apart(*pair) < 1e-5 for pair in zip(found, expected, strict=True))


def test_evaluation_takes_the_running_statistics():
    norm, x, shortcut, slope = given((2, 20, 7, 9))
    norm(x * 3 + 1)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    with torch.no_grad():
        for relu in (True, False):
            assert torch.allclose(norm_relu(norm, x, shortcut, relu), plain(norm, x, shortcut, relu), atol=1e-5)
            assert torch.allclose(norm_relu(norm, x, None, relu), plain(norm, x, None, relu), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    x.requires_grad_()
    found, want = (torch.autograd.grad(f(norm, x, None, True), [x, norm.weight], slope) for f in (norm_relu, plain))
    assert all(map(torch.allclose, found, want))


def test_the_same_input_gives_the_same_bits():
    norm, x, shortcut, slope = given((2, 16, 20, 20) if DEVICE == "cpu" else (16, 64, 75, 75), torch.bfloat16)
    results = []
    for _ in range(2):
        own = copy.deepcopy(norm)
        y = norm_relu(own, x.requires_grad_(), shortcut, True)
        results.append([y, *torch.autograd.grad(y, [x, own.weight, own.bias], slope), own.running_mean, own.running_var])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_far_mean_does_not_cancel():
    """Numbers whose mean is a thousand deviations from zero."""
    x = torch.randn(2, 16, 40, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 1000
    norm = nn.BatchNorm2d(16, device=DEVICE)
    y = norm_relu(norm, x, None, False)
    assert apart(y, copy.deepcopy(norm).double()(x.double())) < 1e-4


def test_what_is_not_a_number_passes():
    norm, x, _, slope = given((2, 32, 4, 4))
    x[0, 5, 1, 1], x[1, 7, 0, 0], x[0, 9, 0, 0] = float("nan"), float("inf"), float("nan")
    y = norm_relu(norm, x.requires_grad_(), None, True)
    assert y[:, 5].isnan().all() and y[:, 7].isnan().any() and y[:, 9].isnan().all() and y[:, 6].isfinite().all()
    (to_x,) = torch.autograd.grad(y, x, slope)
    assert to_x[:, 5].isnan().all() and to_x[:, 6].isfinite().all()


def test_two_ranks_equal_one_with_the_whole_batch(tmp_path):
    norm, *tensors = given((4, 10, 3, 5))
    torch.save((norm, *tensors), tmp_path / "given.pt")
    torch.multiprocessing.spawn(two_ranks.run, (str(tmp_path), DEVICE), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", map_location=DEVICE) for rank in range(2)]
    wide = copy.deepcopy(norm).double()
    x, shortcut, slope = (t.double() for t in tensors)
    for case, inputs in enumerate(([x, shortcut], [x])):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = plain(wide, *leaves, *[None] * (2 - len(leaves)), True)
        want = [y, *torch.autograd.grad(y, [*leaves, wide.weight, wide.bias], slope)]
        for number, expected in enumerate(want):
            parts = [half[case][number] for half in halves]
            assert apart(torch.cat(parts) if expected.dim() == 4 else sum(parts), expected) < 1e-5
    for rank, half in enumerate(halves):
        y, running_mean, running_var, steps = half[2]
        assert torch.allclose(y, torch.full_like(y, (2 * rank - 1) * (0.25 / (0.25 + 1e-5)) ** 0.5), atol=1e-4)
        assert apart(running_mean, wide.running_mean) < 1e-5 and apart(running_var, wide.running_var) < 1e-5 and steps == 2


def test_a_single_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value a channel"):
        norm_relu(nn.BatchNorm2d(3, device=DEVICE), torch.ones(1, 3, 1, 1, device=DEVICE), None, True)


class Special(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        Special(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4).double(),
        nn.BatchNorm2d(5),
    ],
    ids=str,
)
def test_what_does_not_fit(norm):
    norm, x = norm.to(DEVICE), torch.ones(2, 4, 3, 3, device=DEVICE)
    assert fits(nn.BatchNorm2d(4, device=DEVICE), x, x) and not fits(norm, x)


def test_inputs_that_do_not_fit():
    norm, x = nn.BatchNorm2d(4, device=DEVICE), torch.ones(2, 4, 3, 3, device=DEVICE)
    assert not fits(norm, x.double()) and not fits(norm, x[0]) and not fits(norm, x[:0])
    assert not fits(norm, x, x.half()) and not fits(norm, x, x[:1])


def test_the_compiler_sees_it_whole(monkeypatch):
    monkeypatch.setattr(module, "on_kernels", lambda tensor: True)  # what it asks for on the CPU is not for the compiler
    norm, x, shortcut, slope = given((2, 5, 3, 4))
    results = []
    for f in (norm_relu, torch.compile(norm_relu, backend="aot_eager", fullgraph=True)):
        own, leaf = copy.deepcopy(norm), x.detach().requires_grad_()
        y = f(own, leaf, shortcut, True)
        results.append([y, *torch.autograd.grad(y, [leaf, own.weight, own.bias], slope), own.running_mean, own.running_var, own.num_batches_tracked])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operators_are_well_made():
    norm, x, shortcut, slope = given((2, 3, 2, 2))
    channels = norm.running_mean.clone(), norm.running_var.clone(), norm.weight.detach(), norm.bias.detach()
    torch.library.opcheck(norm_statistics, (x, *channels[:2], 0.1))
    torch.library.opcheck(norm_apply, (x, shortcut, *channels, 1e-5, True))
    torch.library.opcheck(norm_sums, (slope, x, shortcut, *channels, 1e-5, True))
    torch.library.opcheck(norm_to_input, (slope, x, *channels, torch.ones(2, 3, device=DEVICE), 1, 1e-5, True))

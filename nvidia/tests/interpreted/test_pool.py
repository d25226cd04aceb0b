"""Pooling, the first convolution and the heads against torch's own."""

import pytest
import torch
from base.backends.nvidia import heads, pool, stem
from base.backends.nvidia.kernels import interpreted
from base.backends.nvidia.model import FusedSSD
from base.backends.nvidia.norm import bias_relu
from base.backends.reference.model import SSD
from torch import nn
from torch.nn import functional

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or interpreted()), reason="needs a GPU or Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POOL = nn.MaxPool2d(3, 2, 1)


@pytest.fixture(autouse=True)
def whole_products():
    """float32 is multiplied as such, not as TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 8), (1, 3, 1, 1), (3, 5, 2, 7), (2, 1, 12, 3)], ids=str)
def test_pooling_and_its_gradient_equal_torchs(shape, dtype):
    x = channels_last(random(*shape, dtype=dtype).round()).requires_grad_()  # whole numbers: many are equal
    assert pool.fits(POOL, x)
    y, want = pool.max_pool(x), POOL(x)
    assert torch.equal(y, want) and y.is_contiguous(memory_format=torch.channels_last)
    slope = random(*y.shape, dtype=dtype, seed=2).mul(8).round() / 8  # whose sums are exact
    assert torch.equal(*(torch.autograd.grad(result, x, slope)[0] for result in (y, want)))
    torch.library.opcheck(pool.max_pool_op, (x.detach(),))
    torch.library.opcheck(pool.max_pool_backward, (slope, pool.max_pool_op(x.detach())[1], *x.shape[2:]))


def test_pooling_passes_what_is_no_number_or_infinite():
    x = channels_last(random(1, 2, 8, 8))
    x[0, 0, 3, 3], x[0, 1, 5, 2], x[0, 1, :2, :2] = float("nan"), float("inf"), float("-inf")
    x.requires_grad_()
    y, want = pool.max_pool(x), POOL(x)
    assert torch.equal(y.nan_to_num(9e9), want.nan_to_num(9e9)) and y.isnan().any() and y.isinf().any()
    assert torch.equal(*(torch.autograd.grad(result, x, torch.ones_like(want))[0] for result in (y, want)))


@pytest.mark.parametrize("other", [nn.MaxPool2d(2, 2, 1), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2, 0), nn.MaxPool2d(3, 2, 1, ceil_mode=True)])
def test_other_poolings_are_left_to_torch(other):
    assert not pool.fits(other, random(1, 2, 8, 8))


@pytest.mark.parametrize("shape", [(2, 3, 20, 14), (1, 3, 9, 11), (1, 3, 1, 2), (3, 3, 40, 41)], ids=str)
def test_the_first_convolution_and_its_gradient_equal_torchs(shape):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False).to(DEVICE)
    images = channels_last(random(*shape))
    assert stem.fits(convolution, images) and not stem.fits(convolution, images.clone().requires_grad_())
    y, want = stem.stem(images, convolution.weight), convolution(images)
    assert y.shape == want.shape and torch.allclose(y, want, atol=1e-5)
    slope = random(*y.shape, seed=2)
    assert torch.allclose(*(torch.autograd.grad(result, convolution.weight, slope)[0] for result in (y, want)), atol=1e-4)
    folded = stem.fold_images(images)
    torch.library.opcheck(stem.fold_images, (images,))
    torch.library.opcheck(stem.convolve, (folded, random(8, 16, 4, 4).requires_grad_()))
    torch.library.opcheck(stem.to_weight, (folded, slope))


def given_heads(classes=5, boxes=(4, 6), channels=(8, 12), sides=((5, 4), (2, 3)), stride=1):
    torch.manual_seed(0)
    offset, kind = (
        nn.ModuleList(nn.Conv2d(c, n * values, 3, stride=stride, padding=1) for c, n in zip(channels, boxes, strict=True)).to(DEVICE)
        for values in (4, classes)
    )
    levels = [channels_last(random(2, c, *side)).requires_grad_() for c, side in zip(channels, sides, strict=True)]
    return offset, kind, levels


def plain_heads(offset, kind, levels, classes):
    def all_of(heads, values):
        return torch.cat([head(x).permute(0, 2, 3, 1).reshape(2, -1, values) for head, x in zip(heads, levels, strict=True)], 1)

    return all_of(offset, 4), all_of(kind, classes)


@pytest.mark.parametrize("stride", [1, 2])
def test_heads_and_their_gradients_equal_torchs(stride):
    offset, kind, levels = given_heads(stride=stride)
    assert heads.fits(offset, kind, levels, 5)
    found, want = heads.apply_heads(offset, kind, levels, 5), plain_heads(offset, kind, levels, 5)
    assert all(a.shape == b.shape and a.is_contiguous() and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want, strict=True))
    slopes = [random(*t.shape, seed=3) for t in want]
    inputs = [*levels, *offset.parameters(), *kind.parameters()]
    pairs = zip(*(torch.autograd.grad(list(result), inputs, slopes) for result in (found, want)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    outputs = [random(2, 40 if n == 4 else 56, 3, 2) for n in (4, 6)]
    torch.library.opcheck(heads.gather_backward, (random(2, 60, 4), random(2, 60, 5), [40, 3, 2, 56, 3, 2], [4, 6]))
    torch.library.opcheck(heads.gather, (outputs, [random(9 * n) for n in (4, 6)], [4, 6], 5))


def test_heads_that_look_at_different_cells_are_left_to_torch():
    offset, _, levels = given_heads(stride=1)
    _, kind, _ = given_heads(stride=2)
    assert not heads.fits(offset, kind, levels, 5)


def test_the_whole_model_and_its_gradients_are_the_references():
    """Near those in float64. Not nearer: a number at zero, or two at a maximum, may fall otherwise, in the reference too."""
    torch.manual_seed(0)
    options = {"num_classes": 4, "image_size": (64, 64), "strides": (1, 1, 1, 1, 1, 1), "backbone": "resnet18"}
    plain = SSD(**options).to(DEVICE).to(memory_format=torch.channels_last)
    fused = FusedSSD(**options).to(DEVICE).to(memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())
    results = []
    for model in (plain.double(), fused):
        predictions = model(channels_last(random(2, 3, 64, 64)).to(next(model.parameters()).dtype))
        labels = torch.zeros(predictions.logits.shape[:2], dtype=torch.long, device=DEVICE)
        loss = functional.cross_entropy(predictions.logits.flatten(0, 1), labels.flatten()) + predictions.offsets.square().mean()
        results.append([*predictions, *torch.autograd.grad(loss, list(model.parameters()))])
    for number, (want, got) in enumerate(zip(*results, strict=True)):
        assert got.shape == want.shape and (got - want).norm() <= (1e-4 if number < 2 else 0.05) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_and_relu_equal_torchs(dtype):
    x, bias = channels_last(random(2, 20, 5, 7, dtype=dtype)).requires_grad_(), random(20, seed=2).requires_grad_()
    y, want = bias_relu(x, bias), (x.float() + bias[:, None, None]).relu()
    assert y.dtype == dtype and torch.allclose(y.float(), want, rtol=0.01 if dtype is torch.bfloat16 else 1e-6)
    slope = random(*y.shape, dtype=dtype, seed=3)
    pairs = zip(torch.autograd.grad(y, [x, bias], slope), torch.autograd.grad(want, [x, bias], slope.float()), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)

"""The multibox loss of every backend, against its equations in float64."""

import math

import numpy as np
import pytest
import torch

from base.contracts import Predictions, Targets
from tests.conftest import DEVICE


def plain_loss(offsets, logits, want_offsets, labels) -> float:
    """The multibox loss in float64 NumPy, image by image, straight from its equations."""
    total = 0.0
    for o, z, t, c in zip(offsets, logits, want_offsets, labels, strict=True):
        positive = c > 0
        if not positive.any():
            continue
        top = z.max(1, keepdims=True)
        entropy = (np.log(np.exp(z - top).sum(1)) + top[:, 0]) - z[np.arange(len(c)), c]
        apart = np.abs(o - t)[positive]
        smooth = np.where(apart < 1, 0.5 * apart**2, apart - 0.5).sum()
        hardest = np.sort(entropy[~positive])[::-1][: 3 * positive.sum()]
        total += (smooth + entropy[positive].sum() + hardest.sum()) / positive.sum()
    return total / len(labels)


def loss_case(share: float, images: int = 3, count: int = 60, classes: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((images, count)) < share, rng.integers(1, classes, (images, count)), 0)
    offsets, logits, want = rng.normal(0, 1.5, (images, count, 4)), rng.normal(0, 2, (images, count, classes)), rng.normal(0, 1, (images, count, 4))
    return offsets, logits, want * (labels > 0)[..., None], labels


def tensors(offsets, logits, want, labels, dtype=torch.float32):
    made = [torch.from_numpy(a).to(DEVICE, dtype).requires_grad_() for a in (offsets, logits)]
    return Predictions(*made), Targets(torch.from_numpy(want).float().to(DEVICE), torch.from_numpy(labels).to(DEVICE))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.24, 0.3, 0.7, 1.0])
def test_loss_equals_its_equations(backend, share):
    """Also where three times the positives are more than there are negatives."""
    case = loss_case(share)
    assert backend.loss(*tensors(*case)).item() == pytest.approx(plain_loss(*case), rel=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_gradients_equal_finite_differences_of_the_equations(backend, share):
    case, rng = loss_case(share, seed=1), np.random.default_rng(2)
    predictions, targets = tensors(*case)
    backend.loss(predictions, targets).backward()
    for which in range(2):
        for _ in range(3):
            direction = rng.normal(0, 1, case[which].shape)
            ahead, behind = ([*case] for _ in range(2))
            ahead[which], behind[which] = case[which] + 1e-6 * direction, case[which] - 1e-6 * direction
            slope = (plain_loss(*ahead) - plain_loss(*behind)) / 2e-6
            assert (predictions[which].grad.cpu().double().numpy() * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_an_image_without_positives_gives_nothing(backend):
    offsets, logits, want, labels = loss_case(0.2)
    labels[1], want[1] = 0, 0
    predictions, targets = tensors(offsets, logits, want, labels)
    loss = backend.loss(predictions, targets)
    loss.backward()
    assert loss.item() == pytest.approx(plain_loss(offsets, logits, want, labels), rel=1e-5)  # it counts in the mean
    assert not predictions.offsets.grad[1].any() and not predictions.logits.grad[1].any()
    assert predictions.logits.grad[0].any() and predictions.offsets.grad[2].any()
    predictions, targets = tensors(offsets, logits, want * 0, labels * 0)
    loss = backend.loss(predictions, targets)
    loss.backward()
    assert loss.item() == 0 and not predictions.logits.grad.any() and not predictions.offsets.grad.any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(backend, broken):
    case = loss_case(0.2)
    positive = int(np.flatnonzero(case[3][0])[0])
    negative = int(np.flatnonzero(case[3][0] == 0)[0])
    for which, box in ((0, positive), (1, positive), (1, negative)):
        values = [array.copy() for array in case]
        values[which][0, box, 0] = broken
        assert not math.isfinite(backend.loss(*tensors(*values)).item())


def test_loss_of_large_logits_is_finite(backend):
    offsets, logits, want, labels = loss_case(0.2)
    loss = backend.loss(*tensors(offsets, logits * 1e4, want, labels))
    assert loss.item() == pytest.approx(plain_loss(offsets, logits * 1e4, want, labels), rel=1e-4)


def test_loss_of_bfloat16_predictions(backend):
    if "bfloat16" not in backend.dtypes:
        pytest.skip("this backend does not claim bfloat16")
    case = loss_case(0.2)
    predictions, targets = tensors(*case, dtype=torch.bfloat16)
    loss = backend.loss(predictions, targets)
    loss.backward()
    exact = plain_loss(*(p.detach().double().cpu().numpy() for p in predictions), *case[2:])
    assert loss.item() == pytest.approx(exact, rel=5e-3)
    assert predictions.logits.grad.dtype == torch.bfloat16 and torch.isfinite(predictions.logits.grad).all()

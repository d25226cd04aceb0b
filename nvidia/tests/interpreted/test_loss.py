"""The loss's kernels beyond what every backend is held to: dtypes, selection in pieces, ties, custom operators."""

import pytest
import torch
from base.backends.nvidia import loss as kernels
from base.backends.reference.loss import multibox_loss as plain

from base.contracts import Predictions, Targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(images=2, count=300, classes=9, share=0.03, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(images, count, 4, generator=generator).to(dtype)
    logits = (torch.randn(images, count, classes, generator=generator) * 3).to(dtype)
    labels = torch.randint(1, classes, (images, count), generator=generator)
    labels *= torch.rand(images, count, generator=generator) < share
    wanted = torch.randn(images, count, 4, generator=generator) * (labels > 0)[..., None]
    leaves = (t.to(DEVICE).requires_grad_() for t in (offsets, logits))
    return Predictions(*leaves), Targets(wanted.to(DEVICE), labels.to(DEVICE))


def equal_to_the_reference(predictions, targets, tolerance=1e-5):
    loss, want = kernels.multibox_loss(predictions, targets), plain(predictions, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
    found, expected = (torch.autograd.grad(x, list(predictions)) for x in (loss, want))
    for got, right, given in zip(found, expected, predictions, strict=True):
        assert got.dtype == given.dtype
        torch.testing.assert_close(got.float(), right.float(), rtol=1e-2 if given.dtype != torch.float32 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.004, 0.03, 0.4, 1.0])
def test_loss_and_gradients_equal_the_references(dtype, share):
    equal_to_the_reference(*case(dtype=dtype, share=share))


@pytest.mark.parametrize("classes", [2, 3, 64, 81])
@pytest.mark.parametrize("count", [1, 17, 256])
def test_any_number_of_classes_and_default_boxes(classes, count):
    equal_to_the_reference(*case(images=3, count=count, classes=classes, share=0.1))


def test_more_default_boxes_than_are_looked_at_together(monkeypatch):
    monkeypatch.setattr(kernels, "WHOLE", 64)
    equal_to_the_reference(*case(count=300, share=0.02))


def test_predictions_need_not_be_contiguous():
    predictions, targets = case()
    views = Predictions(*(t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in predictions))
    equal_to_the_reference(views, targets)


def test_of_equally_hard_negatives_the_first_are_taken():
    logits = torch.zeros(1, 40, 5, device=DEVICE, requires_grad=True)
    offsets = torch.zeros(1, 40, 4, device=DEVICE, requires_grad=True)
    labels = torch.zeros(1, 40, dtype=torch.long, device=DEVICE)
    labels[0, 20], labels[0, 30] = 2, 1
    loss = kernels.multibox_loss(Predictions(offsets, logits), Targets(torch.zeros(1, 40, 4, device=DEVICE), labels))
    loss.backward()
    touched = logits.grad.abs().sum(2)[0].nonzero().flatten().tolist()
    assert touched == [0, 1, 2, 3, 4, 5, 20, 30]


def test_what_is_not_a_number_is_not_hidden():
    predictions, targets = case(images=1)
    broken = predictions.logits.detach().clone()
    broken[0, (targets.labels[0] == 0).nonzero()[5], 3] = float("nan")
    assert kernels.multibox_loss(Predictions(predictions.offsets, broken), targets).isnan()


def test_the_operators_are_as_torch_wants_them():
    predictions, targets = case(images=2, count=40, classes=5, share=0.1)
    torch.library.opcheck(kernels.multibox_op, (*predictions, *targets))


def test_shapes_that_do_not_fit_are_refused():
    predictions, targets = case()
    with pytest.raises(ValueError, match="the loss needs offsets"):
        kernels.multibox_loss(predictions, Targets(targets.offsets, targets.labels[:, 1:]))

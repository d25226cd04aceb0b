"""What this backend does where there is no card of Iluvatar's: every line of it but the precision, on CPU tensors."""

import os
import re
import subprocess
import sys

import pytest
import torch
from base.backends.iluvatar import matcher
from base.backends.iluvatar.decoder import decode
from base.backends.iluvatar.step import HalfStep
from base.backends.reference import decoder as reference
from base.backends.reference.matcher import match as plain

from base.backend import load_backend
from base.boxes import default_boxes
from base.contracts import Batch, Predictions
from base.errors import UserError
from tests.conftest import ROOT, files_on, one_line_without_its_device, same_losses_on_the_cpu

SMALL = default_boxes((300, 300), ((6, 6), (4, 4), (3, 3), (2, 2), (1, 1), (1, 1)))


@pytest.mark.parametrize("images", [0.1, 5])
def test_matching_more_images_than_are_taken_at_once(monkeypatch, images):
    monkeypatch.setattr(matcher, "PAIRS", int(images * 7 * len(SMALL)))
    torch.manual_seed(0)
    corner = torch.rand(13, 7, 2) * 0.7
    boxes, labels = torch.cat([corner, corner + 0.05 + torch.rand_like(corner) * 0.25], -1), torch.randint(0, 5, (13, 7))
    boxes[:, 3] = boxes[:, 1]  # the same box twice
    labels[5] = 0  # an image without boxes
    for found, want in zip(matcher.match(boxes, labels, SMALL), plain(boxes, labels, SMALL), strict=True):
        assert torch.equal(found, want) and found.dtype is want.dtype
    assert matcher.match(boxes[:, :0], labels[:, :0], SMALL).labels.count_nonzero() == 0


def test_decoding_of_float16():
    """Where there is a GPU, of any make, the results come back to it."""
    torch.manual_seed(0)
    predictions = Predictions(torch.randn(2, len(SMALL), 4).half(), (torch.randn(2, len(SMALL), 5) * 3).half().requires_grad_())
    place = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = decode(Predictions(*(tensor.to(place) for tensor in predictions)), SMALL.to(place))
    for image, want in zip(found, reference.decode(predictions, SMALL), strict=True):
        assert len(want.scores) > 20 and torch.equal(image.labels.cpu(), want.labels)
        assert {(column.device, column.dtype) for column in (image.boxes, image.scores)} == {(place, torch.float32)}
        torch.testing.assert_close((image.boxes.cpu(), image.scores.cpu()), (want.boxes, want.scores.detach()), rtol=0, atol=1e-5)
    assert decode(Predictions(*(tensor[:0].to(place) for tensor in predictions)), SMALL.to(place)) == []


class OnTheCPU(HalfStep):
    """The step as it is on a card, on CPU tensors: torch's CPU operations know float16 too."""

    def precision(self, device: torch.device) -> torch.dtype:
        return super().precision(torch.device("cuda"))


def test_float16_goes_where_float32_goes_and_its_loss_scale_is_kept():
    batch = Batch(
        torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[[0.1, 0.1, 0.6, 0.7]], [[0.3, 0.2, 0.9, 0.8]]]), torch.tensor([[1], [2]]), torch.arange(2), torch.full((2, 2), 96),
    )  # fmt: skip
    backend, directions, values, steps = load_backend("iluvatar"), [], [], []
    for kind in (HalfStep, OnTheCPU):
        torch.manual_seed(0)
        model = backend.model(num_classes=4, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18")
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=0.0)
        step = kind(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device="cpu")
        for _ in range(10):  # the first loss scales are too large for this batch, and a step with one of them changes nothing
            values.append(step(batch, 1e-3).item())
            direction = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            if direction.any():
                break
        directions.append(direction)
        steps.append(step)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert values == pytest.approx([values[0]] * len(values), rel=0.03) and torch.cosine_similarity(*directions, dim=0) > 0.9
    plain_step, half = steps
    assert plain_step.state_dict() == {} and half.state_dict()["scale"] > 1
    with pytest.raises(UserError, match="loss scale"):
        plain_step.load_state_dict(half.state_dict())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_one_line_says_what_is_missing_and_what_runs_here(train):
    one_line_without_its_device(train, "iluvatar")


def test_a_run_on_the_cpu(train, tmp_path):
    same_losses_on_the_cpu(train, tmp_path, "iluvatar")


def passed(*arguments: str) -> int:
    """Runs tests that every backend is put through on this one; → how many passed; skipped is only a precision that it does not claim."""
    environment = {**os.environ, "SSD_TEST_BACKENDS": "iluvatar", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and all("does not claim" in line for line in skipped), done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_golden_data():
    assert passed("tests/test_golden.py") > 5


@pytest.mark.long
@pytest.mark.parametrize("subject", ["components", "weights", "verify"])
def test_what_every_backend_must_do(subject):
    assert passed(*files_on(subject), "-k", "iluvatar") > 3

"""The decoder of every backend: what it has to keep, and what it may not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.boxes import decode, default_boxes, iou
from base.contracts import Detections, Predictions
from tests.conftest import DEVICE

DEFAULTS = default_boxes((300, 300), ((4, 4), (3, 3), (2, 2), (2, 2), (1, 1), (1, 1))).to(DEVICE)


def random_predictions(seed: int, images: int = 2, classes: int = 4, sharp: float = 3.0) -> Predictions:
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.randn(images, len(DEFAULTS), 4, generator=draw)
    return Predictions(offsets.to(DEVICE), (torch.randn(images, len(DEFAULTS), classes, generator=draw) * sharp).to(DEVICE))


def check_detections(found: Detections, limit: int) -> None:
    count = len(found.scores)
    assert count <= limit and found.boxes.shape == (count, 4) and found.labels.shape == (count,)
    assert found.labels.dtype == torch.int64 and found.boxes.is_floating_point() and found.scores.is_floating_point()
    assert (found.scores.diff() <= 0).all()
    assert ((found.labels >= 1) & (found.labels < 4)).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 0.3, 0.9]), st.sampled_from([0.2, 0.45, 0.5, 0.8]), st.sampled_from([1, 5, 40, 1000]))
def test_what_is_kept_and_what_is_not(backend, seed, threshold, overlap, limit):
    predictions = random_predictions(seed)
    boxes = decode(predictions.offsets, DEFAULTS.xywh)
    scores = predictions.logits.softmax(-1)
    for n, found in enumerate(backend.decoder(predictions, DEFAULTS, threshold, overlap, limit)):
        check_detections(found, limit)
        assert (found.scores > threshold).all()
        for label in range(1, 4):
            kept, kept_scores = found.boxes[found.labels == label], found.scores[found.labels == label]
            between = iou(kept, kept).fill_diagonal_(0)
            assert (between < overlap + 1e-6).all()
            # Every box that is a candidate is kept, or a better kept one covers it, or the list was full before its turn.
            candidates = scores[n, :, label] > threshold + 1e-6
            mine, value = boxes[n, candidates], scores[n, candidates, label]
            covered = ((iou(mine, kept) >= overlap - 1e-5) & (kept_scores >= value[:, None] - 1e-6)).any(1)
            itself = (iou(mine, kept) > 0.999).any(1)
            late = value <= found.scores[-1] + 1e-6 if len(found.scores) == limit else torch.zeros_like(covered)
            assert (covered | itself | late).all()


def same(a: Detections, b: Detections) -> None:
    assert a.labels.tolist() == b.labels.tolist()
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.boxes, b.boxes)


def test_a_batch_decodes_as_its_images_do(backend):
    predictions = random_predictions(3, images=4)
    together = backend.decoder(predictions, DEFAULTS)
    assert len(together) == 4 and sum(len(found.scores) for found in together) > 20
    for n, found in enumerate(together):
        same(found, backend.decoder(Predictions(predictions.offsets[n : n + 1], predictions.logits[n : n + 1]), DEFAULTS)[0])


def test_a_limit_keeps_the_best(backend):
    predictions = random_predictions(4)
    for few, all_of_them in zip(backend.decoder(predictions, DEFAULTS, max_detections=7), backend.decoder(predictions, DEFAULTS), strict=True):
        assert len(few.scores) == 7 < len(all_of_them.scores)
        same(few, Detections(*(column[:7] for column in all_of_them)))


def test_the_best_200_of_a_class_are_looked_at(backend):
    many = default_boxes((300, 300), ((12, 12), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1))).to(DEVICE)
    draw = torch.Generator().manual_seed(0)
    logits = torch.full((1, len(many), 4), -9.0)
    logits[..., 0], logits[..., 1] = 0, torch.randn(1, len(many), generator=draw)
    (found,) = backend.decoder(Predictions(torch.zeros(1, len(many), 4, device=DEVICE), logits.to(DEVICE)), many, 0.05, 1.1, 1000)
    best = logits.softmax(-1)[0, :, 1].sort(descending=True).values[:200]
    torch.testing.assert_close(found.scores.cpu(), best)


def test_nothing_found(backend):
    predictions = random_predictions(5)
    sure = predictions.logits.clone()
    sure[..., 0] = 100  # background
    found = backend.decoder(Predictions(predictions.offsets, sure), DEFAULTS)
    assert len(found) == 2
    for image in found:
        check_detections(image, 0)
    assert backend.decoder(Predictions(predictions.offsets[:0], sure[:0]), DEFAULTS) == []


def test_predictions_that_are_not_finite_do_not_crash_and_stay_in_their_image(backend):
    predictions = random_predictions(6, images=3)
    want = backend.decoder(predictions, DEFAULTS)
    predictions.logits[0] = float("nan")
    predictions.offsets[2, :, 2:] = float("inf")
    found = backend.decoder(predictions, DEFAULTS)
    assert len(found[0].scores) == 0
    same(found[1], want[1])
    check_detections(found[2], 200)


def test_half_precision_predictions_are_decoded(backend):
    if "bfloat16" not in backend.dtypes:
        pytest.skip("this backend does not claim bfloat16")
    predictions = random_predictions(7)
    found = backend.decoder(Predictions(*(p.bfloat16() for p in predictions)), DEFAULTS)
    want = backend.decoder(Predictions(*(p.bfloat16().float() for p in predictions)), DEFAULTS)
    for a, b in zip(found, want, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        torch.testing.assert_close(a.boxes.float(), b.boxes.float(), atol=1e-3, rtol=1e-3)

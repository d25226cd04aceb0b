"""The decoder's kernels against the reference and the golden data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from base.backends.nvidia import decoder
from base.backends.nvidia.decoder import decode, decode_op
from base.backends.nvidia.kernels import interpreted
from base.backends.reference import decoder as reference

from base.boxes import DefaultBoxes, default_boxes
from base.contracts import Detections, Predictions

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or interpreted()), reason="needs a GPU or Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"


def defaults(first: int = 3) -> DefaultBoxes:
    """4·first² + 66 default boxes."""
    return default_boxes((300, 300), ((first, first), (2, 2), (2, 2), (1, 1), (2, 1), (1, 1))).to(DEVICE)


def given(boxes: DefaultBoxes, classes: int, images: int = 1, sharp: float = 2.0, seed: int = 0) -> Predictions:
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.randn(images, len(boxes), 4, generator=draw)
    return Predictions(offsets.to(DEVICE), (torch.randn(images, len(boxes), classes, generator=draw) * sharp).to(DEVICE))


def check(found: list[Detections], want: list[Detections]) -> None:
    """The same detections; only those with scores a rounding apart may have changed places."""
    assert len(found) == len(want)
    for got, expected in zip(found, want, strict=True):
        assert (got.boxes.dtype, got.labels.dtype, got.scores.dtype) == (torch.float32, torch.int64, torch.float32)
        assert got.boxes.device.type == DEVICE and got.boxes.shape == expected.boxes.shape
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-6, rtol=1e-5)
        assert (got.scores.diff() <= 0).all()
        apart = (got.boxes[:, None] - expected.boxes).abs().amax(-1) + (got.scores[:, None] - expected.scores).abs()
        paired = (apart < 1e-4) & (got.labels[:, None] == expected.labels)
        assert paired.any(0).all() and paired.any(1).all()


def test_the_golden_detections():
    data = np.load(GOLDEN / "decode.npz")
    boxes = default_boxes((300, 300), ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)))
    inverse = torch.empty_like(boxes.mlperf_order)
    inverse[boxes.mlperf_order] = torch.arange(len(boxes))
    own = [torch.from_numpy(data[key].astype(np.float32)).transpose(1, 2)[:, inverse].to(DEVICE) for key in ("loc", "logits")]
    for number, image in enumerate(decode(Predictions(*own), boxes.to(DEVICE))):
        got = np.concatenate([column.cpu().numpy() for column in (image.labels[:, None], image.boxes)], 1)
        want = np.concatenate([data[f"{number}_labels"][:, None], data[f"{number}_boxes_ltrb"]], 1)
        np.testing.assert_allclose(image.scores.cpu().numpy(), data[f"{number}_scores"], atol=1e-4)
        got, want = (rows[np.lexsort(np.round(rows, 3).T[::-1])] for rows in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
    "first, classes, images, settings",
    [
        (3, 5, 1, (0.05, 0.5, 200)),
        (3, 5, 3, (0.3, 0.3, 5)),
        (2, 2, 2, (0.05, 0.5, 1)),
        (2, 81, 1, (0.05, 0.5, 200)),
        (1, 300, 1, (0.1, 0.5, 10**12)),
        (2, 3, 1, (0.05, 0.5, 0)),
    ],
)
def test_it_is_the_references(first, classes, images, settings):
    boxes = defaults(first)
    predictions = given(boxes, classes, images)
    want = reference.decode(predictions, boxes, *settings)
    assert settings[2] == 0 or all(len(image.scores) for image in want)
    check(decode(predictions, boxes, *settings), want)


@pytest.mark.parametrize("threshold, segment", [(0.0, 2048), (-1.0, 128)])
def test_every_score_a_candidate(threshold, segment, monkeypatch):
    """More than 200 of each class, of which the best 200 are looked at; also scores of zero, below which a threshold can be."""
    monkeypatch.setattr(decoder, "SEGMENT", segment)
    boxes = defaults(8 if DEVICE == "cpu" else 46)
    predictions = given(boxes, 5, sharp=0.5)
    predictions.logits[:, torch.arange(len(boxes)) % 3 > 0, 2] = -1000.0
    assert len(boxes) >= 322 and (predictions.logits.softmax(-1) == 0).any()
    check(decode(predictions, boxes, threshold, 0.15, 60), reference.decode(predictions, boxes, threshold, 0.15, 60))


def test_ties_fall_as_the_references():
    """Equal scores within a class, at its 200th place too, and across classes: label, then default box, decide."""
    boxes = defaults(8)
    predictions = given(boxes, 4, seed=3)
    predictions.logits[:] = predictions.logits[:, torch.arange(len(boxes)) % 3]
    predictions.logits[..., 2] = predictions.logits[..., 3]
    for settings in ((0.05, 1.1, 150), (0.05, 0.2, 200)):
        (found,), (want,) = decode(predictions, boxes, *settings), reference.decode(predictions, boxes, *settings)
        assert torch.equal(found.labels, want.labels) and len(found.labels) > 20
        torch.testing.assert_close(found.boxes, want.boxes)
    predictions.logits[..., 1] = -1000.0
    (found,), (want,) = (f(predictions, boxes, 0.0, 1.1, 1000) for f in (decode, reference.decode))
    assert len(found.labels) == 600 - 200 and torch.equal(found.labels, want.labels)  # of the 322 of two classes, 200 each
    torch.testing.assert_close(found.boxes, want.boxes)


@pytest.mark.parametrize("iou_threshold", [0.25, 1 / 3, 0.5])
def test_an_overlap_that_is_just_the_threshold_is_too_much(iou_threshold):
    """Boxes on a grid, whose overlaps are fractions of small numbers."""
    sides = torch.arange(0, 4) / 8
    xywh = torch.cartesian_prod(sides + 0.25, torch.tensor([0.5]), torch.tensor([0.25, 0.5]), torch.tensor([0.25, 0.5])).to(DEVICE)
    boxes = DefaultBoxes(xywh, xywh, torch.arange(len(xywh), device=DEVICE), ((1, len(xywh)),))
    predictions = given(boxes, 2)
    predictions.offsets.zero_()
    check(decode(predictions, boxes, 0.0, iou_threshold), reference.decode(predictions, boxes, 0.0, iou_threshold))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(dtype):
    boxes = defaults(2)
    predictions = Predictions(*(t.to(dtype) for t in given(boxes, 4)))
    check(decode(predictions, boxes), reference.decode(predictions, boxes))


def test_any_layout_of_memory():
    boxes = defaults(1)
    want = given(boxes, 4, images=2)
    turned = Predictions(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in want))
    together = torch.cat([torch.zeros_like(want.offsets), *want], -1)[:, None].expand(-1, 2, -1, -1)[:, 1]
    for predictions in (turned, Predictions(together[..., 4:8], together[..., 8:])):
        assert not any(t.is_contiguous() for t in predictions)
        check(decode(predictions, boxes), reference.decode(want, boxes))


def test_groups_of_images(monkeypatch):
    """What may need more memory than there is room for is decoded a few images at a time."""
    boxes = defaults(1)
    predictions = given(boxes, 4, images=5)
    monkeypatch.setattr(decoder, "ROOM", 2 * 8 * 3 * len(boxes))
    check(decode(predictions, boxes), reference.decode(predictions, boxes))


def test_what_is_not_finite_stays_where_it_is():
    boxes = defaults(1)
    predictions = given(boxes, 4, images=4)
    predictions.logits[0] = float("nan")
    predictions.logits[1, ::2, 2] = float("inf")
    predictions.logits[2, :, 0] = float("-inf")
    predictions.offsets[3, ::2, 2:] = float("inf")
    predictions.offsets[3, 1::4, 0] = float("nan")
    found, want = decode(predictions, boxes), reference.decode(predictions, boxes)
    assert len(found[0].scores) == 0
    check(found[:3], want[:3])
    assert torch.equal(found[3].labels, want[3].labels)
    torch.testing.assert_close(found[3].boxes, want[3].boxes, equal_nan=True)


def test_nothing_found():
    boxes = defaults(1)
    predictions = given(boxes, 4, images=2)
    predictions.logits[..., 0] = 100
    check(decode(predictions, boxes), reference.decode(predictions, boxes))
    assert decode(Predictions(predictions.offsets[:0], predictions.logits[:0]), boxes) == []
    check(decode(Predictions(predictions.offsets, predictions.logits[..., :1]), boxes), reference.decode(predictions, boxes))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p, b: (Predictions(p.offsets[:, 1:], p.logits), b), r"offsets must be \(N, A, 4\)"),
        (lambda p, b: (Predictions(p.offsets[:, 1:], p.logits[:, 1:]), b), "default boxes"),
        (lambda p, b: (Predictions(p.offsets.long(), p.logits), b), "floating-point numbers"),
        (lambda p, b: (Predictions(p.offsets.to("meta"), p.logits), b), "on meta"),
        (lambda p, b: (Predictions(p.offsets, p.logits[..., :0]), b), "classes"),
        (lambda p, b: (p, b, float("nan")), "must be numbers"),
        (lambda p, b: (p, b, 0.05, float("nan")), "must be numbers"),
        (lambda p, b: (p, b, 0.05, 0.5, -1), "negative, and is -1"),
    ],
)
def test_what_cannot_be_decoded(change, said):
    boxes = defaults(1)
    with pytest.raises(ValueError, match=said):
        decode(*change(given(boxes, 3), boxes))


def test_the_operator_is_well_made():
    boxes = defaults(1)
    for limit in (0, 4):
        torch.library.opcheck(decode_op, (*given(boxes, 3), boxes.xywh, 0.05, 0.5, limit))

"""Model, matcher, loss, decoder, optimizer, step and evaluator of every backend, against plain statements of what they do."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from base.backends.reference.step import DEVIATION, MEAN, normalise
from hypothesis import given, settings
from hypothesis import strategies as st

from base.backend import load_backend
from base.boxes import BOXES_PER_CELL, DefaultBoxes, decode, default_boxes, encode, iou, ltrb_to_xywh
from base.contracts import FIGURES, Batch, Detections, Predictions, Targets
from base.errors import UserError
from tests.conftest import DEVICE
from tests.loss_scale import ScaledStep


def small_model(backend, **changes):
    torch.manual_seed(0)
    settings = {"num_classes": 4, "image_size": (96, 96), "strides": (1,) * 6, "backbone": "resnet18", **changes}
    return backend.model(**settings).to(DEVICE)


# Model


def test_the_coco_model_has_mlperfs_parameters(model_300):
    assert sum(parameter.numel() for parameter in model_300.parameters() if parameter.requires_grad) == 19_972_534


SHAPES = [
    ((300, 300), (1, 1, 2, 2, 2, 1), [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]),
    ((300, 400), (1, 1, 2, 2, 2, 1), [(38, 50), (19, 25), (10, 13), (5, 7), (3, 5), (1, 3)]),
    ((200, 96), (1,) * 6, [(25, 12), (25, 12), (25, 12), (25, 12), (23, 10), (21, 8)]),
    ((128, 128), (1, 1, 2, 1, 1, 2), [(16, 16), (8, 8), (8, 8), (8, 8), (3, 3), (1, 1)]),
    ((320, 240), (3, 3, 2, 2, 1, 1), [(14, 10), (7, 5), (4, 3), (4, 3), (3, 2), (2, 2)]),
    ((97, 131), (2, 2, 1, 1, 1, 1), [(7, 9), (7, 9), (7, 9), (7, 9), (6, 8), (5, 7)]),
]


@pytest.mark.parametrize(("size", "strides", "levels"), SHAPES)
def test_there_is_a_default_box_for_every_prediction(backend, size, strides, levels):
    model = small_model(backend, image_size=size, strides=strides).eval()
    with torch.no_grad():
        predictions = model(torch.randn(2, 3, *size, device=DEVICE))
    boxes = model.default_boxes
    assert list(boxes.feature_sizes) == levels
    count = sum(rows * columns * cell for (rows, columns), cell in zip(levels, BOXES_PER_CELL, strict=True))
    assert len(boxes) == count and predictions.offsets.shape == (2, count, 4) and predictions.logits.shape == (2, count, 4)
    assert sorted(boxes.mlperf_order.tolist()) == list(range(count))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_backbones(backend, backbone):
    model = small_model(backend, backbone=backbone).eval()
    with torch.no_grad():
        predictions = model(torch.randn(1, 3, 96, 96, device=DEVICE))
    assert torch.isfinite(predictions.offsets).all() and predictions.offsets.shape[1] == len(model.default_boxes)


def test_memory_format_of_the_input_does_not_matter(backend):
    model, images = small_model(backend).eval(), torch.randn(2, 3, 96, 96, device=DEVICE)
    with torch.no_grad():
        plain, last = model(images), model(images.to(memory_format=torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_images_of_a_batch_do_not_mix_in_evaluation_mode(backend):
    model, images = small_model(backend).eval(), torch.randn(3, 3, 96, 96, device=DEVICE)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    torch.testing.assert_close(together.logits[1:2], alone.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.3, 0.65), (0.7, 0.4)])
def test_a_prediction_looks_at_its_default_box(backend, place):
    """In a wide image, the pixels that move a prediction lie around its default box: order and axes agree."""
    size = (128, 256)
    model = small_model(backend, image_size=size).eval()
    model.requires_grad_(False)
    rows, columns = model.default_boxes.feature_sizes[0]
    number = (int(place[0] * rows) * columns + int(place[1] * columns)) * BOXES_PER_CELL[0] + 2
    images = torch.randn(1, 3, *size, device=DEVICE).requires_grad_()
    model(images).logits[0, number].pow(2).sum().backward()
    weight = images.grad.pow(2).sum((0, 1)).cpu()
    y = (weight.sum(1) * (torch.arange(size[0]) + 0.5)).sum() / weight.sum() / size[0]
    x = (weight.sum(0) * (torch.arange(size[1]) + 0.5)).sum() / weight.sum() / size[1]
    want = model.default_boxes.xywh[number]
    assert abs(x - want[0].item()) < 0.06 and abs(y - want[1].item()) < 0.06


def test_default_boxes_follow_the_model_and_keep_their_precision(backend):
    model = small_model(backend)
    before = model.default_boxes.xywh.cpu().clone()
    for moved in (model.double(), model.bfloat16(), model.float()):
        boxes = moved.default_boxes
        assert boxes.xywh.dtype == boxes.ltrb.dtype == torch.float32 and torch.equal(boxes.xywh.cpu(), before)
    boxes = model.to("meta").default_boxes
    assert {boxes.xywh.device.type, boxes.ltrb.device.type, boxes.mlperf_order.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": (96, 96), "strides": (1, 1, 2, 2, 2, 1)}, r"96×96.*level 5 of 6"),
        ({"image_size": (300, 200), "strides": (1, 1, 2, 2, 2, 1)}, r"300×200.*level 6 of 6"),
        ({"image_size": (1, 1)}, r"1×1.*level 5 of 6"),
        ({"strides": (1, 2, 1, 1, 1, 1)}, r"strides 1 .*offset heads.* 2 .*class heads"),
        ({"strides": (1, 1, 1)}, "six"),
        ({"strides": (1, 1, 0, 1, 1, 1)}, "at least 1"),
        ({"backbone": "vgg16"}, r"'vgg16'.*resnet34"),
    ],
)
def test_models_that_cannot_be(backend, changes, said):
    with pytest.raises(UserError, match=said):
        small_model(backend, **changes)


# Matcher

GRID = 8  # corners on eighths: every IoU is a fraction of small integers, so that equal ones are equal in any precision
corners = st.tuples(*[st.integers(0, GRID)] * 4).map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))
solid = corners.filter(lambda c: c[0] < c[2] and c[1] < c[3])


def exact_iou(a, b) -> Fraction:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return Fraction(shared, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_match(boxes: list, defaults: list, order: list) -> list[int | None]:
    """Which box each default box is matched with: a statement of the rules in whole numbers."""
    matched: list[int | None] = []
    for default in defaults:
        best = max(range(len(boxes)), key=lambda n: exact_iou(boxes[n], default), default=None)  # the first of equals
        matched.append(best if best is not None and exact_iou(boxes[best], default) > Fraction(1, 2) else None)
    for number, box in enumerate(boxes):  # a later box takes it from an earlier one
        matched[max(order, key=lambda d: exact_iou(box, defaults[d]))] = number  # of equals, the first in the MLPerf order
    return matched


def on_grid(numbers: list, order: list) -> DefaultBoxes:
    ltrb = torch.tensor(numbers, dtype=torch.float32, device=DEVICE) / GRID
    return DefaultBoxes(ltrb_to_xywh(ltrb), ltrb, torch.tensor(order, device=DEVICE), ((1, len(numbers)),))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_matching_equals_a_plain_matcher_in_exact_numbers(backend, data):
    defaults = data.draw(st.lists(solid, min_size=1, max_size=20))
    order = data.draw(st.permutations(range(len(defaults))))
    images = data.draw(st.lists(st.lists(solid, max_size=5), min_size=1, max_size=3))
    boxes, labels = torch.zeros(len(images), 6, 4), torch.zeros(len(images), 6, dtype=torch.long)
    for n, image in enumerate(images):
        for m, box in enumerate(image):
            boxes[n, m], labels[n, m] = torch.tensor(box) / GRID, 10 * n + m + 1
    some = on_grid(defaults, list(order))
    targets = backend.matcher(boxes.to(DEVICE), labels.to(DEVICE), some)
    assert targets.offsets.dtype == torch.float32 and targets.labels.dtype == torch.int64
    for n, image in enumerate(images):
        matched = plain_match(image, defaults, list(order))
        assert targets.labels[n].tolist() == [0 if m is None else 10 * n + m + 1 for m in matched]
        want = torch.zeros(len(defaults), 4)
        for d, m in enumerate(matched):
            if m is not None:
                want[d] = encode(boxes[n, m], some.xywh[[d]].cpu())[0]
        torch.testing.assert_close(targets.offsets[n].cpu(), want, atol=1e-5, rtol=1e-5)


def test_the_later_of_two_boxes_wins_a_default_box_and_equals_go_to_the_first_in_mlperfs_order(backend):
    defaults = on_grid([(0, 0, 4, 8), (4, 0, 8, 8), (0, 0, 1, 1)], [1, 0, 2])
    boxes = torch.tensor([[(2, 0, 6, 8), (0, 0, 0, 0)], [(4, 0, 8, 8), (4, 0, 8, 8)]]) / GRID
    targets = backend.matcher(boxes.to(DEVICE), torch.tensor([[5, 0], [6, 7]], device=DEVICE), defaults)
    assert targets.labels.tolist() == [[0, 5, 0], [0, 7, 0]]


# Loss


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


# Decoder

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
@given(
    st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 0.3, 0.9]), st.sampled_from([0.2, 0.45, 0.5, 0.8]), st.sampled_from([1, 5, 40, 1000])
)
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


# Optimizer


def test_optimizer_is_sgd_with_momentum_and_decay(backend):
    torch.manual_seed(1)
    weight, bias = torch.nn.Parameter(torch.randn(3, 2, device=DEVICE)), torch.nn.Parameter(torch.randn(3, device=DEVICE))
    optimizer = backend.optimizer([weight, bias], momentum=0.9, weight_decay=0.01)
    want, speed = [p.detach().clone() for p in (weight, bias)], [torch.zeros_like(p) for p in (weight, bias)]
    for rate in (0.1, 0.1, 0.02):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for n, parameter in enumerate((weight, bias)):
            parameter.grad = torch.randn(parameter.shape, device=DEVICE)
            speed[n] = 0.9 * speed[n] + parameter.grad + 0.01 * want[n]
            want[n] = want[n] - rate * speed[n]
        optimizer.step()
        for got, expected in zip((weight, bias), want, strict=True):
            torch.testing.assert_close(got.detach(), expected, atol=1e-6, rtol=1e-5)
    again = backend.optimizer([weight, bias], momentum=0.9, weight_decay=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.02


# Step


def some_batch(count: int = 4, size: int = 96) -> Batch:
    draw = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    corner = torch.rand(count, 3, 2, generator=draw) * 0.5
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(count, 3, 2, generator=draw)], 2)
    labels = torch.randint(1, 4, (count, 3), generator=draw)
    boxes[0, 2], labels[0, 2] = 0, 0
    return Batch(images, boxes, labels, torch.arange(count), torch.tensor([[50, 60]] * count))


def step_until_it_moves(step, model: torch.nn.Module, batch: Batch, rate: float) -> tuple[dict, torch.Tensor]:
    """Steps until the loss scale, where there is one, fits → the model's state before the last step, and that step's loss."""
    for _ in range(20 if step.state_dict() else 1):
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        loss = step(batch, rate)
        if any(not torch.equal(p, before[name]) for name, p in model.named_parameters()):
            break
    return before, loss


def stepped(backend, batch: Batch, accumulation: int, rate: float = 0.05):
    """A model before and after one step, that step's loss, and what a step written out by hand makes of the same model."""
    model, by_hand = small_model(backend), small_model(backend)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(
        model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE, accumulation=accumulation
    )
    state, loss = step_until_it_moves(step, model, batch, rate)
    by_hand.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    by_hand.train()
    total, parts = 0.0, batch.images.chunk(accumulation)
    for n, images in enumerate(parts):
        some = slice(n * len(parts[0]), n * len(parts[0]) + len(images))
        pixels = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2).float() / 255, MEAN, DEVIATION).contiguous()
        targets = backend.matcher(batch.boxes[some].to(DEVICE), batch.labels[some].to(DEVICE), by_hand.default_boxes)
        share = backend.loss(by_hand(pixels.to(DEVICE)), targets) * len(images) / len(batch.images)
        share.backward()
        total += share.item()
    want = {name: p.detach() - rate * (p.grad + 5e-4 * p.detach()) for name, p in by_hand.named_parameters()}
    return model, before, loss, by_hand, want, total


@pytest.mark.parametrize(("images", "accumulation"), [(4, 1), (4, 2), (3, 2)])
def test_a_step_equals_one_written_out(images, accumulation):
    """The reference, to rounding: parts add up to the mean over the batch, also if they are not equally long."""
    model, before, loss, by_hand, want, total = stepped(load_backend("reference"), some_batch(images), accumulation)
    assert loss.shape == () and not loss.requires_grad and loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = (want[name] - before[name]).norm()
        assert moved > 0 and (parameter.detach() - want[name]).norm() < 1e-3 * moved, name
    for (name, buffer), expected in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_goes_where_one_written_out_goes(backend, accumulation):
    """Every backend, in whatever precision: nearly the same loss, direction and length."""
    model, before, loss, _, want, total = stepped(backend, some_batch(), accumulation)
    assert loss.shape == () and not loss.requires_grad and loss.item() == pytest.approx(total, rel=0.03)
    moved = torch.cat([(p.detach().float() - before[name]).flatten() for name, p in model.named_parameters()])
    wanted = torch.cat([(want[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9  # bfloat16 has 8 bits, and batch norm over few pixels amplifies
    assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=0.1)


def test_steps_that_the_loss_scale_skips_change_nothing():
    backend = replace(load_backend("reference"), step=ScaledStep)
    test_a_step_goes_where_one_written_out_goes(backend, 1)
    test_the_second_step_uses_the_first_ones_momentum_and_its_own_rate(backend)


def test_the_second_step_uses_the_first_ones_momentum_and_its_own_rate(backend):
    model = small_model(backend)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=0.0)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    weight = next(model.parameters())
    places = [weight.detach().clone()]
    step_until_it_moves(step, model, some_batch(), 0.01)
    places.append(weight.detach().clone())
    for rate in (0.0, 0.01):
        step(some_batch(), rate)
        places.append(weight.detach().clone())
    assert not torch.equal(places[0], places[1]) and torch.equal(places[1], places[2]) and not torch.equal(places[2], places[3])


def test_prediction_changes_nothing_and_is_in_evaluation_mode(backend):
    model, batch = small_model(backend), some_batch()
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    step(batch, 0.01)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predictions = step.predict(batch.images)
    alone = step.predict(batch.images[1:2])  # evaluation batches may be ragged
    assert not predictions.logits.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model.eval()
    with torch.no_grad():
        want = model(normalise(batch.images).to(DEVICE))
    for got, single, expected in zip(predictions, alone, want, strict=True):
        assert (got.float() - expected).norm() < 0.03 * expected.norm()
        assert (got[1:2].float() - single.float()).norm() < 0.03 * expected[1:2].norm()
    step(batch, 0.01)  # and training goes on in training mode
    assert not torch.equal(model.state_dict()["backbone.bn1.running_mean"], state["backbone.bn1.running_mean"])
    again = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    again.load_state_dict(step.state_dict())


def test_normalise_is_torchvisions():
    images = some_batch(2).images
    want = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2).float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    got = normalise(images)
    assert got.shape == (2, 3, 96, 96) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


# Evaluator


def truth(folder: Path, boxes: list, images: int = 3) -> Path:
    """Images 1… of 100×100; boxes: (image, category, [x, y, width, height], crowd)."""
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 100, "width": 100} for n in range(1, images + 1)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (image, category, box, crowd) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 4, "name": "four"}, {"id": 9, "name": "nine"}],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return folder / "truth.json"


def detections(*rows) -> Detections:
    """Rows: (label, [x, y, width, height] in pixels of 100, score)."""
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in rows], dtype=torch.float64).reshape(-1, 4) / 100
    return Detections(boxes, torch.tensor([row[0] for row in rows], dtype=torch.long), torch.tensor([row[2] for row in rows], dtype=torch.float64))


def figures(backend, file: Path, found: dict[int, Detections], order=None) -> dict[str, float]:
    evaluator = backend.evaluator(file)
    for key in order or found:
        evaluator.update(torch.tensor([key]), torch.tensor([[100, 100]]), [found[key]])
    result = evaluator.compute()
    assert tuple(result) == FIGURES and all(isinstance(value, float) for value in result.values())
    return result


def test_perfect_detections_and_empty_images(backend, tmp_path):
    file = truth(tmp_path, [(1, 4, [10, 10, 50, 50], 0), (2, 9, [5, 5, 20, 80], 0)])
    found = {1: detections((1, [10, 10, 50, 50], 0.9)), 2: detections((2, [5, 5, 20, 80], 0.8)), 3: detections()}
    perfect = figures(backend, file, found)
    for name in ("AP", "AR100", "AP75", "APm"):
        assert perfect[name] == pytest.approx(1)
    assert perfect["APs"] == -1  # no small box in the truth; 1600 to 2500 square pixels are medium
    found[3] = detections((1, [10, 10, 50, 50], 0.95))  # a false alarm on the empty image, surer than the truth
    assert figures(backend, file, found)["AP"] == pytest.approx(0.75)


def test_wrong_class_and_place(backend, tmp_path):
    file = truth(tmp_path, [(1, 4, [10, 10, 40, 40], 0)])
    assert figures(backend, file, {1: detections((2, [10, 10, 40, 40], 0.9))})["AP"] == 0
    shifted = figures(backend, file, {1: detections((1, [18, 10, 40, 40], 0.9))})  # IoU 2/3: right at 0.50 to 0.65
    assert (shifted["AP50"], shifted["AP75"]) == (pytest.approx(1), 0) and shifted["AP"] == pytest.approx(0.4)


def test_detections_in_a_crowd_count_neither_way(backend, tmp_path):
    file = truth(tmp_path, [(1, 4, [10, 10, 20, 20], 0), (1, 4, [50, 50, 40, 40], 1)])
    found = detections((1, [10, 10, 20, 20], 0.5), (1, [55, 55, 10, 10], 0.9), (1, [70, 70, 10, 10], 0.8))
    assert figures(backend, file, {1: found})["AP"] == pytest.approx(1)
    outside = detections((1, [10, 10, 20, 20], 0.5), (1, [35, 35, 10, 10], 0.9))
    assert figures(backend, file, {1: outside})["AP"] == pytest.approx(0.5)


def test_the_order_of_updates_does_not_matter(backend, tmp_path):
    rng = np.random.default_rng(0)

    def box() -> list[float]:
        return [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(10, 40, 2).tolist()]

    boxes = [(image, int(rng.choice([4, 9])), box(), 0) for image in range(1, 7) for _ in range(4)]
    file, found = truth(tmp_path, boxes, images=6), {}
    for image in range(1, 7):
        mine = [(1 if c == 4 else 2, (np.array(b) + rng.normal(0, 3, 4)).clip(1).tolist()) for n, c, b, _ in boxes if n == image]
        found[image] = detections(*((label, near, 0.9 - 0.1 * n - 0.001 * image) for n, (label, near) in enumerate(mine)))
    forward, backward = figures(backend, file, found), figures(backend, file, found, order=[4, 2, 6, 1, 5, 3])
    assert 0.1 < forward["AP"] < 1 and backward == pytest.approx(forward, abs=1e-12)
    evaluator = backend.evaluator(file)
    evaluator.update(torch.tensor(list(found)), torch.tensor([[100, 100]] * 6), list(found.values()))
    assert evaluator.compute() == pytest.approx(forward, abs=1e-12)


def test_an_image_twice_is_refused(backend, tmp_path):
    evaluator = backend.evaluator(truth(tmp_path, [(1, 4, [10, 10, 40, 40], 0)]))
    evaluator.update(torch.tensor([1, 2]), torch.tensor([[100, 100]] * 2), [detections()] * 2)
    with pytest.raises((ValueError, UserError), match="image 2"):
        evaluator.update(torch.tensor([2]), torch.tensor([[100, 100]]), [detections()])


def test_boxes_scale_with_the_recorded_height_and_width(backend, tmp_path):
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 50, "width": 200}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [20, 10, 100, 20], "area": 2000, "iscrowd": 0}],
        "categories": [{"id": 4, "name": "four"}],
    }
    (tmp_path / "wide.json").write_text(json.dumps(content))
    evaluator = backend.evaluator(tmp_path / "wide.json")
    found = Detections(torch.tensor([[0.1, 0.2, 0.6, 0.6]]), torch.tensor([1]), torch.tensor([0.9]))
    evaluator.update(torch.tensor([1]), torch.tensor([[50, 200]]), [found])
    assert evaluator.compute()["AP"] == pytest.approx(1)

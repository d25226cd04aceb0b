"""Every backend against figures of the MLPerf reference and of pycocotools (tests/golden)."""

import numpy as np
import pytest
import torch

from base.boxes import decode as decode_offsets
from base.boxes import encode
from base.contracts import FIGURES, Detections, Predictions, Targets
from tests.conftest import DEVICE, GOLDEN


def from_mlperf(array: np.ndarray, order: torch.Tensor) -> torch.Tensor:
    """(N, K, A) in the MLPerf order → (N, A, K) in this project's order."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return torch.from_numpy(array.astype(np.float32)).to(order.device).transpose(1, 2)[:, inverse].contiguous()


def test_default_boxes_at_300_are_mlperfs(model_300, golden):
    boxes, want = model_300.default_boxes, golden("default_boxes_300")
    assert boxes.feature_sizes == ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
    assert boxes.xywh.dtype == torch.float32 and len(boxes) == 8732
    for key in ("xywh", "ltrb"):
        np.testing.assert_allclose(getattr(boxes, key)[boxes.mlperf_order].cpu().numpy(), want[key], atol=1e-6, rtol=0)


def test_default_boxes_at_1200_are_mlperfs(backend, golden):
    model = backend.model(num_classes=3, image_size=(1200, 1200), strides=(3, 3, 2, 2, 2, 2), backbone="resnet18")
    boxes, want = model.default_boxes, golden("default_boxes_1200")["xywh"]
    assert len(boxes) == 15130
    np.testing.assert_allclose(boxes.xywh[boxes.mlperf_order].numpy(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", range(10))
def test_matching(backend, model_300, golden, case):
    data, boxes = golden("matching"), model_300.default_boxes
    truth, labels = (torch.from_numpy(data[f"{case}_{key}"]).to(DEVICE) for key in ("boxes_ltrb", "labels"))
    targets = backend.matcher(truth[None], labels[None], boxes)
    assert targets.offsets.dtype == torch.float32 and targets.labels.dtype == torch.int64
    got = targets.labels[0, boxes.mlperf_order].cpu().numpy()
    positive = np.flatnonzero(got)
    np.testing.assert_array_equal(positive, data[f"{case}_positive_anchor"])
    np.testing.assert_array_equal(got[positive], data[f"{case}_positive_label"])
    xywh = torch.from_numpy(data[f"{case}_positive_xywh"])
    defaults = boxes.xywh[boxes.mlperf_order].cpu()[positive]
    centre = (xywh[:, :2] - defaults[:, :2]) / defaults[:, 2:] / 0.1
    want = torch.cat([centre, (xywh[:, 2:] / defaults[:, 2:]).log() / 0.2], 1)
    np.testing.assert_allclose(targets.offsets[0, boxes.mlperf_order].cpu()[positive].numpy(), want.numpy(), atol=2e-4)
    assert not targets.offsets[targets.labels == 0].any()


def test_matching_a_padded_batch_equals_single_images(backend, model_300, golden):
    data, boxes = golden("matching"), model_300.default_boxes
    longest = max(len(data[f"{i}_labels"]) for i in range(10)) + 3
    truth, labels = torch.zeros(11, longest, 4), torch.zeros(11, longest, dtype=torch.long)
    for i in range(10):
        count = len(data[f"{i}_labels"])
        truth[i, :count], labels[i, :count] = torch.from_numpy(data[f"{i}_boxes_ltrb"]), torch.from_numpy(data[f"{i}_labels"])
    truth, labels = truth.to(DEVICE), labels.to(DEVICE)
    together = backend.matcher(truth, labels, boxes)
    for i in range(11):
        alone = backend.matcher(truth[i : i + 1], labels[i : i + 1], boxes)
        assert torch.equal(together.labels[i], alone.labels[0]) and torch.equal(together.offsets[i], alone.offsets[0])
    assert not together.labels[10].any()  # an image without boxes


def loss_case(golden, order):
    data = golden("loss")
    offsets, logits = (from_mlperf(data[key], order).requires_grad_() for key in ("loc", "logits"))
    count = len(offsets)
    longest = max(len(data[f"{i}_labels"]) for i in range(count))
    boxes, labels = torch.zeros(count, longest, 4), torch.zeros(count, longest, dtype=torch.long)
    for i in range(count):
        n = len(data[f"{i}_labels"])
        boxes[i, :n], labels[i, :n] = torch.from_numpy(data[f"{i}_boxes_ltrb"]), torch.from_numpy(data[f"{i}_labels"])
    return data, offsets, logits, boxes.to(DEVICE), labels.to(DEVICE)


def test_loss_and_gradients(backend, model_300, golden):
    boxes = model_300.default_boxes
    data, offsets, logits, truth, labels = loss_case(golden, boxes.mlperf_order)
    targets = backend.matcher(truth, labels, boxes)
    loss = backend.loss(Predictions(offsets, logits), targets)
    loss.backward()
    assert loss.item() == pytest.approx(float(data["loss"]), rel=1e-4)
    for grad, key in ((offsets.grad, "grad_loc_abs_sum"), (logits.grad, "grad_logits_abs_sum")):
        np.testing.assert_allclose(grad.abs().sum((1, 2)).cpu().numpy(), data[key], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal((logits.grad.abs().sum(2) > 0).sum(1).cpu().numpy(), data["grad_logits_nonzero_anchors"])
    for i, want in enumerate(data["per_image"]):
        alone = backend.loss(Predictions(offsets[i : i + 1], logits[i : i + 1]), Targets(targets.offsets[i : i + 1], targets.labels[i : i + 1]))
        assert alone.item() == pytest.approx(want, rel=1e-4)


def test_decoding(backend, model_300, golden):
    boxes, data = model_300.default_boxes, golden("decode")
    predictions = Predictions(from_mlperf(data["loc"], boxes.mlperf_order), from_mlperf(data["logits"], boxes.mlperf_order))
    found = backend.decoder(predictions, boxes, score_threshold=0.05, iou_threshold=0.5, max_detections=200)
    assert len(found) == 4
    for i, image in enumerate(found):
        image = Detections(*(column.cpu() for column in image))
        scores = data[f"{i}_scores"]
        assert len(image.scores) == len(image.labels) == len(image.boxes) == len(scores)
        np.testing.assert_allclose(image.scores.numpy(), scores, atol=1e-4)
        got = np.concatenate([image.labels.numpy()[:, None], image.boxes.numpy()], 1)
        want = np.concatenate([data[f"{i}_labels"][:, None], data[f"{i}_boxes_ltrb"]], 1)
        got, want = (rows[np.lexsort(np.round(rows, 3).T[::-1])] for rows in (got, want))
        np.testing.assert_allclose(got, want, atol=1e-3)


def coco_detections(golden):
    truth, found = golden("coco_gt"), golden("coco_detections")
    label = {category["id"]: i + 1 for i, category in enumerate(truth["categories"])}
    ids, sizes, detections = [], [], []
    for image in truth["images"]:
        mine = sorted((d for d in found if d["image_id"] == image["id"]), key=lambda d: -d["score"])
        boxes = torch.tensor([d["bbox"] for d in mine], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes /= torch.tensor([image["width"], image["height"]] * 2)
        labels = torch.tensor([label[d["category_id"]] for d in mine], dtype=torch.long)
        detections.append(Detections(boxes, labels, torch.tensor([d["score"] for d in mine], dtype=torch.float64)))
        ids.append(image["id"])
        sizes.append([image["height"], image["width"]])
    return torch.tensor(ids), torch.tensor(sizes), detections


def test_coco_figures(backend, golden):
    ids, sizes, detections = coco_detections(golden)
    evaluator = backend.evaluator(str(GOLDEN / "coco_gt.json"))
    evaluator.update(ids[:7], sizes[:7], detections[:7])
    evaluator.update(ids[7:], sizes[7:], detections[7:])
    figures = evaluator.compute()
    assert tuple(figures) == FIGURES
    for name, want in golden("coco_stats").items():
        assert figures[name] == pytest.approx(want, abs=1e-9), name


def test_coco_figures_without_detections(backend, golden):
    ids, sizes, _ = coco_detections(golden)
    evaluator = backend.evaluator(str(GOLDEN / "coco_gt.json"))
    none = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    evaluator.update(ids, sizes, [none] * len(ids))
    assert set(evaluator.compute().values()) == {0.0}


def test_offsets_decode_to_the_boxes_they_encode(model_300):
    torch.manual_seed(3)
    corner = torch.rand(len(model_300.default_boxes), 2) * 0.8
    boxes = torch.cat([corner, corner + 0.01 + torch.rand(len(corner), 2) * 0.19], 1).to(DEVICE)
    again = decode_offsets(encode(boxes, model_300.default_boxes.xywh), model_300.default_boxes.xywh)
    torch.testing.assert_close(again, boxes, atol=1e-5, rtol=0)

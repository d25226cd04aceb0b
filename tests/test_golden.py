"""Every backend against figures of the MLPerf reference and of pycocotools (tests/golden): the checks of `python -m base verify`."""

import pytest
import torch

from base.backend import load_backend
from base.boxes import decode as decode_offsets
from base.boxes import encode
from conformance.loaders import coco_golden
from conformance.model import model_golden
from conformance.parts import Kit, decoding_golden, loss_golden, matching_golden
from tests.conftest import DEVICE


@pytest.mark.parametrize("check", [model_golden, matching_golden, loss_golden, decoding_golden, coco_golden])
def test_golden_data(backend, tmp_path, check):
    rows = list(check(Kit(backend, load_backend("reference"), DEVICE, 1, tmp_path, {})))
    assert rows and all(error <= tolerance for _, error, tolerance in rows), rows


def test_default_boxes_at_300_are_on_mlperfs_levels(model_300):
    boxes = model_300.default_boxes
    assert boxes.feature_sizes == ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
    assert boxes.xywh.dtype == torch.float32 and len(boxes) == 8732


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


def test_offsets_decode_to_the_boxes_they_encode(model_300):
    torch.manual_seed(3)
    corner = torch.rand(len(model_300.default_boxes), 2) * 0.8
    boxes = torch.cat([corner, corner + 0.01 + torch.rand(len(corner), 2) * 0.19], 1).to(DEVICE)
    again = decode_offsets(encode(boxes, model_300.default_boxes.xywh), model_300.default_boxes.xywh)
    torch.testing.assert_close(again, boxes, atol=1e-5, rtol=0)

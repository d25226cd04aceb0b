"""The model of every backend: parameters, default boxes, sizes and strides that it takes and refuses."""

import pytest
import torch

from base.boxes import BOXES_PER_CELL
from base.errors import UserError
from tests.conftest import DEVICE, small_model


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

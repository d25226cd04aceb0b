"""The evaluator of every backend, on a few boxes whose figures can be told by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from base.contracts import FIGURES, Detections
from base.errors import UserError


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

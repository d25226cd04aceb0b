"""The native COCO figures against pycocotools: random data, ties, crowds, threads, hostile input."""

import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.backend import load_backend
from base.contracts import FIGURES, Detections
from conformance.loaders import golden_detections
from tests.conftest import GOLDEN

pytest.importorskip("base.backends.cpu._coco", reason="the native parts are not built: python3 prepare.py --name cpu", exc_type=ImportError)
from base.backends.cpu import _coco
from base.backends.cpu.evaluator import IOU_THRESHOLDS, RECALL_THRESHOLDS, CocoEvaluator

SIDES = (3, 20, 40, 100, 300, 2000)  # of boxes in pixels: 32² and 96² are the bounds between small, medium and large


def random_truth(rng, images: int, categories: int, most: int, crowd: float, first_id: int = 1) -> dict:
    """A COCO dictionary; ids of images and categories have gaps."""
    sizes = rng.integers(1, 2500, (images, 2))
    annotations = []
    for image in range(images):
        for _ in range(rng.integers(0, most + 1)):
            height, width = sizes[image]
            w, h = np.minimum(rng.choice(SIDES, 2) * rng.choice([1.0, 0.5, 0.32, 0.96, rng.random() + 0.01], 2), (width, height))
            x, y = rng.random(2) * (width - w, height - h)
            if annotations and annotations[-1]["image_id"] == 7 * image + 3 and rng.random() < 0.2:
                x, y, w, h = annotations[-1]["bbox"]  # a box twice
            area = rng.choice([w * h, w * h * 0.6, 0.0, 1024.0, 9216.0, 1e11], p=[0.5, 0.3, 0.05, 0.06, 0.06, 0.03])
            annotation = {"image_id": 7 * image + 3, "category_id": int(rng.integers(categories)) * 3 + 2, "bbox": [x, y, w, h], "area": float(area)}
            annotations.append({"id": first_id + len(annotations), **annotation, "iscrowd": int(rng.random() < crowd)})
    return {
        "images": [{"id": 7 * i + 3, "file_name": f"{i}.jpg", "height": int(h), "width": int(w)} for i, (h, w) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [{"id": 3 * i + 2, "name": str(i)} for i in range(categories)],
    }


def random_detections(rng, truth: dict, most: int, levels: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, list[Detections]]:
    """Near the boxes of the truth and elsewhere; scores on a grid of ``levels`` values (0: all distinct), in any order."""
    found, categories = [], len(truth["categories"])
    for image in truth["images"]:
        size = np.array([image["width"], image["height"]] * 2)
        near = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        count = int(rng.integers(0, most + 1)) * int(rng.random() < 0.9)
        corner = rng.random((count, 2))
        boxes = np.concatenate([corner, corner + rng.random((count, 2)) ** 4 * (1 - corner)], 1)
        labels = rng.integers(1, categories + 1, count)
        for i in range(count):
            kind = rng.random()
            if near and kind < 0.7:
                annotation = near[rng.integers(len(near))]
                x, y, w, h = annotation["bbox"]
                jitter = rng.normal(0, rng.choice([0, 0.02, 0.1, 0.3]), 4) * (w, h, w, h)
                boxes[i] = (np.array([x, y, x + w, y + h]) + jitter) / size
                if rng.random() < 0.8:
                    labels[i] = (annotation["category_id"] - 2) // 3 + 1
            elif kind < 0.75:
                boxes[i, 2:] = boxes[i, :2]  # without area
            elif kind < 0.8:
                boxes[i] = boxes[i, [2, 3, 0, 1]]  # turned inside out
            elif kind < 0.85 and i:
                boxes[i] = boxes[i - 1]
        scores = rng.permutation(count * 1000)[:count] / 1e6 if levels == 0 else rng.integers(0, levels, count) / levels
        found.append(Detections(torch.from_numpy(boxes).to(dtype), torch.from_numpy(labels), torch.from_numpy(scores).to(dtype)))
    ids = torch.tensor([image["id"] for image in truth["images"]])
    return ids, torch.tensor([[image["height"], image["width"]] for image in truth["images"]]), found


def figures(make, file: Path, ids, sizes, found, order=None, **arguments) -> dict[str, float]:
    evaluator = make(str(file), **arguments)
    order = np.arange(len(ids)) if order is None else order
    for part in np.array_split(order, 3):
        evaluator.update(ids[part], sizes[part], [found[i] for i in part])
    return evaluator.compute()


def written(truth: dict, folder) -> Path:
    file = Path(folder) / "truth.json"
    file.write_text(json.dumps(truth))
    return file


def assert_equal(got: dict, want: dict) -> None:
    assert tuple(got) == FIGURES
    for name in FIGURES:
        assert got[name] == want[name], (name, got[name], want[name])  # the same bits, hence also to 1e-9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.sampled_from([1, 2, 5, 9]),
    categories=st.sampled_from([1, 2, 6]),
    boxes=st.sampled_from([0, 1, 4, 15]),
    found=st.sampled_from([0, 1, 8, 40, 300]),
    crowd=st.sampled_from([0.0, 0.2, 1.0]),
    levels=st.sampled_from([0, 1, 4, 50]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_figures_equal_pycocotools(seed, images, categories, boxes, found, crowd, levels, dtype):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images, categories, boxes, crowd)
    given_ = random_detections(rng, truth, found, levels, dtype)
    with tempfile.TemporaryDirectory() as folder:
        file = written(truth, folder)
        want = figures(load_backend("reference").evaluator, file, *given_)
        got = figures(CocoEvaluator, file, *given_, threads=1)
        assert_equal(got, want)
        assert_equal(figures(CocoEvaluator, file, *given_, threads=5), got)
        # The order of the updates never matters: images are compared in the order of their ids.
        assert_equal(figures(CocoEvaluator, file, *given_, rng.permutation(images)), got)


def test_golden_data_and_bits(golden):
    ids, sizes, found = golden_detections()
    got = figures(CocoEvaluator, GOLDEN / "coco_gt.json", ids, sizes, found)
    for name, want in golden("coco_stats").items():
        assert got[name] == pytest.approx(want, abs=1e-9), name
    assert_equal(got, figures(load_backend("reference").evaluator, GOLDEN / "coco_gt.json", ids, sizes, found))


@pytest.fixture
def middle(tmp_path):
    """A file and detections of 60 images, scores distinct."""
    rng = np.random.default_rng(3)
    truth = random_truth(rng, 60, 8, 10, 0.1)
    return written(truth, tmp_path), random_detections(rng, truth, 60, 0)


def test_a_match_with_annotation_0_counts(tmp_path):
    """pycocotools takes a match with id 0 for none; only that id is special, so other ids give the right figures."""
    rng = np.random.default_rng(4)
    truth = random_truth(rng, 1, 1, 1, 0)
    while not truth["annotations"]:
        truth = random_truth(rng, 1, 1, 1, 0)
    truth["annotations"][0].update(id=0, area=100.0)
    (x, y, w, h), image = truth["annotations"][0]["bbox"], truth["images"][0]
    box = torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64) / torch.tensor([image["width"], image["height"]] * 2)
    found = [Detections(box, torch.tensor([1]), torch.tensor([0.5]))]
    got = figures(CocoEvaluator, written(truth, tmp_path), torch.tensor([3]), torch.tensor([[image["height"], image["width"]]]), found)
    assert got["AR100"] == got["AR1"] == 1 and got["AP"] == pytest.approx(1)


def test_compute_again_and_after_more_images(middle):
    file, (ids, sizes, found) = middle
    evaluator = CocoEvaluator(file)
    assert set(evaluator.compute().values()) == {0.0}
    evaluator.update(ids[:0], sizes[:0], [])
    evaluator.update(ids[:30], sizes[:30], found[:30])
    half = evaluator.compute()
    assert half == evaluator.compute()
    evaluator.update(ids[30:], sizes[30:], found[30:])
    assert_equal(evaluator.compute(), figures(CocoEvaluator, file, ids, sizes, found))


def test_detections_are_copied(middle):
    file, (ids, sizes, found) = middle
    evaluator = CocoEvaluator(file)
    for i in range(len(ids)):
        evaluator.update(ids[i : i + 1], sizes[i : i + 1], [found[i]])
    want = evaluator.compute()
    for image in found:
        for column in image:
            column.zero_()
    assert evaluator.compute() == want


def test_what_does_not_fit_is_refused_and_nothing_is_added(middle):
    file, (ids, sizes, found) = middle
    evaluator = CocoEvaluator(file)
    evaluator.update(ids[:1], sizes[:1], found[:1])
    full = next(d for d in found[1:] if len(d.scores) > 1)
    two = slice(1, 3)
    bad = [
        ("image 3 was evaluated twice", ids[[1, 0]], sizes[two], found[1:3]),
        ("image 10 was evaluated twice", ids[[1, 1]], sizes[two], found[1:3]),
        ("image 4 is not in", torch.tensor([10, 4]), sizes[two], found[1:3]),
        ("image 99999 is not in", torch.tensor([10, 99999]), sizes[two], found[1:3]),
        ("detections of 1 images", ids[two], sizes[two], found[1:2]),
        (r"sizes of shape \(3, 2\)", ids[two], sizes[:3], found[1:3]),
        ("image 17 has", ids[two], sizes[two], [found[1], full._replace(scores=full.scores[1:])]),
        ("image 17 has a detection labelled 0", ids[two], sizes[two], [found[1], full._replace(labels=full.labels * 0)]),
        ("image 17 has a detection labelled 9", ids[two], sizes[two], [found[1], full._replace(labels=full.labels * 0 + 9)]),
        (r"ltrb boxes are \(D, 4\)", ids[two], sizes[two], [d._replace(boxes=d.boxes[:, :3]) for d in found[1:3]]),
    ]
    for message, *arguments in bad:
        with pytest.raises(ValueError, match=message):
            evaluator.update(*arguments)
    evaluator.update(ids[1:], sizes[1:], found[1:])
    assert_equal(evaluator.compute(), figures(CocoEvaluator, file, ids, sizes, found))


def test_what_is_not_a_number_matches_nothing_and_ranks_last(middle):
    file, (ids, sizes, found) = middle
    want = figures(CocoEvaluator, file, ids, sizes, found)
    nan, inf, one = float("nan"), float("inf"), torch.tensor([[0.1, 0.1, 0.9, 0.9]], dtype=torch.float64)

    def added(box, score):
        more = Detections(box, torch.tensor([1]), torch.tensor([score], dtype=torch.float64))
        return [Detections(*(torch.cat(columns) for columns in zip(image, more, strict=True))) for image in found]

    for box, score in ((one * nan, 0.0), (one * inf, nan), (one * torch.tensor([-inf, 1, inf, 1]), -inf), (one * 1e300, nan), (one - 1e-310, nan)):
        got = figures(CocoEvaluator, file, ids, sizes, added(box, score))
        assert all(0 <= value <= 1 for value in got.values())
        if not np.isfinite(box.numpy()).all():  # the last of all and wrong: no precision before it changes
            assert_equal(got, want)
    got = figures(CocoEvaluator, file, ids, sizes, added(one * nan, 1.0))
    assert got["AP"] < want["AP"] and got["AR100"] <= want["AR100"]


def test_no_size_or_label_of_native_arguments_is_trusted():
    def call(first=(0, 1), labels=(1,), categories=1, crowd=(False,), thresholds=IOU_THRESHOLDS, threads=2, **part):
        truth = np.array(first), np.ones((1, 4)), np.array(labels, dtype=np.int64), np.array(crowd, dtype=bool), np.ones(1), categories
        columns = {"images": np.array([0]), "sizes": np.ones((1, 2)), "first": np.array([0, 1]), "boxes": np.ones((1, 4))}
        columns |= {"labels": np.array([1]), "scores": np.ones(1)} | {key: np.array(value) for key, value in part.items()}
        return _coco.figures(*truth, [tuple(columns.values())], thresholds, RECALL_THRESHOLDS, threads)

    def also_first(values):  # the part's, which shares its name with the truth's
        truth = np.array([0, 1]), np.ones((1, 4)), np.ones(1, dtype=np.int64), np.array([False]), np.ones(1), 1
        part = np.array([0]), np.ones((1, 2)), np.array(values), np.ones((1, 4)), np.array([1]), np.ones(1)
        return _coco.figures(*truth, [part], IOU_THRESHOLDS, RECALL_THRESHOLDS, 1)

    assert call()[0].shape == (4, 10, 101, 1)
    assert call(threads=-3)[1].shape == (6, 10, 1)
    huge = 2**62
    wrong = [{"first": (0, 2)}, {"first": (1, 1)}, {"labels": (0,)}, {"labels": (2,)}, {"labels": (huge,)}, {"crowd": ()}, {"categories": 0}]
    wrong += [{"categories": huge}, {"categories": -1}, {"thresholds": IOU_THRESHOLDS[1:]}, {"images": [1]}, {"images": [-1]}, {"images": [huge]}]
    wrong += [{"images": [0, 0]}, {"sizes": np.ones(1)}, {"boxes": np.ones(3)}, {"scores": np.ones(2)}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="coco figures"):
            call(**arguments)
    for values in ((0, 2), (0, -1), (1, 1), (0,), (0, huge)):
        with pytest.raises(ValueError, match="coco figures"):
            also_first(values)


def test_python_goes_on_while_it_computes(tmp_path):
    rng = np.random.default_rng(5)
    truth = random_truth(rng, 300, 8, 20, 0.02)
    ids, sizes, found = random_detections(rng, truth, 20, 0)
    evaluator = CocoEvaluator(written(truth, tmp_path), threads=1)
    evaluator.update(ids, sizes, [Detections(d.boxes.repeat(100, 1), d.labels.repeat(100), d.scores.repeat(100)) for d in found])
    result = []
    thread = threading.Thread(target=lambda: result.append(evaluator.compute()))
    began, worked = time.perf_counter(), time.thread_time()
    thread.start()
    while thread.is_alive():
        pass
    took, worked = time.perf_counter() - began, time.thread_time() - worked
    assert result and worked > 0.15 * took, (worked, took)  # with the GIL held this thread would have waited

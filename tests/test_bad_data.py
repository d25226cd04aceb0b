"""Boxes and images that are not as they should be: what each does to a batch, to an evaluation and to a run. See docs/bad-data.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from base.contracts import Detections
from base.errors import UserError
from base.evaluate import check_bad_images
from base.sampling import train_shard
from data_sets.index import AnnotationIndex
from tests.small_data import HEIGHT, WIDTH, check_batch, encoded, evaluating, many, picture, pure, quarters, training, write_coco

BAD = 19  # the id of the file that a test spoils, of 10, 13, 16, …

BOXES = {  # bbox, category → what arrives at 80×40; the order is kept
    "as it should be": ([8, 4, 16, 8], 3, [0.1, 0.1, 0.3, 0.3]),
    "partly outside": ([60, 20, 40, 40], 7, [0.75, 0.5, 1, 1]),
    "outside by less than half a pixel": ([0, 0, 80.4, 40.3], 3, [0, 0, 1, 1]),
    "negative corner": ([-8, -4, 16, 8], 3, [0, 0, 0.1, 0.1]),
    "zero width": ([8, 4, 0, 8], 3, None),
    "zero height": ([8, 4, 16, 0], 3, None),
    "negative height": ([8, 4, 16, -8], 3, None),
    "not a number": ([8, 4, float("nan"), 8], 3, None),
    "infinite": ([8, 4, float("inf"), 8], 3, None),
    "text": ([8, 4, "16", 8], 3, None),
    "three numbers": ([8, 4, 16], 3, None),
    "wholly outside": ([90, 4, 16, 8], 3, None),
    "unknown category": ([8, 4, 16, 8], 99, None),
    "no category": ([8, 4, 16, 8], None, None),
}


def test_boxes_that_arrive_in_a_batch(backend, tmp_path):
    content = encoded(quarters(), "PNG")
    (tmp_path / "1.png").write_bytes(content)
    entries = [
        {"id": n, "image_id": 1, "category_id": category, "bbox": bbox, "area": 1, "iscrowd": 0}
        for n, (bbox, category, _) in enumerate(BOXES.values(), 1)
    ]
    entries.append({**entries[0]})  # the same id and content: the first is kept
    entries.append({**entries[0], "bbox": [40, 20, 20, 10]})  # the same id, another box: both are
    entries.append({**entries[0], "id": 900, "image_id": 77})  # of no image
    images = [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}]
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    data = {"annotation_file": tmp_path / "a.json", "image_dir": tmp_path}
    (batch,) = evaluating(backend, data)
    want = [ltrb for _, _, ltrb in BOXES.values() if ltrb] + [[0.5, 0.5, 0.75, 0.75]]
    np.testing.assert_allclose(batch.boxes[0].cpu().numpy(), want, atol=1e-6)
    assert batch.labels.tolist() == [[1, 2, 1, 1, 1]]
    (batch,) = training(backend, data, batch_size=1)
    check_batch(batch, 1)
    assert torch.isfinite(batch.boxes).all()
    dropped = {reason: row["count"] for reason, row in AnnotationIndex.open(data["annotation_file"]).report["dropped"].items()}
    assert sum(dropped.values()) == len(BOXES) - 4 + 2


def test_an_image_whose_boxes_are_all_bad_is_one_without_boxes(backend, tmp_path):
    data = write_coco(tmp_path, {1: quarters(), 2: quarters(), 3: quarters()}, {1: [[1, 1, 0, 5, 3]], 2: [[1, 1, 9, 9, 3]], 3: [[1, 1, 9, 9, 3]]})
    (batch,) = training(backend, data, batch_size=2)
    assert sorted(batch.image_ids.tolist()) == [2, 3]
    (batch,) = evaluating(backend, data)
    assert batch.image_ids.tolist() == [1, 2, 3] and not batch.labels[0].any()


def spoilt(folder: Path, *bad: int) -> dict:
    """35 images with boxes, of which those with the ids ``bad`` are cut short."""
    data = many(folder, 35)
    for key in bad:
        path = folder / f"{key}.png"
        path.write_bytes(path.read_bytes()[:200])
    return data


def test_skipped_images_of_training_are_replaced_by_the_next_readable(backend, tmp_path):
    order = [batch.image_ids.tolist() for batch in pure(training(backend, many(tmp_path / "whole", 35)))]
    first = next(key for key in sum(order, []) if key + 3 in sum(order, []) and key + 6 <= 10 + 3 * 34)
    bad = (first, first + 3)  # two that follow each other in the data set
    data = spoilt(tmp_path / "spoilt", *bad)
    results = []
    for workers in (0, 2):
        loader = training(backend, data, workers=workers, skip_bad_images=True)
        batches = list(loader)
        for batch in batches:
            check_batch(batch, 16)
        results.append([batch.image_ids.tolist() for batch in batches])
        assert loader.bad_images.keys() == {str(tmp_path / "spoilt" / f"{key}.png") for key in bad}
        assert all("cannot be decoded" in reason for reason in loader.bad_images.values())
    assert results[0] == results[1]
    assert results[0] == [[first + 6 if key in bad else key for key in batch] for batch in order]


def test_skipped_images_of_evaluation_just_have_no_detections(backend, tmp_path):
    data = spoilt(tmp_path, BAD)
    for workers in (0, 1):
        loader = evaluating(backend, data, workers=workers, skip_bad_images=True)
        seen = [key for batch in loader for key in batch.image_ids.tolist()]
        assert seen == [10 + 3 * number for number in range(35) if 10 + 3 * number != BAD]
        assert list(loader.bad_images) == [str(tmp_path / f"{BAD}.png")]


def test_a_batch_of_evaluation_without_any_readable_image_is_left_out(backend, tmp_path):
    data = spoilt(tmp_path, 10, 13)
    batches = [batch.image_ids.tolist() for batch in evaluating(backend, data, batch_size=2, skip_bad_images=True)]
    assert [key for batch in batches for key in batch] == [10 + 3 * number for number in range(2, 35)]


def test_the_boxes_of_a_skipped_image_still_count_in_the_figures(backend, tmp_path):
    """All boxes found, but of one of 35 images none: recall falls by its share."""
    data = spoilt(tmp_path, BAD)
    index = AnnotationIndex.open(data["annotation_file"])
    figures = []
    for left_out in ((), (BAD,)):
        evaluator = backend.evaluator(data["annotation_file"])
        for number, key in enumerate(index.image_ids.tolist()):
            boxes, labels = index.ltrb(number)
            if key not in left_out:
                found = Detections(torch.from_numpy(boxes), torch.from_numpy(labels.copy()), torch.full((len(labels),), 0.9))
                evaluator.update(torch.tensor([key]), torch.from_numpy(index.sizes[[number]]), [found])
        figures.append(evaluator.compute())
    assert figures[0]["AR100"] == figures[0]["AP"] == 1
    labels = index.labels
    lost = index.ltrb(int(np.flatnonzero(index.image_ids == BAD)[0]))[1]
    want = np.mean([1 - (lost == label).sum() / (labels == label).sum() for label in np.unique(labels)])
    assert figures[1]["AR100"] == pytest.approx(want, abs=1e-9) and figures[1]["AP"] < 1


def test_a_data_set_of_bad_images_is_an_error_even_when_skipping(backend, tmp_path):
    data = spoilt(tmp_path, *(10 + 3 * number for number in range(35)))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"\.png: cannot be decoded.*mend"):
            list(training(backend, data, workers=workers, skip_bad_images=True))


def test_more_than_one_percent_of_bad_images_is_an_error():
    bad = {f"/data/{number}.jpg": "the file is empty" for number in range(11)}
    with pytest.raises(UserError, match=r"11 of 1000 .*1 %.*/data/0\.jpg: the file is empty"):
        check_bad_images(bad, 1000)
    check_bad_images(bad, 1100)  # 1 % is allowed
    check_bad_images({}, 0)


def run_data(folder: Path) -> Path:
    """120 training and 12 validation images; one training image of the first step is cut short."""
    for split, count in (("train2017", 120), ("val2017", 12)):
        pictures = {key: picture(key, 96, 80) for key in range(1, count + 1)}
        for key, image in pictures.items():
            ImageDraw.Draw(image).rectangle((key % 40, 20, key % 40 + 30, 60), fill=(250, 10, 10))
        boxes = {key: [[key % 40, 20, 31, 41, 3]] for key in pictures}
        write_coco(folder / split, pictures, boxes, "jpg")
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / split / "a.json").rename(folder / "annotations" / f"instances_{split}.json")
    bad = folder / "train2017" / f"{train_shard(120, 1, 0, 8, 0, 1)[0, 3] + 1}.jpg"
    bad.write_bytes(bad.read_bytes()[:1000])
    return bad


def test_a_run_names_the_bad_file_or_goes_on_without_it(train, tmp_path):
    bad = run_data(tmp_path / "data")
    flags = ["--max_steps", "3", "--workers", "1", "--seed", "1"]
    refused = train(*flags, data_dir=tmp_path / "data", run="refused")
    assert refused.returncode == 2, refused.stderr
    assert f"error: image {bad}: cannot be decoded" in refused.stderr and "--skip-bad-images" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
    skipped = train(*flags, "--skip-bad-images", data_dir=tmp_path / "data", run="skipped")
    assert skipped.returncode == 0, skipped.stderr
    assert "Traceback" not in skipped.stderr + skipped.stdout
    assert f"skipped image {bad}: cannot be decoded" in (tmp_path / "skipped" / "log.txt").read_text()

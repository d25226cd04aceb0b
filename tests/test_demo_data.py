"""The demo data set: the same bytes every time, a proper COCO folder, tight boxes, and never over other people's files."""

import contextlib
import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from data_sets import demo_data
from data_sets import demo_data as demo
from data_sets.index import AnnotationIndex

TRAIN, VAL, SIZE = 40, 8, 96


def digests(folder) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data" / "demo"
    assert demo.generate(folder, TRAIN, VAL, SIZE, seed=1, processes=2)
    return folder, digests(folder)


def annotations(folder, split="train2017") -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_same_bytes_for_any_number_of_processes(made, tmp_path):
    _, expected = made
    demo.generate(tmp_path / "again", TRAIN, VAL, SIZE, seed=1, processes=1)
    assert digests(tmp_path / "again") == expected


def test_other_seed_draws_other_images(made, tmp_path):
    folder, _ = made
    for number in range(3):
        assert demo.draw(1, 0, number, SIZE) == demo.draw(1, 0, number, SIZE)
        others = [demo.draw(2, 0, number, SIZE)[0], demo.draw(1, 1, number, SIZE)[0], demo.draw(1, 0, number + 3, SIZE)[0]]
        assert demo.draw(1, 0, number, SIZE)[0] not in others


def test_layout(made):
    folder, files = made
    assert len([name for name in files if name.startswith("train2017/")]) == TRAIN
    assert len([name for name in files if name.startswith("val2017/")]) == VAL
    assert not list(folder.parent.glob(".*")), "nothing temporary is left"
    image_ids = []
    for split in demo.SPLITS:
        content = annotations(folder, split)
        assert len(content["categories"]) >= 4
        category_ids = [category["id"] for category in content["categories"]]
        assert category_ids != list(range(1, len(category_ids) + 1)), "ids with gaps"
        image_ids += [image["id"] for image in content["images"]]
        for image in content["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(folder / split / image["file_name"]) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (image["width"], image["height"]))
        crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
        assert crowds, "every split has a crowd box"
        owners = {entry["image_id"] for entry in content["annotations"]}
        assert owners < {image["id"] for image in content["images"]}, "every split has an image without objects"
    assert len(set(image_ids)) == TRAIN + VAL


def test_index_finds_nothing_to_mend(made, tmp_path):
    folder, _ = made
    for split in demo.SPLITS:
        file = tmp_path / f"instances_{split}.json"
        file.write_bytes((folder / "annotations" / file.name).read_bytes())
        index = AnnotationIndex.open(file)
        assert index.report["dropped"] == {} and index.report["mended"] == {}


def test_boxes_are_tight_and_objects_apart(made):
    folder, _ = made
    content = annotations(folder)
    images = {image["id"]: image for image in content["images"]}
    boxes_of = {}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        image = images[entry["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        assert 0 < entry["area"] <= w * h
        boxes_of.setdefault(entry["image_id"], []).append((x, y, x + w, y + h))
        if not entry["iscrowd"]:
            points = np.array(entry["segmentation"][0]).reshape(-1, 2)
            np.testing.assert_allclose([*points.min(axis=0), *np.ptp(points, axis=0)], [x, y, w, h], atol=1e-9)
            assert 0.1 * min(image["width"], image["height"]) < max(w, h) < 0.65 * min(image["width"], image["height"])
    for boxes in boxes_of.values():
        for first, a in enumerate(boxes):
            for b in boxes[first + 1 :]:
                assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]), "two boxes overlap"


def test_drawn_pixels_fill_the_boxes(monkeypatch):
    """Against the same image without its objects: pixels differ inside the boxes, up to their edges, and only there."""
    checked = 0
    for number in range(3, 15):
        content, height, width, entries = demo.draw(1, 0, number, SIZE)
        if len(entries) == 0 or any(entry["iscrowd"] for entry in entries):
            continue
        with_objects = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(demo, "_mask", lambda shapes, w, h: Image.new("L", (w * demo.OVERSAMPLING, h * demo.OVERSAMPLING)))
            without = np.asarray(Image.open(io.BytesIO(demo.draw(1, 0, number, SIZE)[0])).convert("RGB")).astype(int)
        differs = np.abs(with_objects - without).max(axis=2) > 60
        allowed = np.zeros((height, width), dtype=bool)
        for x, y, w, h in (entry["bbox"] for entry in entries):
            left, top, right, bottom = max(0, int(x) - 1), max(0, int(y) - 1), int(x + w) + 2, int(y + h) + 2
            allowed[top:bottom, left:right] = True
            inside = differs[top:bottom, left:right]
            ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            seen = [left + xs[0], top + ys[0], left + xs[-1] + 1, top + ys[-1] + 1]
            assert np.abs(np.array(seen) - [x, y, x + w, y + h]).max() < 2.5, "the box is tight"
            checked += 1
        assert not differs[~allowed].any(), "nothing is drawn outside the boxes"
    assert checked > 10


def test_pycocotools_reads_it_and_crowd_runs_fill_the_box(made):
    from pycocotools import mask as masks
    from pycocotools.coco import COCO

    folder, _ = made
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(str(folder / "annotations" / "instances_train2017.json"))
    crowd = api.loadAnns(api.getAnnIds(iscrowd=True))
    assert crowd
    for entry in crowd:
        rle = api.annToRLE(entry)
        assert masks.toBbox(rle).tolist() == entry["bbox"] and masks.area(rle) == entry["area"]


def test_finished_folder_is_left_alone(made):
    folder, expected = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert demo.generate(folder, TRAIN, VAL, SIZE, seed=1) is False
    assert digests(folder) == expected and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_content_is_never_overwritten(made, tmp_path):
    folder, _ = made
    with pytest.raises(UserError, match="other parameters.*--data_dir"):
        demo.generate(folder, TRAIN, VAL, SIZE, seed=2)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no demo data"):
        demo.generate(tmp_path, TRAIN, VAL, SIZE, seed=1)
    file = tmp_path / "mine.txt"
    with pytest.raises(UserError, match="holds no demo data"):
        demo.generate(file, TRAIN, VAL, SIZE, seed=1)
    assert file.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_changed_demo_data_is_named(tmp_path):
    folder = tmp_path / "demo"
    assert demo_data.main(["--data-dir", str(folder), "--train", "3", "--val", "3", "--size", "64"]) == 0
    next((folder / "train2017").glob("*.jpg")).unlink()
    with pytest.raises(UserError, match="was changed since"):
        demo_data.main(["--data_dir", str(folder), "--train", "3", "--val", "3", "--size", "64"])


def test_an_empty_folder_is_used_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    folder.mkdir()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_annotation_file", fail)
        with pytest.raises(UserError, match="No space left"):
            demo.generate(folder, 3, 3, 64, seed=1, processes=1)
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())
    assert demo.generate(folder, 3, 3, 64, seed=1, processes=1)


@pytest.mark.parametrize("train, val, size, seed", [(0, 8, 96, 1), (40, 2, 96, 1), (40, 8, 8, 1), (40, 8, 96, -1)])
def test_impossible_parameters(tmp_path, train, val, size, seed):
    with pytest.raises(UserError, match="give a value from"):
        demo.generate(tmp_path / "demo", train, val, size, seed)

"""The annotation index: exact against a plain reading, every row of its table, and what happens on disk."""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from data_sets import coco_json
from data_sets import index as index_module
from data_sets import pack as index_tool
from data_sets.index import AnnotationIndex
from measuring import bench
from measuring import index as measured

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def coco(**changes) -> dict:
    """A small clean file: image 5 has two boxes, image 9 one, image 2 none."""
    content = {
        "images": [{"id": key, "file_name": f"{key}.jpg", "height": 100, "width": 200} for key in (9, 5, 2)],
        "annotations": [
            {"id": 11, "image_id": 5, "category_id": 7, "bbox": [10, 20, 30.5, 40.25], "area": 600.5, "iscrowd": 0, "segmentation": [[1]]},
            {"id": 12, "image_id": 9, "category_id": 3, "bbox": [0, 0, 200, 100], "area": 1, "iscrowd": 1},
            {"id": 13, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    return {**content, **changes}


def write(folder: Path, content: object, name: str = "annotations.json") -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def changed(place: str, position: int, **fields) -> dict:
    """The clean file with fields of one entry replaced; a field set to `...` is removed."""
    content = coco()
    entry = content[place][position]
    entry.update(fields)
    for name in [name for name, value in entry.items() if value is ...]:
        del entry[name]
    return content


def opened(folder: Path, content: object) -> AnnotationIndex:
    return AnnotationIndex.open(write(folder, content))


def counts(index: AnnotationIndex) -> dict[str, int]:
    return {f"{kind}: {reason}": row["count"] for kind in ("dropped", "mended") for reason, row in index.report[kind].items()}


def test_small_file(tmp_path):
    index = opened(tmp_path, coco())
    assert index.image_ids.tolist() == [2, 5, 9] and len(index) == 3
    assert index.first_box.tolist() == [0, 0, 2, 3]
    assert index.boxes.tolist() == [[10, 20, 30.5, 40.25], [1, 2, 3, 4], [0, 0, 200, 100]]
    assert index.labels.tolist() == [2, 1, 1]
    assert index.crowd.tolist() == [False, False, True]
    assert index.areas.tolist() == [600.5, 12, 1]
    assert index.category_names == ("three", "seven") and index.category_ids.tolist() == [3, 7]
    assert [index.file_name(i) for i in range(3)] == ["2.jpg", "5.jpg", "9.jpg"]
    boxes, labels = index.ltrb(1)
    assert boxes.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_allclose(boxes, [[0.05, 0.2, 0.2025, 0.6025], [0.005, 0.02, 0.02, 0.06]], rtol=1e-6)
    assert index.ltrb(0)[0].shape == (0, 4)
    assert counts(index) == {}
    with pytest.raises(ValueError, match="read-only"):
        index.boxes[0, 0] = 1


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\:."), min_size=1, max_size=12)
ids = st.integers(-(2**53), 2**53) | st.integers(1, 40)


@st.composite
def clean_files(draw) -> dict:
    image_ids = draw(st.lists(ids, min_size=1, max_size=6, unique=True))
    category_ids = draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    side = st.integers(1, 700)
    images = [{"id": key, "file_name": draw(names) + ".jpg", "height": draw(side), "width": draw(side)} for key in image_ids]
    share = st.floats(0.01, 0.5)
    annotations = []
    for key in draw(st.lists(ids, max_size=12, unique=True)):
        image = draw(st.sampled_from(images))
        x, y, w, h = (draw(share) * whole for whole in (image["width"], image["height"]) * 2)
        entry = {"id": key, "image_id": image["id"], "category_id": draw(st.sampled_from(category_ids)), "bbox": [x, y, w, h]}
        annotations.append({**entry, "area": draw(st.floats(0, 1e6)), "iscrowd": draw(st.integers(0, 1))})
    return {"images": images, "annotations": annotations, "categories": [{"id": key, "name": f"c{draw(names)}"} for key in category_ids]}


@settings(deadline=None, max_examples=60)
@given(clean_files())
def test_index_equals_a_plain_reading(content):
    with tempfile.TemporaryDirectory() as folder:
        index = opened(Path(folder), content)
    expected = sorted(content["images"], key=lambda image: image["id"])
    label_of = {key: label for label, key in enumerate(sorted(category["id"] for category in content["categories"]), 1)}
    assert [index.file_name(i) for i in range(len(index))] == [image["file_name"] for image in expected]
    assert index.sizes.tolist() == [[image["height"], image["width"]] for image in expected]
    for position, image in enumerate(expected):
        mine = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        some = slice(index.first_box[position], index.first_box[position + 1])
        assert index.boxes[some].tolist() == [entry["bbox"] for entry in mine]
        assert index.labels[some].tolist() == [label_of[entry["category_id"]] for entry in mine]
        assert index.areas[some].tolist() == [entry["area"] for entry in mine]
        assert index.crowd[some].tolist() == [entry["iscrowd"] == 1 for entry in mine]
        assert index.box_ids[some].tolist() == [entry["id"] for entry in mine]
    assert counts(index) == {}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2, 3, 5, 7, 9, 11, 100, 200]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
edges = st.sampled_from([0, 1e-9, 5e-324, 199.9999999, 200, 100])
boxes = st.lists(st.floats(-1e308, 1e308) | st.floats(-1, 201) | edges, min_size=4, max_size=4)
fields = st.sampled_from(["id", "image_id", "category_id", "area", "iscrowd", "file_name", "height", "width", "name"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(list(coco())), st.integers(0, 1), fields, anything), max_size=3), st.lists(boxes, max_size=3))
def test_any_content_is_refused_in_words_or_gives_a_sound_index(edits, odd_boxes):
    content = coco()
    for place, position, field, value in edits:
        content[place][position][field] = value
    content["annotations"] += [{"id": 50 + n, "image_id": 5, "category_id": 3, "bbox": box} for n, box in enumerate(odd_boxes)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            index = opened(Path(folder), content)
        except UserError:
            return
    assert len(index.boxes) == len(index.labels) == len(index.areas) == index.first_box[-1] == len(set(index.box_ids.tolist()))
    lost = sum(count for reason, count in counts(index).items() if reason.startswith(("dropped: a", "dropped: b", "dropped: iscrowd")))
    assert len(index.boxes) + lost == len(content["annotations"])
    assert (index.boxes[:, 2:] > 0).all() and np.isfinite(index.boxes).all() and (index.areas >= 0).all()
    for image in range(len(index)):
        corners, labels = index.ltrb(image)
        assert ((corners >= 0) & (corners <= 1)).all() and (corners[:, :2] < corners[:, 2:]).all()
        assert ((labels >= 1) & (labels <= len(index.category_ids))).all()


NOT_FOUR, NO_SIDE = "dropped: box is not four finite numbers", "dropped: box width or height <= 0"
OUTSIDE, CLIPPED = "dropped: box wholly outside the image", "mended: box more than 0.5 px outside the image: clipped"
SLIGHT = "mended: box up to 0.5 px outside the image: kept for the COCO figures, clamped for training"
NO_AREA = "mended: area missing, not finite or negative: width x height taken"
FRESH = "mended: annotation id twice or missing: a fresh id given"
NO_NAME, NO_SIZE = "dropped: image without a file name", "dropped: image without a valid width and height"
OF_DROPPED = "dropped: annotation of a dropped image"
UNKNOWN_CLASS = "dropped: annotation of an unknown category"

ROWS = [  # entry changed, counts expected, boxes left
    *[(("annotations", 0, {"bbox": box}), {NOT_FOUR: 1}, 2) for box in ([1, 2, 3], [1, 2, "3", 4], None, "abcd", [1] * 5)],
    *[(("annotations", 0, {"bbox": [1, bad, 3, 4]}), {NOT_FOUR: 1}, 2) for bad in (float("nan"), float("inf"), 10**400, None, [], True)],
    *[(("annotations", 0, {"bbox": box}), {NO_SIDE: 1}, 2) for box in ([1, 2, 0, 4], [1, 2, 3, -4], [1, 2, -3, -4])],
    *[(("annotations", 0, {"bbox": box}), {OUTSIDE: 1}, 2) for box in ([200, 2, 3, 4], [1, 100, 3, 4], [-9, 2, 3, 4], [0, -4, 3, 4])],
    (("annotations", 0, {"bbox": [199.99999999, 2, 1e-9, 4]}), {"dropped: box thinner than 32-bit floats resolve": 1}, 2),
    (("annotations", 0, {"bbox": [-10, 20, 30, 90]}), {CLIPPED: 1}, 3),
    (("annotations", 0, {"bbox": [190, 20, 10.3, 40]}), {SLIGHT: 1}, 3),
    (("annotations", 0, {"bbox": [190, 20, 10.0001, 40]}), {}, 3),
    (("annotations", 0, {"image_id": 77}), {"dropped: annotation of an unknown image": 1}, 2),
    (("annotations", 0, {"image_id": ...}), {"dropped: annotation of an unknown image": 1}, 2),
    (("annotations", 0, {"category_id": 8}), {UNKNOWN_CLASS: 1}, 2),
    (("annotations", 0, {"category_id": ...}), {UNKNOWN_CLASS: 1}, 2),
    (("annotations", 0, {"iscrowd": 2}), {"dropped: iscrowd is neither 0 nor 1": 1}, 2),
    (("annotations", 0, {"iscrowd": "0"}), {"dropped: iscrowd is neither 0 nor 1": 1}, 2),
    (("annotations", 0, {"iscrowd": ...}), {}, 3),
    *[(("annotations", 0, {"area": area}), {NO_AREA: 1}, 3) for area in (..., None, -1, "5", float("nan"))],
    (("annotations", 0, {"id": ...}), {FRESH: 1}, 3),
    (("annotations", 2, {"id": 11}), {FRESH: 1}, 3),
    *[(("images", 1, {"file_name": name}), {NO_NAME: 1, OF_DROPPED: 2}, 1) for name in (..., "", None, 7)],
    *[(("images", 1, {"width": side}), {NO_SIZE: 1, OF_DROPPED: 2}, 1) for side in (..., 0, -3, 1.5, "200", None, 10**30)],
    (("categories", 0, {"name": ...}), {"mended: category without a name": 1}, 3),
]


@pytest.mark.parametrize("change, expected, boxes", ROWS, ids=[f"{place}-{fields}" for (place, _, fields), _, _ in ROWS])
def test_table_of_decisions(tmp_path, change, expected, boxes):
    place, position, fields = change
    index = opened(tmp_path, changed(place, position, **fields))
    assert counts(index) == expected
    assert len(index.boxes) == boxes
    assert len(set(index.box_ids.tolist())) == boxes
    for kind in ("dropped", "mended"):
        assert all(row["examples"] for row in index.report[kind].values())
    for image in range(len(index)):
        corners, _ = index.ltrb(image)
        assert ((corners >= 0) & (corners <= 1)).all() and (corners[:, :2] < corners[:, 2:]).all()


def test_clipped_and_slightly_outside_boxes(tmp_path):
    index = opened(tmp_path, changed("annotations", 0, bbox=[-10, 20, 30, 90], area=...))
    assert index.boxes[0].tolist() == [0, 20, 20, 80] and index.areas[0] == 1600
    index = opened(tmp_path, changed("annotations", 0, bbox=[190, 20, 10.3, 40]))
    assert index.boxes[0].tolist() == [190, 20, 10.3, 40] and index.ltrb(1)[0][0, 2] == 1


def test_identical_annotation_and_image_are_kept_once(tmp_path):
    content = coco()
    content["annotations"].append(copy.deepcopy(content["annotations"][0]))
    content["images"].append(dict(content["images"][0]))
    index = opened(tmp_path, content)
    assert counts(index) == {"dropped: annotation id twice, same content": 1, "dropped: image id twice, same file name and size": 1}
    assert len(index) == 3 and index.box_ids.tolist() == [11, 13, 12]


def test_fresh_ids_follow_the_largest(tmp_path):
    content = coco()
    content["annotations"] += [{**entry, "id": key} for entry, key in zip(content["annotations"], (13, None, 12), strict=True)]
    assert sorted(opened(tmp_path, content).box_ids.tolist()) == [11, 12, 13, 14, 15, 16]


def test_report_keeps_ten_examples(tmp_path):
    content = coco()
    content["annotations"] += [{"id": 100 + n, "image_id": 404, "category_id": 3, "bbox": [1, 1, 1, 1]} for n in range(25)]
    row = opened(tmp_path, content).report["dropped"]["annotation of an unknown image"]
    assert row["count"] == 25 and len(row["examples"]) == 10 and '"id": 100' in row["examples"][0]


ERRORS = [
    ("", "is empty"),
    (" \n", "is empty"),
    (json.dumps(coco())[:200], r"not valid JSON.*char \d+"),
    ("[" * 100_000, "not valid JSON"),
    ('{"images": ' + "1" * 5000 + "}", "not valid JSON"),
    ([], "no list 'images'"),
    ({"images": [], "annotations": []}, "no list 'categories'"),
    (coco(annotations={}), "no list 'annotations'"),
    (coco(images=[3]), r"images\[0\] is 3, not an object"),
    (coco(images=[]), "none is left"),
    (coco(categories=[]), "categories is empty"),
    (coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "category id 3 stands twice"),
    (changed("images", 2, id=5), "image id 5 is both"),
    *[(changed("images", 0, id=key), "ids must be integers") for key in ("9", 9.5, None, True, 2**62, ...)],
    *[(changed("annotations", 0, **{name: "5"}), "ids must be integers") for name in ("id", "image_id", "category_id")],
    (changed("categories", 0, id="7"), "ids must be integers"),
    *[(changed("images", 0, file_name=name), "file name .* of image 9") for name in ("/etc/passwd", "../x.jpg", "a/../../x", "..", "a\0b")],
    *[(changed("images", 0, file_name=name), "file name .* of image 9") for name in ("..\\x.jpg", "\\x.jpg", "C:\\x.jpg", "\ud800.jpg")],
]


@pytest.mark.parametrize("content, message", ERRORS, ids=[f"{number}-{message}" for number, (_, message) in enumerate(ERRORS)])
def test_errors_name_the_file_and_the_fix(tmp_path, content, message):
    file = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        AnnotationIndex.open(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 900
    assert not list(tmp_path.glob("*.npz"))


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "annotations.json"
    file.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match="not valid JSON"):
        AnnotationIndex.open(file)


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(UserError, match="--download"):
        AnnotationIndex.open(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        AnnotationIndex.open(tmp_path)


def test_names_beyond_ascii_and_huge_ids(tmp_path):
    name = "Ünïcode/画像 🚲.jpg"
    content = coco(images=[{"id": key, "file_name": file, "height": 1, "width": 2} for key, file in ((2**53, name), (2**53 + 1, "b.jpg"))])
    content["annotations"] = [{"id": 2**53 + 1, "image_id": 2**53 + 1, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}]
    index = opened(tmp_path, content)
    assert index.image_ids.tolist() == [2**53, 2**53 + 1] and index.box_ids.tolist() == [2**53 + 1]
    assert index.file_name(0) == name and index.first_box.tolist() == [0, 0, 1]


# On disk


def test_second_opening_reads_the_index(tmp_path):
    file = write(tmp_path, coco())
    assert AnnotationIndex.open(file).origin == "packed"
    again = AnnotationIndex.open(file)
    assert again.origin == "current" and again.stored_in == tmp_path / "annotations.index.npz"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_changed_file_is_noticed_also_at_the_same_size_and_time(tmp_path):
    file = write(tmp_path, coco())
    AnnotationIndex.open(file)
    status = file.stat()
    file.write_text(file.read_text().replace("30.5", "31.5"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    index = AnnotationIndex.open(file)
    assert index.origin == "packed" and index.boxes[0, 2] == 31.5


def test_touched_file_is_not_packed_again(tmp_path, monkeypatch):
    file = write(tmp_path, coco())
    before = AnnotationIndex.open(file)
    os.utime(file)
    monkeypatch.setattr(coco_json, "parse", lambda file: pytest.fail("parsed again"))
    after = AnnotationIndex.open(file)
    assert after.origin == "refreshed" and after.to_coco() == before.to_coco()
    assert AnnotationIndex.open(file).origin == "current"


def test_other_format_is_packed_again(tmp_path, monkeypatch):
    file = write(tmp_path, coco())
    AnnotationIndex.open(file)
    monkeypatch.setattr(index_module, "FORMAT", 10**6)
    lines = []
    assert AnnotationIndex.open(file, lines.append).origin == "packed"
    assert any("has format" in line for line in lines)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_index_is_repaired(data):
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), coco())
        clean = AnnotationIndex.open(file)
        content = bytearray(clean.stored_in.read_bytes())
        if data.draw(st.booleans(), label="truncate"):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        clean.stored_in.write_bytes(content)
        lines = []
        index = AnnotationIndex.open(file, lines.append)
        assert index.to_coco() == clean.to_coco()
        # Damage outside the data (a time inside the archive) may go unnoticed; wrong data may not.
        assert index.origin == "current" or any("is damaged" in line for line in lines)
        assert AnnotationIndex.open(file).origin == "current"


OPEN = "import sys; from data_sets.index import AnnotationIndex as A; i = A.open(sys.argv[1], lambda s: print(s, file=sys.stderr)); "
OPEN += "print(i.origin, i.stored_in, len(i.boxes))"


def start(file: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **options.pop("env", {})}
    command = [sys.executable, "-c", OPEN, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_processes_at_once_pack_once(tmp_path):
    file = tmp_path / "instances_train2017.json"
    measured.generate(file, 2_000, 10_000, lambda line: None)
    assert file.stat().st_size > index_module.PARSE_HERE_BYTES  # so this also covers the child that parses
    running = [start(file) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], answers
    assert sorted(answer.split()[0] for answer, _ in answers) == ["current", "current", "packed"], answers
    assert {answer.split()[2] for answer, _ in answers} == {"10000"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_error_of_the_child_reaches_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PARSE_HERE_BYTES", 0)
    with pytest.raises(UserError, match="category id 3 stands twice"):
        opened(tmp_path, coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]))
    assert opened(tmp_path, coco()).origin == "packed"


@contextlib.contextmanager
def unprivileged():
    """As an ordinary user for a while: root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_folder_that_cannot_be_written(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies below a folder that only its owner may enter
        folder, cache = Path(name) / "data", Path(name) / "cache"
        folder.mkdir()
        cache.mkdir()
        file = write(folder, coco())
        for path, mode in ((Path(name), 0o755), (cache, 0o777), (folder, 0o555)):
            path.chmod(mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for expected in ("packed", "current"):
            lines = []
            with unprivileged():
                index = AnnotationIndex.open(file, lines.append)
            assert index.origin == expected and index.stored_in.parent == cache / "ssd-zoo"
            assert any("cannot be written" in line for line in lines) == (expected == "packed")
        assert [path.name for path in folder.iterdir()] == ["annotations.json"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        with unprivileged(), pytest.raises(UserError, match="set XDG_CACHE_HOME"):
            AnnotationIndex.open(file)
        folder.chmod(0o755)
        assert AnnotationIndex.open(file).stored_in.parent == folder


def figures(coco_api, detections: list) -> list[float]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_api, coco_api.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_coco_figures_equal_those_of_the_raw_file(tmp_path):
    from pycocotools.coco import COCO

    raw = GOLDEN / "coco_gt.json"
    index = AnnotationIndex.open(write(tmp_path, raw.read_text()))
    assert counts(index) == {}
    detections = json.loads((GOLDEN / "coco_detections.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        from_raw, from_index = COCO(str(raw)), COCO()
        from_index.dataset = index.to_coco()
        from_index.createIndex()
    assert figures(from_index, detections) == figures(from_raw, detections)
    expected = json.loads((GOLDEN / "coco_stats.json").read_text())
    np.testing.assert_allclose(figures(from_index, detections), [expected[name] for name in FIGURES], rtol=0, atol=1e-9)


# The commands


def test_tool_prints_counts_and_reasons(tmp_path, capsys):
    folder = tmp_path / "annotations"
    with pytest.raises(UserError, match="--demo-data"):
        index_tool.main(["--data_dir", str(tmp_path)])
    for made in ("annotations", "train2017", "val2017"):
        (tmp_path / made).mkdir()
    write(folder, changed("annotations", 0, bbox=[1, 2, 0, 4]), "instances_train2017.json")
    with pytest.raises(UserError, match="instances_train2017.json is there and no validation part"):
        index_tool.main(["--data_dir", str(tmp_path)])
    write(folder, coco(), "instances_val2017.json")
    assert index_tool.main(["--data-dir", str(tmp_path)]) == index_tool.main(["--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 × box width or height <= 0", out) and '"bbox": [1, 2, 0, 4]' in out and "packed in" in out and "current in" in out


def test_opening_imports_no_torch():
    code = "import sys, data_sets.index, data_sets.pack; sys.exit(any(m.split('.')[0] in ('torch', 'PIL') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_bench_reports_a_missed_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "IMAGES", 200)
    monkeypatch.setattr(measured, "BOXES", 500)
    monkeypatch.setattr(measured, "OPENINGS", 2)
    assert bench.main(["--part", "index", "--json", str(tmp_path / "figures.json")]) == 0
    monkeypatch.setattr(measured, "OPEN_SECONDS", 0.0)
    assert bench.main(["--part", "index"]) == 1
    assert "MISS" in capsys.readouterr().out
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["machine"]["cores"] and all(figure["ok"] for figure in content["parts"][0]["figures"])


@pytest.mark.long
def test_size_of_coco_train_meets_the_limits():
    assert bench.main(["--part", "index"]) == 0

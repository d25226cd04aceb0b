"""Where a data set's parts are found in its folder, what is said where they are not, and that every command asks the same function."""

import subprocess
import sys
from pathlib import Path

import pytest

from base.config import Config, Resolved, with_layout
from base.errors import UserError
from data_sets.layout import COCO_2017, find
from tests.conftest import ROOT

VOC = ("Annotations/1.xml", "JPEGImages/1.jpg")


def made(folder: Path, *files: str) -> Path:
    """A folder with these files, each with its own stem as a line; a name that ends in / is a folder."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_text("1\n")
    return folder


def lists(*names: str, at: str = "") -> list[str]:
    return [f"{at}ImageSets/Main/{name}.txt" for name in names]


FOUND = {  # files → train_images, train_annotations, val_images, val_annotations
    "coco 2014": (
        ("annotations/instances_train2014.json", "annotations/instances_val2014.json", "annotations/captions_val2014.json", "train2014/", "val2014/"),
        ("train2014", "annotations/instances_train2014.json", "val2014", "annotations/instances_val2014.json"),
    ),
    "images in images/": (
        ("annotations/instances_train.json", "annotations/instances_val.json", "images/train/", "images/val/", "images/test/"),
        ("images/train", "annotations/instances_train.json", "images/val", "annotations/instances_val.json"),
    ),
    "all images together": (
        ("annotations/train.json", "annotations/val.json", "images/1.jpg"),
        ("images", "annotations/train.json", "images", "annotations/val.json"),
    ),
    "names that differ": (
        ("annotations/instances_train_v2.json", "annotations/instances_val_v2.json", "train/", "validation/"),
        ("train", "annotations/instances_train_v2.json", "validation", "annotations/instances_val_v2.json"),
    ),
    "files beside the folders": (("train.json", "valid.json", "train/", "valid/"), ("train", "train.json", "valid", "valid.json")),
    "roboflow": (
        tuple(f"{part}/_annotations.coco.json" for part in ("train", "valid", "test")),
        ("train", "train/_annotations.coco.json", "valid", "valid/_annotations.coco.json"),
    ),
    "voc, train and val": (
        (*VOC, *lists("train", "val", "trainval")),
        ("JPEGImages", "ImageSets/Main/train.txt", "JPEGImages", "ImageSets/Main/val.txt"),
    ),
    "voc, annotated test": (
        (*VOC, *lists("train", "val", "trainval", "test")),
        ("JPEGImages", "ImageSets/Main/trainval.txt", "JPEGImages", "ImageSets/Main/test.txt"),
    ),
    "the level above voc": (
        tuple(f"VOCdevkit/VOC2007/{name}" for name in (*VOC, *lists("train", "val"))),
        tuple(f"VOCdevkit/VOC2007/{name}" for name in ("JPEGImages", "ImageSets/Main/train.txt", "JPEGImages", "ImageSets/Main/val.txt")),
    ),
    "coco 2017 comes first": (
        (*(f"{name}/" for name in ("train2017", "val2017")), *list(COCO_2017.values())[1::2], "annotations/train.json", *VOC, *lists("train", "val")),
        tuple(COCO_2017.values()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_is_found(tmp_path, case):
    files, expected = FOUND[case]
    paths, layout = find(made(tmp_path, *files))
    assert tuple(paths.values()) == expected and list(paths) == list(COCO_2017)
    assert layout == "" if case == "coco 2017 comes first" else all(path in layout for path in expected)


def test_a_test_list_without_xmls_is_no_validation(tmp_path):
    made(tmp_path, *VOC, *lists("train", "val", "trainval", "test"))
    (tmp_path / "ImageSets/Main/test.txt").write_text("2\n3\n")
    assert find(tmp_path)[0]["val_annotations"] == "ImageSets/Main/val.txt"


REFUSED = {
    "nothing": (("photo.jpg",), "no annotations are found; looked for COCO's .*It holds photo.jpg"),
    "two pairs": (
        tuple(f"annotations/instances_{name}.json" for name in ("train2014", "val2014", "train2017", "val2017")) + ("train2014/", "val2014/"),
        r"could be several data sets: annotations/instances_train2014.json with train2014/, .*val2017.json",
    ),
    "two image folders": (("annotations/train.json", "annotations/val.json", "train/", "images/train/", "val/"), "several data .*images/train/"),
    "two layouts": ((*VOC, *lists("train", "val"), "train/_annotations.coco.json", "valid/_annotations.coco.json"), "several data sets"),
    "two years": (
        tuple(f"VOC{year}/{name}" for year in (2007, 2012) for name in (*VOC, *lists("train", "val"))),
        "several data sets: .*name one year, such as --data_dir .*VOC2007",
    ),
    "no validation": (("train/_annotations.coco.json",), "train/_annotations.coco.json is there and no validation part; .* set some apart"),
    "voc without validation": ((*VOC, *lists("train")), "ImageSets/Main/train.txt is there and no validation part"),
    "voc without lists": (VOC, "no lists of their names, one a line, in ImageSets/Main/"),
    "words that begin alike": (("values.json", "trainer.json", "images/"), "no annotations are found"),
    "no training": ((*VOC, *lists("val")), "ImageSets/Main/val.txt is there and no training part"),
    "no images": (("annotations/train.json", "annotations/val.json", "val/"), "folder of the images of annotations/train.json is missing"),
    "trainval is neither": (("annotations/trainval.json", "annotations/val.json", "images/"), "no training part"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    files, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        find(made(tmp_path, *files))
    assert all(f"--{key}" in str(caught.value) for key in COCO_2017)


def test_what_is_stated_is_taken_and_the_rest_is_found(tmp_path):
    made(tmp_path, "annotations/train.json", "annotations/mini.json", "annotations/val.json", "images/1.jpg")
    own = {"val_images": "images", "val_annotations": "annotations/mini.json"}
    paths, _ = find(tmp_path, given=own)
    assert paths == {"train_images": "images", "train_annotations": "annotations/train.json", **own}
    with pytest.raises(UserError, match=r"lacks images/val \(val_images\)"):
        find(tmp_path, given={**own, "val_images": "images/val"})
    assert find(tmp_path, parts=("val",))[0] == {"val_images": "images", "val_annotations": "annotations/val.json"}
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "none")


def test_the_configuration_says_what_was_found(tmp_path):
    made(tmp_path, "annotations/train.json", "annotations/val.json", "images/1.jpg")
    lines = []
    resolved = with_layout(Resolved(Config(data_dir=str(tmp_path)), {"data_dir": "--data_dir"}), lines.append)
    assert resolved.config.path("train_annotations") == tmp_path / "annotations/train.json"
    assert resolved.sources["val_images"].startswith("found in data_dir: COCO, annotations/train.json with images/")
    assert lines == [f"data found in {tmp_path}: {resolved.sources['val_images'].partition(': ')[2]}"]
    with pytest.raises(UserError, match=r"lacks train2017 \(train_images\)"):
        with_layout(Resolved(Config(data_dir=str(tmp_path)), {"train_images": "a.yaml"}), lines.append)


def test_it_is_found_before_anything_is_installed(tmp_path):
    code = "import sys, data_sets.layout; sys.exit(any(m.split('.')[0] in ('numpy', 'pydantic', 'yaml', 'torch') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = subprocess.run([sys.executable, ROOT / "prepare.py", "--data_dir", made(tmp_path, "train.json", "train/")], capture_output=True, text=True)
    assert done.returncode == 2 and "train.json is there and no validation part" in done.stderr

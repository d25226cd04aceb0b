"""Pascal VOC: what its lists and XMLs become, what is done with bad ones, and that a training sees what it sees of the same COCO data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from base import checkpoint
from base.__main__ import main
from base.errors import UserError
from data_sets import voc
from data_sets.index import AnnotationIndex
from tests.conftest import losses

SIZE = "<size><width>200</width><height>100</height><depth>3</depth></size>"


def thing(name="dog", box=(11, 21, 50, 60), more="") -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def xml(*objects: str, size: str = SIZE) -> str:
    return f"<annotation><filename>elsewhere.jpg</filename>{size}{''.join(objects)}</annotation>"


def folder(place: Path, **lists: list[str]) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (place / name).mkdir(parents=True)
    for name, names in lists.items():
        (place / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{line}\n" for line in names))
    return place


def opened(place: Path, contents: dict[str, str], names: list[str] | None = None) -> AnnotationIndex:
    """The index of a list of all XMLs, or of ``names``."""
    folder(place, train=names or list(contents))
    for name, content in contents.items():
        (place / "Annotations" / f"{name}.xml").write_text(content)
    return AnnotationIndex.open(place / "ImageSets/Main/train.txt")


def counts(index: AnnotationIndex) -> dict[str, int]:
    return {reason: row["count"] for kind in ("dropped", "mended") for reason, row in index.report[kind].items()}


def test_an_index_of_a_list(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    contents = {
        "2008_000008": xml(thing("person", more=part), thing("dog", (1, 1, 200, 100), "<difficult>1</difficult>")),
        "000005": xml(thing("cat", ("11.5", 21, 50, 60), "<difficult>0</difficult>")),
        "a b": xml(),
        "unlisted": xml(thing("sofa")),
    }
    index = opened(tmp_path / "voc", contents, ["a b", "2008_000008", "000005", "", "000005"])
    assert index.image_ids.tolist()[:2] == [5, 2008000008] and 1 << 52 <= index.image_ids[2] < 1 << 53
    assert [index.file_name(n) for n in range(3)] == ["000005.jpg", "2008_000008.jpg", "a b.jpg"]
    assert index.sizes.tolist() == [[100, 200]] * 3 and index.category_names == voc.CLASSES
    assert index.boxes.tolist() == [[10.5, 20, 39.5, 40], [10, 20, 40, 40], [0, 0, 200, 100]]  # counted from 1, both ends included
    assert index.labels.tolist() == [8, 15, 12] and index.crowd.tolist() == [False, False, True] and index.box_ids.tolist() == [1, 2, 3]
    assert counts(index) == {"image in the list twice": 1}
    again = opened(tmp_path / "other", contents, ["000005", "2008_000008", "a b"])
    assert again.to_coco() == index.to_coco()


def test_classes_are_those_of_the_folder_and_images_have_any_ending(tmp_path):
    place = folder(tmp_path / "voc", train=["a"], val=["b"])
    for name, kind in (("a", "zebra"), ("b", "Ant")):
        (place / "Annotations" / f"{name}.xml").write_text(xml(thing(kind)))
        Image.new("RGB", (200, 100)).save(place / "JPEGImages" / f"{name}.png")
    train, val = (AnnotationIndex.open(place / f"ImageSets/Main/{part}.txt") for part in ("train", "val"))
    assert train.category_names == val.category_names == ("Ant", "zebra") and train.labels.tolist() == [2] and val.file_name(0) == "b.png"


def test_a_changed_xml_is_noticed(tmp_path):
    place = tmp_path / "voc"
    opened(place, {"1": xml(thing())})
    file, names = place / "Annotations/1.xml", place / "ImageSets/Main/train.txt"
    assert AnnotationIndex.open(names).origin == "current"
    file.touch()
    assert AnnotationIndex.open(names).origin == "refreshed"
    file.write_text(xml(thing(box=(11, 21, 51, 60))))
    assert AnnotationIndex.open(names).boxes.tolist() == [[10, 20, 41, 40]]
    Image.new("RGB", (200, 100)).save(place / "JPEGImages/1.png")
    assert AnnotationIndex.open(names).file_name(0) == "1.png"


DROPPED = {
    "box width or height <= 0": xml(thing(box=(50, 21, 11, 60))),
    "box wholly outside the image": xml(thing(box=(300, 21, 350, 60))),
    "box more than 0.5 px outside the image: clipped": xml(thing(box=(0, 21, 40, 60))),
    "box is not four finite numbers": xml("<object><name>dog</name></object>", thing(box=(1, 2, "x", 4)), thing(box=(1, 2, "1e999", 4))),
    "annotation of an unknown category": xml(thing(name="")),
    "iscrowd is neither 0 nor 1": xml(thing(more="<difficult>maybe</difficult>")),
    "image without a valid width and height": xml(size="<size><width>0</width><height>wide</height></size>"),
    "image whose XML cannot be read": "<annotation><size>",
}


@pytest.mark.parametrize("reason", DROPPED)
def test_what_is_dropped_or_mended_is_counted(tmp_path, reason):
    index = opened(tmp_path / "voc", {"good": xml(thing()), "bad": DROPPED[reason]})
    assert reason in counts(index) and len(index.boxes) == 1 + ("clipped" in reason)


def test_other_xmls_and_missing_ones(tmp_path):
    contents = {"1": xml(thing()), "2": "<svg/>", "3": "<?xml version='1.0' encoding='none-such'?><annotation/>", "4": "", "5": "&amp;<annotation/>"}
    twice = thing().replace("</object>", "<bndbox><xmin>1</xmin></bndbox></object>")
    index = opened(tmp_path / "voc", {**contents, "6": xml(twice)}, [*"1234567", "../1"])
    assert counts(index) == {"image whose XML cannot be read": 4, "image without an XML": 2, "box is not four finite numbers": 1}
    assert index.image_ids.tolist() == [1, 6] and len(index.boxes) == 1


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)) + "]>"


@pytest.mark.parametrize("head", [BOMB, '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>', '<!DOCTYPE a SYSTEM "http://localhost/a.dtd">'])
def test_a_doctype_is_refused_in_any_xml_of_the_folder(tmp_path, head):
    with pytest.raises(UserError, match=r"2\.xml declares a DOCTYPE \(a\)"):
        opened(tmp_path / "voc", {"1": xml(thing()), "2": head + xml(thing(name="&a;"))}, ["1"])


def test_folders_and_lists_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="images 05 and 5 have the same number"):
        opened(tmp_path / "same", {"5": xml(), "05": xml()})
    with pytest.raises(UserError, match="of 0 images none is left .*image without an XML"):
        opened(tmp_path / "none", {"5": xml()}, ["6 -1"])
    for text, message in ((b"\n", "is empty"), (b"\xff\xfe1", "is not text in UTF-8")):
        (tmp_path / "same/ImageSets/Main/train.txt").write_bytes(text)
        with pytest.raises(UserError, match=message):
            AnnotationIndex.open(tmp_path / "same/ImageSets/Main/train.txt")
    (tmp_path / "list.txt").write_text("5")
    with pytest.raises(UserError, match="must lie in ImageSets/Main beside Annotations/"):
        AnnotationIndex.open(tmp_path / "list.txt")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        AnnotationIndex.open(tmp_path / "same/ImageSets/Main/other.txt")
    place = folder(tmp_path / "two", train=["1"])
    (place / "Annotations/1.xml").write_text(xml(thing()))
    for ending in ("jpg", "PNG"):
        (place / f"JPEGImages/1.{ending}").touch()
    with pytest.raises(UserError, match="holds 1.PNG and 1.jpg for the image 1"):
        AnnotationIndex.open(place / "ImageSets/Main/train.txt")
    monkeypatch.setattr(voc, "LARGEST_XML", 10)
    with pytest.raises(UserError, match=r"1\.xml has more than"):
        AnnotationIndex.open(place / "ImageSets/Main/train.txt")


@pytest.fixture(scope="module")
def twins(tmp_path_factory, demo_data):
    """The demo's images as VOC, its classes named otherwise, and as COCO with the same ids: boxes in whole pixels, difficult as crowd."""
    place = tmp_path_factory.mktemp("twins")
    lists = {}
    for part in ("train", "val"):
        source = json.loads((demo_data / f"annotations/instances_{part}2017.json").read_text())
        names = {category["id"]: f"thing {category['name']}" for category in source["categories"]}
        classes = sorted(names.values())
        lists[part] = [Path(image["file_name"]).stem for image in source["images"]]
        for box in source["annotations"]:
            box["bbox"] = np.round(box["bbox"]).tolist()
            box["area"] = box["bbox"][2] * box["bbox"][3]
        if part == "train":
            folder(place / "voc")
        for image in source["images"]:
            name, boxes = Path(image["file_name"]).stem, [box for box in source["annotations"] if box["image_id"] == image["id"]]
            corners = [(x + 1, y + 1, x + w, y + h) for x, y, w, h in (box["bbox"] for box in boxes)]
            objects = [
                thing(names[box["category_id"]], ltrb, f"<difficult>{box['iscrowd']}</difficult>") for box, ltrb in zip(boxes, corners, strict=True)
            ]
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            (place / "voc/Annotations" / f"{name}.xml").write_text(xml(*objects, size=size))
            shutil.copy(demo_data / f"{part}2017" / image["file_name"], place / "voc/JPEGImages")
        source["categories"] = [{"id": key, "name": name} for key, name in enumerate(classes, 1)]
        for box in source["annotations"]:
            box["category_id"] = classes.index(names[box["category_id"]]) + 1
        for image in source["images"]:
            image["id"], old = int(Path(image["file_name"]).stem), image["id"]
            assert image["id"] == old  # the demo's names are its ids, as COCO's are
        (place / "coco/annotations").mkdir(parents=True, exist_ok=True)
        (place / f"coco/annotations/{part}.json").write_text(json.dumps(source))
        (place / "voc/ImageSets/Main" / f"{part}.txt").write_text("\n".join(reversed(lists[part])))
    (place / "coco/images").symlink_to(place / "voc/JPEGImages")
    return place


def test_voc_and_coco_are_packed_alike(twins):
    for part in ("train", "val"):
        own, other = (AnnotationIndex.open(twins / file) for file in (f"voc/ImageSets/Main/{part}.txt", f"coco/annotations/{part}.json"))
        for name in ("image_ids", "sizes", "file_names", "first_box", "boxes", "labels", "crowd", "areas", "category_ids"):
            assert np.array_equal(getattr(own, name), getattr(other, name)), name
        assert own.category_names == other.category_names and own.crowd.any()


@pytest.mark.long
def test_voc_trains_from_a_checkpoint_of_other_classes_on_the_default_backend(train, twins, tmp_path, capsys):
    """Its figures are those of the same data as COCO, from the run and from `evaluate`, which refuses data of other names."""
    flags = ("--name", "cpu", "--target", "null", "--log_every", "1", "--learning_rate", "0.003", "--warmup_steps", "0", "--score_threshold", "0")
    assert train(*flags, "--max_steps", "2", run="demo").returncode == 0
    done = train(*flags, "--max_steps", "9", "--checkpoint", str(tmp_path / "demo"), data_dir=twins / "voc", run="voc")
    assert done.returncode == 0, done.stderr
    where = "Pascal VOC, ImageSets/Main/train.txt with JPEGImages/, ImageSets/Main/val.txt with JPEGImages/"
    assert f"data found in {twins / 'voc'}: {where}" in done.stdout and "optimizer and step afresh; random: class_heads.0.weight" in done.stdout
    assert f"# found in data_dir: {where}" in (tmp_path / "voc/config.yaml").read_text()
    assert len(losses(tmp_path / "voc")) == 9
    best = checkpoint.read(tmp_path / "voc/checkpoints/best.pt")
    assert best["categories"] == {"ids": [1, 2, 3, 4, 5], "names": [f"thing {name}" for name in ("disc", "ring", "square", "star", "triangle")]}

    command = ["evaluate", "--checkpoint", str(tmp_path / "voc/checkpoints/best.pt"), "--device", "cpu"]
    assert main(command) == 0
    own = capsys.readouterr().out
    assert main([*command, "--data_dir", str(twins / "coco")]) == 0
    assert capsys.readouterr().out == f"data found in {twins / 'coco'}: COCO, annotations/val.json with images/\n{own}"
    (figures,) = best["progress"]["evaluations"]
    assert own.split()[:4] == ["AP", f"{figures['AP']:.4f}", "AP50", f"{figures['AP50']:.4f}"] and figures["AP50"] > 0
    for file in (twins / "voc/Annotations").iterdir():
        file.write_text(file.read_text().replace("thing disc", "bowl disc"))
    assert main(command) == 2
    assert "category 1 is 'thing disc' in the checkpoint and 'bowl disc' in the data" in capsys.readouterr().err

"""`python -m base data`: its figures against plain counting and brute force, its page against what stands in the data."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from base.backends.reference.matcher import match
from base.backends.reference.model import feature_sizes
from PIL import Image

from base.__main__ import main
from base.boxes import default_boxes, iou
from data_sets.coverage import best_overlaps, by_area, by_ratio, by_size, fits
from data_sets.index import AnnotationIndex
from data_sets.look_page import data_page
from data_sets.survey import class_table, facts, look
from pages.html import bar_chart, jpeg, page, table
from pages.text import shown

NAME = '<script>alert("1")</script> & [red]'


class Tags(HTMLParser):
    """Every start tag with its attributes, the text, and whether tags close in the order in which they open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def some_boxes(seed: int) -> np.ndarray:
    """Boxes of every size and shape: from a thousandth of the image to all of it, at its edges too."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(1e-3), 0, (300, 2)))
    low = rng.uniform(0, 1, (300, 2)) * (1 - sides)
    low[:100] = np.where(rng.random((100, 2)) < 0.5, 0, (1 - sides)[:100])
    return np.concatenate([np.concatenate([low, low + sides], 1), [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75]]]).clip(0, 1).astype(np.float32)


@pytest.mark.parametrize("image_size, strides", [((300, 300), (1, 1, 2, 2, 2, 1)), ((800, 1200), (3, 3, 2, 2, 2, 2)), ((96, 96), (1,) * 6)])
def test_the_nearest_centres_give_what_all_default_boxes_give(image_size, strides):
    boxes, defaults = some_boxes(1), default_boxes(image_size, feature_sizes(image_size, strides))
    best = np.concatenate(list(best_overlaps(boxes, defaults)))
    expected = iou(torch.from_numpy(boxes), defaults.ltrb).max(1).values.numpy()
    np.testing.assert_allclose(best, expected, rtol=0, atol=1e-6)
    assert (fits(best) == (expected > 0.5)).all() and 20 < fits(best).sum() < 280


def test_a_box_that_does_not_fit_is_matched_once():
    """What the tool calls "only by force" is what the matcher does with it."""
    boxes, defaults = some_boxes(2), default_boxes((300, 300), feature_sizes((300, 300), (1, 1, 2, 2, 2, 1)))
    fit = fits(np.concatenate(list(best_overlaps(boxes, defaults))))
    ones = torch.ones(len(boxes), 1, dtype=torch.long)
    positives = (match(torch.from_numpy(boxes)[:, None], ones, defaults).labels > 0).sum(1).numpy()
    assert (positives[~fit] == 1).all() and (positives >= 1).all() and positives[fit].max() > 1


def test_groups_hold_every_box_in_its_place():
    boxes = np.array([[0, 0, 0.01, 0.01], [0, 0, 0.1, 0.1], [0, 0, 0.1, 0.5], [0, 0, 1, 1]], dtype=np.float32)
    fit = np.array([False, True, False, True])
    filled = lambda rows: {row.name: (row.boxes, row.fit) for row in rows if row.boxes}  # noqa: E731
    assert filled(by_size(boxes, (300, 300), fit)) == {"under 4": (1, 0), "16 to 32": (1, 1), "64 to 128": (1, 0), "256 to 512": (1, 1)}
    assert filled(by_ratio(boxes, (100, 200), fit)) == {"1:4 to 1:2": (1, 0), "2:1 to 4:1": (3, 2)}
    assert filled(by_area(np.array([1023.9, 1024, 9215, 9216]), fit)) == {"small": (1, 0), "medium": (2, 1), "large": (1, 1)}
    assert filled(by_size(boxes[:0], (300, 300), fit[:0])) == {}


@pytest.fixture(scope="module")
def broken(demo_data, tmp_path_factory) -> Path:
    """The demo data with a hostile class name, three bad annotations and four bad image files in the training part."""
    folder = tmp_path_factory.mktemp("broken") / "set"
    shutil.copytree(demo_data, folder, ignore=shutil.ignore_patterns("*.index.npz*", ".*"))
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = NAME
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != 44]  # a class without a box
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["category_id"] = 99
    content["annotations"][2]["area"] = -1
    file.write_text(json.dumps(content))
    missing, cut, other, half = (folder / "train2017" / image["file_name"] for image in content["images"][:4])
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:1000])
    Image.new("RGB", (300, 30)).save(other)
    with Image.open(half) as picture:
        small = picture.resize((picture.width * 2, picture.height * 2))
    small.save(half)
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["data", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_counts_are_those_of_the_json(demo_data):
    defaults = default_boxes((96, 96), feature_sizes((96, 96), (1,) * 6))
    file = demo_data / "annotations" / "instances_train2017.json"
    part = look("train", AnnotationIndex.open(file), demo_data / "train2017", defaults, True, 1, True)
    content = json.loads(file.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    entries, sides = content["annotations"], sorted(image["width"] for image in content["images"])
    found = facts(part)
    assert found["images"] == "72" and found["images with boxes"] == str(len({entry["image_id"] for entry in entries}))
    assert found["boxes"] == str(len(entries)) and found["of them crowd"] == str(sum(entry["iscrowd"] for entry in entries)) != "0"
    assert found["width of an image, pixels"] == f"{sides[0]} to {sides[-1]}, median {np.median(sides):,.0f}"
    boxes = Counter(names[entry["category_id"]] for entry in entries)
    images = Counter(names[category] for category, _ in {(entry["category_id"], entry["image_id"]) for entry in entries})
    _, rows = class_table([part])
    assert {row[0]: (int(row[1]), int(row[2])) for row in rows} == {name: (boxes[name], images[name]) for name in boxes}
    assert [int(row[1]) for row in rows] == sorted(boxes.values(), reverse=True)
    assert part.checked == 72 and part.bad == {}


def test_what_is_broken_is_named_and_the_page_holds_the_samples(broken, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    flags = ("--image-size", 96, 96, "--strides", *"111111", "--check_images", "all", "--samples", 12, "--out", out)
    code, printed, _ = run(capsys, broken, *flags)
    assert code == 1, printed
    names = sorted(image["file_name"] for image in json.loads((broken / "annotations" / "instances_train2017.json").read_text())["images"][:4])
    for text in ("1 × box width or height <= 0", "1 × annotation of an unknown category", "1 × area missing", *names):
        assert text in printed
    for kind in ("missing", "unreadable", "another aspect ratio than recorded", "another size than recorded, same aspect ratio: used"):
        assert f"    1 × {kind}\n" in printed
    text = out.read_text()
    found = Tags(text)
    assert found.open == [] and len(text) < 5_000_000 and NAME in found.text and "classes without a box: 1" in found.text
    assert {"script", "link", "iframe", "a", "red"}.isdisjoint(tag for tag, _ in found.tags)
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == 12 and all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for a in pictures)
    assert not any(
        name.startswith("on") or (name in ("src", "href") and not value.startswith("data:")) for _, a in found.tags for name, value in a.items()
    )
    shown_classes = {label for a in pictures for label in ("disc", "square", "triangle", "star", NAME) if label in a["alt"]}
    assert {"square", "triangle", "star", NAME} <= shown_classes
    again = run(capsys, broken, *flags)
    assert again[1] == printed and out.read_text() == text  # drawn by its seed
    assert run(capsys, broken, *flags, "--seed", 2)[0] == 1 and out.read_text() != text


def test_every_third_box_is_drawn_dashed_if_it_does_not_fit(demo_data):
    defaults, parts = default_boxes((96, 96), feature_sizes((96, 96), (1,) * 6)), []
    for name in ("train", "val"):
        index = AnnotationIndex.open(demo_data / "annotations" / f"instances_{name}2017.json")
        part = look(name, index, demo_data / f"{name}2017", defaults, False, 1, True)
        parts.append(replace(part, fit=np.arange(len(index.boxes)) % 3 > 0))
    found = Tags(data_page("x", parts, (96, 96), "", 96, 1))  # three quarters of 96 are of train: all images with boxes
    kinds = Counter(attributes.get("class") for tag, attributes in found.tags if tag == "path" and attributes.get("stroke"))
    assert kinds == {"forced": sum((~part.fit).sum() for part in parts), None: sum(part.fit.sum() for part in parts)}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image_size", "20", "20"], "leaves no feature map"),
        (["--strides", "1", "2", "2", "2", "2", "1"], "different feature maps"),
        (["--samples", "201"], "--samples 201 is not within 0 and 200"),
    ],
)
def test_refusals(demo_data, capsys, flags, message):
    code, _, said = run(capsys, demo_data, *flags)
    assert code == 2 and message in said


def test_no_data_set(tmp_path, capsys):
    code, _, said = run(capsys, tmp_path)
    assert code == 2 and "no annotations are found" in said


def test_parts_of_a_page():
    hostile = 'a<b>"&\x1b[31m\u202e\ud800'
    body = table(["", hostile], [[hostile, hostile], ["head", ""]]) + bar_chart(
        hostile, [(hostile, [1, 3], hostile), ("none", [0, 0], "0")], [hostile, "b"]
    )
    found = Tags(page(hostile, body))
    assert found.open == [] and "b" not in {tag for tag, _ in found.tags} and page(hostile, body).encode()
    widths = [a["width"] for tag, a in found.tags if tag == "rect" and a["class"] in ("s0", "s1")]
    assert widths == ["25.000%", "75.000%", "0.000%", "0.000%"]
    assert shown(hostile) == 'a<b>"&\ufffd[31m\ufffd\ufffd' and shown("x" * 9, 5) == "xxxx…" and shown("a\nb") == "a b"
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (200, 400, 3), dtype=np.uint8))
    address, width, height = jpeg(noise, 400, 20_000)
    assert len(address) <= 20_000 and width < 400 and abs(width - 2 * height) <= 2

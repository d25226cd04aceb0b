"""Files that are not as they should be: what each does to a batch, to an evaluation and to a run. See docs/bad-data.md."""

import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from base.backends.reference.images import FORMATS, BadImage, read_rgb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from base.contracts import Detections
from base.errors import UserError
from base.evaluate import check_bad_images
from base.sampling import train_shard
from data_sets.index import AnnotationIndex
from tests.test_loader import check_batch, evaluating, many, picture, pure, training, write_coco

ORIENTATION = 0x0112
WIDTH, HEIGHT = 80, 40
BAD = 19  # the id of the file that a test spoils, of 10, 13, 16, …


def quarters(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red, green, blue and grey from the top left on: shows how a picture is turned."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    for (x, y), colour in {(1, 0): (30, 200, 30), (0, 1): (30, 30, 200), (1, 1): (120, 120, 120)}.items():
        ImageDraw.Draw(image).rectangle((x * width // 2, y * height // 2, (x + 1) * width // 2 - 1, (y + 1) * height // 2 - 1), fill=colour)
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one(folder: Path, content: bytes | None, name: str = "1.jpg", width: int = WIDTH, height: int = HEIGHT) -> dict:
    """A data set of one image with one box, its file as given: → arguments of a loader."""
    entry = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [8, 4, 16, 8], "area": 128, "iscrowd": 0}
    images = [{"id": 1, "file_name": name, "height": height, "width": width}]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": [entry], "categories": [{"id": 3, "name": "three"}]}))
    if content is not None:
        (folder / name).write_bytes(content)
    return {"annotation_file": folder / "a.json", "image_dir": folder}


def loaded(backend, data: dict) -> torch.Tensor:
    """The image of `one`, resized to its recorded size: int (height, width, 3)."""
    content = json.loads(Path(data["annotation_file"]).read_text())["images"][0]
    (batch,) = evaluating(backend, data, image_size=(content["height"], content["width"]))
    assert batch.sizes.tolist() == [[content["height"], content["width"]]]
    np.testing.assert_allclose(batch.boxes[0, 0].cpu() * torch.tensor([content["width"], content["height"]] * 2), [8, 4, 24, 12], rtol=1e-5)
    return batch.images[0].cpu().int()


def assert_like(image: torch.Tensor, want: Image.Image, tolerance: float = 5) -> None:
    expected = torch.from_numpy(np.array(want.convert("RGB"))).int()
    assert image.shape == expected.shape
    assert (image - expected).abs().float().mean() <= tolerance


JPEG = encoded(picture(1, WIDTH, HEIGHT), "JPEG", quality=95)
REFUSED = {
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty": (b"", "is empty"),
    "missing": (None, "is missing"),
    "text": (b"<html>404 Not Found</html>", "not a readable"),
    "GIF": (encoded(picture(1, WIDTH, HEIGHT), "GIF"), "not a readable"),
    "truncated PNG": (encoded(picture(1, WIDTH, HEIGHT), "PNG")[:-900], "cannot be decoded"),
    "another aspect ratio": (encoded(picture(1, 60, 50), "JPEG"), "60×50.*80×40"),
    "rotated without EXIF": (encoded(picture(1, HEIGHT, WIDTH), "JPEG"), "40×80.*80×40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(backend, tmp_path, case):
    """By both loaders, in the rank itself and in a worker process: the file, what is wrong, and what to do."""
    content, reason = REFUSED[case]
    data = one(tmp_path, content)
    said = f"{re.escape(str(tmp_path / '1.jpg'))}.*{reason}.*--skip-bad-images"
    for loader in (training(backend, data, batch_size=1), evaluating(backend, data), evaluating(backend, data, workers=1)):
        with pytest.raises(UserError, match=said):
            list(loader)


def test_a_directory_named_like_an_image_is_refused(backend, tmp_path):
    data = one(tmp_path, None)
    (tmp_path / "1.jpg").mkdir()
    with pytest.raises(UserError, match=r"1\.jpg.*directory"):
        list(evaluating(backend, data))


def test_an_image_that_only_root_may_read_is_refused_or_read(backend, tmp_path):
    data = one(tmp_path, JPEG)
    (tmp_path / "1.jpg").chmod(0)
    try:
        with open(tmp_path / "1.jpg", "rb"):
            readable = True  # we are root
    except PermissionError:
        readable = False
    if readable:
        assert_like(loaded(backend, data), picture(1, WIDTH, HEIGHT))
    else:
        with pytest.raises(UserError, match=r"1\.jpg.*[Pp]ermission"):
            list(evaluating(backend, data))


READ = {
    "JPEG": ("1.jpg", lambda image: encoded(image, "JPEG", quality=95)),
    "progressive JPEG": ("1.jpg", lambda image: encoded(image, "JPEG", quality=95, progressive=True)),
    "MPO": ("1.jpg", lambda image: encoded(image, "MPO", quality=95, save_all=True, append_images=[image])),
    "CMYK JPEG": ("1.jpg", lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95)),
    "PNG": ("1.png", lambda image: encoded(image, "PNG")),
    "PNG named .jpg": ("1.jpg", lambda image: encoded(image, "PNG")),
    "JPEG without an ending": ("1", lambda image: encoded(image, "JPEG", quality=95)),
    "RGBA PNG": ("1.png", lambda image: encoded(image.convert("RGBA"), "PNG")),
    "transparent PNG": ("1.png", lambda image: encoded(Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 9))), "PNG")),
    "palette PNG": ("1.png", lambda image: encoded(image.quantize(64), "PNG")),
    "WebP": ("1.webp", lambda image: encoded(image, "WEBP", lossless=True)),
    "BMP": ("1.bmp", lambda image: encoded(image, "BMP")),
}


@pytest.mark.parametrize("case", READ)
def test_files_that_are_read_as_rgb(backend, tmp_path, case):
    name, encode = READ[case]
    assert_like(loaded(backend, one(tmp_path, encode(quarters()), name)), quarters())


GREY = {
    "greyscale JPEG": ("1.jpg", lambda grey: encoded(grey, "JPEG", quality=95), 4),
    "greyscale PNG": ("1.png", lambda grey: encoded(grey, "PNG"), 0),
    "greyscale PNG with alpha": ("1.png", lambda grey: encoded(grey.convert("LA"), "PNG"), 0),
    "16-bit PNG": ("1.png", lambda grey: encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"), 1),
}


@pytest.mark.parametrize("case", GREY)
def test_grey_becomes_three_equal_channels(backend, tmp_path, case):
    """Of a ramp over all levels: 16 bits are scaled, not clipped to white."""
    name, encode, tolerance = GREY[case]
    ramp = Image.fromarray(np.linspace(0, 255, WIDTH)[None].repeat(HEIGHT, 0).astype(np.uint8))
    image = loaded(backend, one(tmp_path, encode(ramp), name))
    assert (image - torch.from_numpy(np.array(ramp)).int()[..., None]).abs().max() <= tolerance
    assert (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()


def test_black_and_white_png(backend, tmp_path):
    image = loaded(backend, one(tmp_path, encoded(quarters().convert("1", dither=Image.Dither.NONE), "PNG"), "1.png"))
    assert set(image.unique().tolist()) == {0, 255}


TURNED = {  # EXIF orientation → how a stored picture must be turned to stand upright, as PIL says it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_obeyed_if_the_recorded_size_says_so(backend, tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = quarters().transpose(TURNED[orientation])
    content = encoded(quarters(), kind, exif=exif, quality=95)
    assert_like(loaded(backend, one(tmp_path, content, "1.img", upright.width, upright.height)), upright)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_orientation_is_ignored_if_the_recorded_size_is_the_stored_one(backend, tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert_like(loaded(backend, one(tmp_path, encoded(quarters(), "JPEG", exif=exif, quality=95))), quarters())


def raw_exif(kind: int, value: bytes) -> bytes:
    """EXIF data of one tag, the orientation, of any TIFF type (2: text, 3: a whole number)."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, ORIENTATION, kind, 1 if kind == 3 else 3, value, 0)


def test_raw_exif_is_understood(backend, tmp_path):
    """What the next test writes would be obeyed if it had a meaning."""
    content = encoded(quarters(), "JPEG", exif=raw_exif(3, b"\3\0\0\0"), quality=95)
    assert_like(loaded(backend, one(tmp_path, content)), quarters().rotate(180))


@pytest.mark.parametrize("exif", [raw_exif(3, b"\0\0\0\0"), raw_exif(3, b"\x09\0\0\0"), raw_exif(2, b"up\0\0"), raw_exif(2, b"3\0\0\0")])
def test_meaningless_exif_orientations_are_ignored(backend, tmp_path, exif):
    assert_like(loaded(backend, one(tmp_path, encoded(quarters(), "JPEG", exif=exif, quality=95))), quarters())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", raw_exif(3, b"\3\0\0\0")[:16]])
def test_damaged_exif_does_not_cost_the_image(backend, tmp_path, kind, damaged):
    assert_like(loaded(backend, one(tmp_path, encoded(quarters(), kind, exif=damaged, quality=95))), quarters())


@pytest.mark.parametrize("factor", [0.5, 3])
def test_another_size_of_the_same_aspect_ratio_is_used(backend, tmp_path, factor):
    """Boxes are relative to the recorded size, so they fit."""
    content = encoded(quarters(round(WIDTH * factor), round(HEIGHT * factor)), "PNG")
    assert_like(loaded(backend, one(tmp_path, content, "1.png")), quarters())


def test_one_pixel_off_by_rounding_is_used(backend, tmp_path):
    assert_like(loaded(backend, one(tmp_path, encoded(quarters(60, 31), "PNG"), "1.png", 121, 61)), quarters(121, 61))


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


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, max_examples=250)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path_factory, data):
    """Bytes changed or cut anywhere, in every format: a picture of the recorded aspect ratio, or BadImage."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = 6, "maker"
    image = picture(2, 24, 16)
    kind = data.draw(st.sampled_from(FORMATS))
    content = bytearray(encoded(image, kind, **({} if kind == "BMP" else {"exif": exif.tobytes()})))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1) | st.integers(0, 120), st.integers(0, 255)), max_size=6)):
        content[min(place, len(content) - 1)] = value
    content = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    for size in ((16, 24), (24, 16), None):
        try:
            read = read_rgb(path, size)
        except BadImage as error:
            assert error.path == str(path) and error.reason and str(path) in str(error)
        else:
            assert read.mode == "RGB" and read.tobytes()


def test_bad_images_name_what_was_raised(tmp_path):
    with pytest.raises(BadImage) as caught:
        read_rgb(tmp_path / "none.jpg")
    assert caught.value.path == str(tmp_path / "none.jpg") and caught.value.reason == "the file is missing"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


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

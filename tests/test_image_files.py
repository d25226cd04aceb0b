"""Image files of every kind: which are read, as what, and which are refused. See docs/bad-data.md."""

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
from PIL import Image

from base.errors import UserError
from tests.small_data import HEIGHT, WIDTH, encoded, evaluating, picture, quarters, training

ORIENTATION = 0x0112


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

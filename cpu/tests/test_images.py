"""JPEG files to samples in native code, against the same steps in PIL."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests.conftest import ROOT
from tests.small_data import ltrb

pytest.importorskip("base.backends.cpu._images", reason="the native parts are not built: python3 prepare.py --name cpu", exc_type=ImportError)
from base.backends.cpu import _images
from base.backends.cpu.loader import RULES, render
from base.backends.reference import augment as reference
from base.backends.reference.images import BadImage, read_rgb

SIZES = [(5, 5), (7, 6), (8, 8), (16, 16), (17, 33), (31, 97), (200, 150), (199, 301)]  # width, height
SAMPLES = [(300, 300), (160, 101), (33, 231)]  # height, width; none so small that a part of the resolution would do
WHOLE, ORDER, NEUTRAL = (0, 0, 1, 1), (0, 1, 2, 3), (1, 1, 1, 0)
DATA = Path(__file__).parent / "data"


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Coarse colours, fine grain and an edge, all within what YCbCr can show, so that nothing is clipped."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(70, 186, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    image = Image.fromarray((smooth + rng.integers(-12, 13, (height, width, 1))).astype(np.uint8))
    ImageDraw.Draw(image).rectangle((width // 5, height // 4, width // 2, height // 2), fill=(190, 170, 80))
    return image


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def native(data: bytes, size: tuple[int, int], crop=WHOLE, flip=False, exact=False, recorded=(0, 0)) -> tuple[int, np.ndarray]:
    """(status, picture) of a sample with neutral colours."""
    batch = np.zeros((1, *size, 3), np.uint8)
    status = _images.render_bytes(data, batch, 0, _images.Sample(crop, flip, ORDER, NEUTRAL), recorded, exact)
    return status, batch[0]


def by_pil(data: bytes, size: tuple[int, int], crop=WHOLE, flip=False) -> np.ndarray:
    """The same: the reference's crop, flip and resize; a change of hue by nothing goes to 8-bit HSV and back, too."""
    with Image.open(io.BytesIO(data)) as image:
        left, top, right, bottom = (int(edge * side) for edge, side in zip(crop, image.size * 2, strict=True))
        part = image.convert("RGB").crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
    return np.asarray(reference.resize(part, size).convert("HSV").convert("RGB"))


def assert_close(got: np.ndarray, want: np.ndarray, mean: float, thousandth: float, what=None) -> None:
    """At most ``mean`` off on average, and at most one number of a thousand off by more than ``thousandth``, of 255."""
    wrong = np.abs(got.astype(int) - want)
    assert wrong.mean() <= mean and np.quantile(wrong, 0.999) <= thousandth, (wrong.mean(), np.quantile(wrong, 0.999), wrong.max(), what)


def draws(count: int, seed: int):
    """Crops of each kind and size of sample: (size, crop, flip), the first without a crop."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        sides = rng.uniform(0.3, 1, 2)
        corner = rng.uniform(0, 1 - sides)
        crop = WHOLE if number == 0 else (*corner.tolist(), *(corner + sides).tolist())
        yield SAMPLES[number % len(SAMPLES)], crop, bool(rng.random() < 0.5)


KINDS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "grey": {},
}


def encoded(kind: str, image: Image.Image, **options) -> bytes:
    return jpeg(image.convert("L") if kind == "grey" else image, **KINDS[kind], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [30, 75, 92, 100])
@pytest.mark.parametrize("optimize", [False, True], ids=["standard tables", "optimised tables"])
def test_plain_files_look_as_in_pil(kind, quality, optimize):
    for number, (width, height) in enumerate(SIZES):
        data = encoded(kind, photo(number, width, height), quality=quality, optimize=optimize)
        others = 0
        for size, crop, flip in draws(6, number):
            status, got = native(data, size, crop, flip)
            assert status == 8
            assert_close(got, by_pil(data, size, crop, flip), *((0.5, 2) if kind == "grey" else (0.9, 5)), (width, height, size, crop))
            others += (got != native(data, size, crop, flip, exact=True)[1]).any()
        assert others or width * height < 100, "libjpeg's very pixels: the own decoder was not used"


def test_a_file_of_4_4_0_looks_as_in_pil():
    data = (DATA / "440.jpg").read_bytes()
    assert b"\x03\x01\x12\x00\x02\x11\x01\x03\x11\x01" in data  # of the header: each second row has colours
    for size, crop, flip in draws(9, 0):
        status, got = native(data, size, crop, flip)
        assert status == 8
        assert_close(got, by_pil(data, size, crop, flip), 0.9, 5)
        if size == (300, 300):
            assert (got != native(data, size, crop, flip, exact=True)[1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_crops_of_a_pixel_or_at_an_edge(kind):
    width, height = 61, 45
    data = encoded(kind, photo(1, width, height), quality=90)
    for x, y in [(0, 0), (width - 1, height - 1), (15, 16), (16, 15), (32, 31), (width - 1, 0)]:
        for wide, tall in [(1, 1), (2, 1), (1, 3), (17, 1), (width, 1), (1, height)]:
            edges = (x + 0.5, y + 0.5, min(x + wide, width) + 0.5, min(y + tall, height) + 0.5)  # in pixels
            crop = tuple(edge / side for edge, side in zip(edges, (width, height) * 2, strict=True))
            status, got = native(data, (20, 33), crop)
            assert status == 8
            assert_close(got, by_pil(data, (20, 33), crop), *((0.2, 1) if kind == "grey" else (1.5, 4)), (x, y, wide, tall))
    for beyond in [(0.999, 0.999, 1, 1), (0, 0, 1e-9, 1e-9), (0.5, 0.5, 0.5, 0.5), (1, 1, 1, 1)]:
        assert native(data, (20, 33), beyond)[0] == 8


# Files that are not plain


def segments(data: bytes) -> list[bytes]:
    """The parts of a JPEG file with one scan: start, each marker's segment, the scan's data, end."""
    parts, at = [data[:2]], 2
    while True:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at:end])
        if data[at + 1] == 0xDA:
            return [*parts, data[end:-2], data[-2:]]
        at = end


def changed(data: bytes, marker: int, change) -> bytes:
    """The file with ``change`` made to each segment of a marker."""
    return b"".join(change(part) if part[:2] == bytes([0xFF, marker]) else part for part in segments(data))


def wide_quantisers(segment: bytes) -> bytes:
    """A segment with one table, its numbers as 16 bits."""
    content = bytes([segment[4] | 0x10]) + b"".join(bytes([0, value]) for value in segment[5:])
    return segment[:2] + (2 + len(content)).to_bytes(2, "big") + content


def scan_by_scan(image: Image.Image, across: int = 1, down: int = 1, quality: int = 90) -> bytes:
    """A baseline file whose three components have a scan each, the colours stored for every ``across`` × ``down`` pixels."""
    light, *colours = image.convert("YCbCr").split()
    smaller = -(-image.width // across), -(-image.height // down)
    planes = [segments(jpeg(plane, quality=quality)) for plane in (light, *(c.resize(smaller, Image.Resampling.BOX) for c in colours))]
    *head, frame = (part for part in planes[0][:-3] if part[1] != 0xC4)
    frame = b"\xff\xc0\x00\x11" + frame[4:9] + bytes([3, 1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0])
    tables = [part for part in planes[0] if part[:2] == b"\xff\xc4"]
    scans = [b"\xff\xda\x00\x08\x01" + bytes([number, 0, 0, 63, 0]) + plane[-2] for number, plane in enumerate(planes, 1)]
    return b"".join([*head, frame, *tables, *scans, b"\xff\xd9"])


def with_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PHOTO = photo(3, 90, 70)
PLAIN = jpeg(PHOTO, quality=90)
READ_BY_LIBJPEG = {
    "progressive": jpeg(PHOTO, quality=90, progressive=True),
    "restart intervals": jpeg(PHOTO, quality=90, restart_marker_blocks=3),
    "no JFIF marker": changed(PLAIN, 0xE0, lambda segment: b""),
    "RGB": jpeg(PHOTO, quality=90, keep_rgb=True),
    "extended sequential": changed(PLAIN, 0xC0, lambda segment: b"\xff\xc1" + segment[2:]),
    "quantisers of 16 bits": changed(PLAIN, 0xDB, wide_quantisers),
    "a scan for each component": scan_by_scan(PHOTO),
    "a scan for each component, 4:1:1": scan_by_scan(PHOTO, 4, 1),
    "without a standard table": changed(PLAIN, 0xC4, lambda segment: segment if segment[4] != 0x11 else b""),
    "4 pixels wide": jpeg(photo(3, 4, 70), quality=90),
    "two pictures": PLAIN + PLAIN,
}
LEFT_TO_PIL = {
    "CMYK": jpeg(PHOTO.convert("CMYK"), quality=90),
    "upside down by EXIF": jpeg(PHOTO, quality=90, exif=with_exif(3)),
    "on its side by EXIF": jpeg(PHOTO, quality=90, exif=with_exif(6)),
    "two EXIF segments": changed(jpeg(PHOTO, quality=90, exif=with_exif(1)), 0xE1, lambda segment: 2 * segment),
    "something after the end": PLAIN + b"tail",
    "12 bits": changed(PLAIN, 0xC0, lambda segment: segment[:4] + b"\x0c" + segment[5:]),
    "without its end": PLAIN[:-2],
    "cut in its scan, with an end": PLAIN[: len(PLAIN) * 2 // 3] + b"\xff\xd9",
    "a marker in its scan": PLAIN[:-300] + b"\xff\xd0" + PLAIN[-298:],
    "no height": changed(PLAIN, 0xC0, lambda segment: segment[:5] + b"\0\0" + segment[7:]),
    "nothing": b"",
    "start and end": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("case", READ_BY_LIBJPEG)
def test_files_that_are_not_plain_are_read_by_libjpeg(case):
    data = READ_BY_LIBJPEG[case]
    for size, crop, flip in draws(6, 5):
        status, got = native(data, size, crop, flip)
        assert status == 8
        assert (got == native(data, size, crop, flip, exact=True)[1]).all(), "the own decoder does not know such files"
        assert_close(got, by_pil(data, size, crop, flip), 0.4, 4, (size, crop))


@pytest.mark.parametrize("case", LEFT_TO_PIL)
def test_files_that_are_left_to_pil(case, tmp_path):
    data, size = LEFT_TO_PIL[case], (100, 130)
    for exact in (False, True):
        assert native(data, size, exact=exact)[0] < 0
    (tmp_path / "1.jpg").write_bytes(data)
    drawn, batch = _images.Sample((0.2, 0.1, 0.9, 0.8), True, ORDER, NEUTRAL), np.zeros((1, *size, 3), np.uint8)
    try:
        picture = read_rgb(tmp_path / "1.jpg")
    except BadImage as error:
        with pytest.raises(BadImage) as raised:
            render(tmp_path / "1.jpg", batch, 0, drawn, (0, 0))
        assert raised.value.reason == error.reason
        return
    render(tmp_path / "1.jpg", batch, 0, drawn, picture.size[::-1])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert_close(batch[0], by_pil(buffer.getvalue(), size, (0.2, 0.1, 0.9, 0.8), True), 0.6, 5)


@pytest.mark.parametrize("data", [PLAIN, READ_BY_LIBJPEG["progressive"]], ids=["plain", "progressive"])
def test_a_recorded_size_of_another_aspect_ratio_is_refused(data):
    for recorded, fits in [((70, 90), True), ((140, 180), True), ((0, 0), True), ((90, 70), False), ((70, 95), False), ((2**31 - 1, 1), False)]:
        assert (native(data, (50, 60), recorded=recorded)[0] > 0) == fits, recorded


def test_a_picture_too_long_for_the_resizer_is_resized_by_pil(tmp_path):
    image = photo(1, 5000, 9)
    image.save(tmp_path / "1.jpg", quality=95)
    data, crop = (tmp_path / "1.jpg").read_bytes(), (0.1, 0, 0.95, 1)
    assert native(data, (40, 50), crop)[0] < 0
    batch = np.zeros((1, 40, 50, 3), np.uint8)
    render(tmp_path / "1.jpg", batch, 0, _images.Sample(crop, True, ORDER, NEUTRAL), (9, 5000))
    assert_close(batch[0], by_pil(data, (40, 50), crop, True), 0.01, 1)


# Large pictures for small samples


@pytest.mark.parametrize("across, down", [(1, 1), (2, 2), (2, 1), (1, 2), (4, 1), (4, 2)])
def test_colours_keep_the_resolution_of_the_sample_when_a_part_of_it_is_decoded(across, down):
    """libjpeg's smaller decoding shrinks with the rest what is stored less finely in one direction only."""
    image = photo(8, 280, 210).resize((840, 630), Image.Resampling.BICUBIC)
    data = scan_by_scan(image, across, down, quality=85)
    for size, eighths in [((150, 200), 2), ((78, 104), 1), ((60, 90), 1)]:
        status, got = native(data, size)
        assert status == eighths * max(across, down) // min(across, down)
        assert_close(got, by_pil(data, size), 1.2, 11, (status, size))


# Instruction sets

RESIZE_ALL = """
import sys
from pathlib import Path
import numpy as np
from base.backends.cpu.tests import native
from base.backends.cpu import _images
pictures = []
for path in sorted(Path().glob("*.jpg")):
    for size in ((300, 300), (160, 101), (33, 231)):
        batch = np.zeros((1, *size, 3), np.uint8)
        assert _images.render_bytes(path.read_bytes(), batch, 0, None) == 8
        pictures.append(batch.ravel())
np.save(sys.argv[1], np.concatenate(pictures))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_gives_the_same_pictures(kind, tmp_path):
    """To a level, and few of those. Where it is one of a colour's planes, blue changes by two."""
    for number, (width, height) in enumerate(SIZES):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(kind, photo(number, width, height), quality=60 + 5 * number))
    found = []
    for name in ("plain", "avx2", "avx512"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SSD_CPU_SIMD": name, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", RESIZE_ALL, f"{name}.npy"], env=environment, check=True, cwd=tmp_path)
        found.append(np.load(tmp_path / f"{name}.npy").astype(int))
    assert found[0].size > 10**6 and found[0].std() > 10
    for other in found[1:]:
        wrong = np.abs(other - found[0])
        assert wrong.max() <= (1 if kind == "grey" else 2) and (wrong > 0).mean() < 1e-4, (wrong.max(), (wrong > 0).mean())


# Draws

boxes_of_an_image = st.lists(ltrb(), max_size=8)


@settings(deadline=None, max_examples=300)
@given(boxes_of_an_image, st.integers(0, 2**32), st.sampled_from([1, 1, 3, 50]))
def test_draws_are_the_references_number_for_number(boxes, seed, tries):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)]
    rngs = [np.random.default_rng(seed) for _ in range(3)]
    drawn = _images.draw(rngs[0], boxes, tries, RULES)
    assert (drawn.boxes.dtype, drawn.boxes.shape) == (np.float32, (len(drawn.kept), 4))
    _, want, kept = reference.augment(Image.new("RGB", (9, 7)), boxes.astype(float), np.arange(len(boxes)), (6, 5), rngs[1], tries)
    np.testing.assert_array_equal(drawn.boxes, want)
    assert drawn.kept.tolist() == kept.tolist()
    crop, _ = reference.random_crop(boxes.astype(float), rngs[2], tries)
    assert drawn.crop == crop.tolist() and drawn.flip == (rngs[2].random() < reference.FLIP_PROBABILITY)
    jitter = reference.BRIGHTNESS, reference.CONTRAST, reference.SATURATION
    assert drawn.amounts == [*(rngs[2].uniform(1 - most, 1 + most) for most in jitter), rngs[2].uniform(-reference.HUE, reference.HUE)]
    assert drawn.order == rngs[2].permutation(4).tolist()
    assert len({str(rng.bit_generator.state) for rng in rngs}) == 1  # as many numbers were taken


def test_a_whole_sample_looks_like_the_references():
    """Draws, pixels and changes of colour together; contrast and saturation widen what is off by up to a half each."""
    boxes = np.array([[0.2, 0.1, 0.6, 0.7], [0.5, 0.5, 0.9, 0.9]], np.float32)
    for seed in range(60):
        data = encoded(list(KINDS)[seed % 4], photo(seed, 150 + seed, 190 - seed), quality=85)
        drawn = _images.draw(np.random.default_rng(seed), boxes, 1, RULES)
        batch = np.zeros((1, 120, 110, 3), np.uint8)
        assert _images.render_bytes(data, batch, 0, drawn) == 8
        with Image.open(io.BytesIO(data)) as image:
            want, *_ = reference.augment(image.convert("RGB"), boxes.astype(float), np.array([1, 2]), (120, 110), np.random.default_rng(seed), 1)
        assert_close(batch[0], np.asarray(want), 1.3, 9, seed)

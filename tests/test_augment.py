"""The training augmentation: its distributions against MLPerf's rules written out again, and what must hold for every sample."""

import colorsys
import math
import random
from pathlib import Path

import numpy as np
import pytest
from base.backends.reference.augment import augment, clip_to_crop, colour_jitter, crop_iou, random_crop, resize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests.small_data import ltrb, picture, pure, samples, write_coco

COPIES = 60  # of one image in a data set, so that an epoch gives many samples of it
BOUNDS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, -math.inf)  # None: the whole image

ARRANGEMENTS = {  # ltrb
    "one box": [[0.3, 0.35, 0.7, 0.6]],
    "a large box": [[0.05, 0.1, 0.95, 0.9]],
    "small boxes far apart": [[0.05, 0.1, 0.15, 0.2], [0.8, 0.75, 0.9, 0.95]],
    "three boxes": [[0.1, 0.1, 0.6, 0.7], [0.4, 0.3, 0.9, 0.8], [0.45, 0.45, 0.55, 0.6]],
}


def overlap(a, b) -> float:
    """IoU of two ltrb boxes, in plain Python."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def crop_by_the_rules(boxes: list, tries: int, draw: random.Random) -> tuple[list, list]:
    """MLPerf's SSDCropping as its rules say, in plain Python: → crop, the boxes kept (numbers)."""
    while True:
        bound = draw.choice(BOUNDS)
        if bound is None:
            return [0, 0, 1, 1], list(range(len(boxes)))
        for _ in range(tries):
            w, h = draw.uniform(0.3, 1), draw.uniform(0.3, 1)
            if w / h < 0.5 or w / h > 2:
                continue
            left, top = draw.uniform(0, 1 - w), draw.uniform(0, 1 - h)
            crop = [left, top, left + w, top + h]
            if any(overlap(box, crop) <= bound for box in boxes):
                continue
            kept = [n for n, (a, b, c, d) in enumerate(boxes) if left < (a + c) / 2 < left + w and top < (b + d) / 2 < top + h]
            if kept:
                return crop, kept


def sample_by_the_rules(boxes: list, tries: int, draw: random.Random) -> list:
    """The boxes of one sample, clipped, relative to the crop, mirrored half of the time."""
    (left, top, right, bottom), kept = crop_by_the_rules(boxes, tries, draw)
    mirrored, found = draw.random() < 0.5, []
    for a, b, c, d in (boxes[n] for n in kept):
        a, c = ((min(max(x, left), right) - left) / (right - left) for x in (a, c))
        b, d = ((min(max(y, top), bottom) - top) / (bottom - top) for y in (b, d))
        found.append([1 - c, b, 1 - a, d] if mirrored else [a, b, c, d])
    return found


def kolmogorov_smirnov(a, b) -> float:
    """The greatest distance between the distributions of two samples."""
    a, b = np.sort(np.round(a, 5)), np.sort(np.round(b, 5))
    everywhere = np.concatenate([a, b])
    shares = [np.searchsorted(values, everywhere, side="right") / len(values) for values in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_the_distance_of_distributions_is_measured_right():
    rng = np.random.default_rng(0)
    assert kolmogorov_smirnov([1, 2, 3], [1, 2, 3]) == 0
    assert kolmogorov_smirnov([0, 0, 1, 1], [0, 1, 1, 1]) == 0.25
    assert kolmogorov_smirnov(rng.random(4000), rng.random(20000)) < 0.03
    assert kolmogorov_smirnov(rng.random(4000), rng.random(4000) * 0.9) > 0.08


def copies(folder: Path, image: Image.Image, boxes: list) -> dict:
    """A data set of the same image many times over."""
    width, height = image.size
    pixels = [[a * width, b * height, (c - a) * width, (d - b) * height, 3] for a, b, c, d in boxes]
    return write_coco(folder, dict.fromkeys(range(1, COPIES + 1), image), dict.fromkeys(range(1, COPIES + 1), pixels))


def draws(backend, data: dict, count: int, size=(12, 16), **changes):
    """(image, boxes) of ``count`` samples through the public loader."""
    loader = backend.train_loader(**{**data, "image_size": size, "batch_size": COPIES, "workers": 0, "seed": 3, **changes})
    for epoch in range(math.ceil(count / COPIES)):
        loader.set_epoch(epoch)
        for batch in loader:
            for image, boxes, labels in zip(batch.images, batch.boxes, batch.labels, strict=True):
                yield image.cpu().numpy(), boxes[labels > 0].cpu().numpy().astype(float)


@pytest.mark.parametrize(("arrangement", "tries"), [*((name, 1) for name in ARRANGEMENTS), ("a large box", 50)])
def test_boxes_of_samples_are_distributed_as_by_mlperfs_rules(backend, tmp_path, arrangement, tries):
    boxes, draw = ARRANGEMENTS[arrangement], random.Random(1)
    data = copies(tmp_path, picture(1, 24, 24), boxes)
    got = [found for _, found in draws(backend, data, 2040, max_samples=tries)]
    want = [np.array(sample_by_the_rules(boxes, tries, draw)) for _ in range(12000)]
    limit = 2.2 * math.sqrt(1 / len(got) + 1 / len(want))  # passed by chance once in 8,000 draws
    figures = {
        "boxes kept": len,
        "left edge": lambda found: found[0, 0],
        "top edge": lambda found: found[0, 1],
        "width": lambda found: found[0, 2] - found[0, 0],
        "area": lambda found: (found[:, 2:] - found[:, :2]).prod(1).sum(),
    }
    for name, figure in figures.items():
        assert kolmogorov_smirnov(list(map(figure, got)), list(map(figure, want))) < limit, name


@pytest.mark.parametrize(("arrangement", "tries"), [*((name, 1) for name in ARRANGEMENTS), ("a large box", 50)])
def test_crops_are_distributed_as_by_mlperfs_rules(arrangement, tries):
    boxes, rng, draw = ARRANGEMENTS[arrangement], np.random.default_rng(2), random.Random(2)
    got = [random_crop(np.array(boxes), rng, tries)[0].tolist() for _ in range(2500)]
    want = [crop_by_the_rules(boxes, tries, draw)[0] for _ in range(7500)]
    limit = 2.2 * math.sqrt(1 / len(got) + 1 / len(want))
    figures = {
        "left": lambda crop: crop[0],
        "top": lambda crop: crop[1],
        "area": lambda crop: (crop[2] - crop[0]) * (crop[3] - crop[1]),
        "aspect": lambda crop: (crop[2] - crop[0]) / (crop[3] - crop[1]),
        "smallest IoU with a box": lambda crop: min(overlap(box, crop) for box in boxes),
        "greatest IoU with a box": lambda crop: max(overlap(box, crop) for box in boxes),
    }
    for name, figure in figures.items():
        assert kolmogorov_smirnov(list(map(figure, got)), list(map(figure, want))) < limit, name
    whole = [np.mean([crop == [0, 0, 1, 1] for crop in crops]) for crops in (got, want)]
    assert whole[0] > 1 / 7 and abs(whole[0] - whole[1]) < 3.5 * math.sqrt(whole[1] * (1 - whole[1]) * (1 / 2500 + 1 / 7500))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_crop_obeys_the_rules(arrangement):
    boxes, rng = np.array(ARRANGEMENTS[arrangement]), np.random.default_rng(4)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    bounded, cropped, extremes = 0, 0, []
    for _ in range(2500):
        crop, kept = random_crop(boxes, rng, 1)
        assert kept.any()
        np.testing.assert_array_equal(kept, ((centres > crop[:2]) & (centres < crop[2:])).all(1))
        if crop.tolist() == [0, 0, 1, 1]:
            assert kept.all()
            continue
        width, height = crop[2:] - crop[:2]
        assert 0.3 <= width <= 1 and 0.3 <= height <= 1 and 0.5 <= width / height <= 2
        extremes.append((width, height, width / height, height / width))
        assert (crop >= 0).all() and (crop <= 1 + 1e-12).all()
        cropped, bounded = cropped + 1, bounded + (crop_iou(boxes, crop) > 0.1).all()
    assert cropped > 300
    if arrangement == "one box":  # and the rules are used to their ends
        assert (np.min(extremes, 0) < (0.34, 0.34, 0.52, 0.52)).all() and (np.max(extremes, 0)[:2] > 0.97).all()
    if arrangement == "small boxes far apart":
        assert bounded == 0  # no crop has an IoU of 0.1 with both: only the rule without a bound gives any
    elif arrangement != "three boxes":
        assert bounded > 0.5 * cropped


def test_iou_with_a_crop_and_clipping_by_hand():
    boxes, crop = np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.9, 0.7], [0.25, 0.25, 0.75, 0.75]]), np.array([0.25, 0.25, 0.75, 0.75])
    np.testing.assert_allclose(crop_iou(boxes, crop), [1 / 7, 0.05 / 0.28, 1])
    np.testing.assert_allclose(clip_to_crop(boxes, crop), [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 0.9], [0, 0, 1, 1]])


def test_half_of_the_samples_are_mirrored_as_their_pixels_show(backend, tmp_path):
    """The picture grows brighter from left to right, and its one box keeps to the left."""
    ramp = np.repeat(np.linspace(30, 220, 60)[None, :, None], 40, 0).repeat(3, 2).astype(np.uint8)
    data = copies(tmp_path, Image.fromarray(ramp), [[0.1, 0.3, 0.4, 0.7]])
    mirrored, whole_seen = [], 0
    for image, boxes in draws(backend, data, 2100):
        left, right = image[:, :8].mean(), image[:, 8:].mean()
        assert left != right
        mirrored.append(left > right)
        if np.isclose(boxes[0, 1], 0.3, atol=1e-4) and np.isclose(boxes[0, 3], 0.7, atol=1e-4) and np.isclose(np.ptp(boxes[0, ::2]), 0.3, atol=1e-4):
            np.testing.assert_allclose(boxes[0], [0.6, 0.3, 0.9, 0.7] if mirrored[-1] else [0.1, 0.3, 0.4, 0.7], atol=1e-5)
            whole_seen += 1
    assert whole_seen > 300
    assert abs(np.mean(mirrored) - 0.5) < 3 * math.sqrt(0.25 / len(mirrored))


def test_boxes_lie_where_their_pixels_are(backend, tmp_path):
    """A red rectangle on green, through crop, resize, mirror and jitter, is where its box says."""
    image = Image.new("RGB", (120, 90), (60, 160, 60))
    ImageDraw.Draw(image).rectangle((24, 27, 71, 62), fill=(190, 50, 50))
    data = copies(tmp_path, image, [[24 / 120, 27 / 90, 72 / 120, 63 / 90]])
    height, width = size = (60, 80)
    for image, boxes in draws(backend, data, 180, size=size):
        red = image[..., 0].astype(int) > image[..., 1]
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        found = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
        np.testing.assert_allclose(boxes, [found], atol=0.055)  # a pixel of the smallest crop is 0.04 of it


def test_brightness_through_the_loader(backend, tmp_path):
    """On one grey, contrast, saturation and hue change nothing."""
    data = copies(tmp_path, Image.new("RGB", (20, 20), (200, 200, 200)), [[0.2, 0.2, 0.8, 0.8]])
    factors = np.array([image.mean() / 200 for image, _ in draws(backend, data, 2100, size=(4, 4))])
    assert 0.875 - 0.006 <= factors.min() < 0.885 and 1.115 < factors.max() <= 1.125 + 0.006
    assert abs(factors.mean() - 1) < 0.008 and abs(factors.std() - 0.25 / math.sqrt(12)) < 0.005


def test_hue_through_the_loader(backend, tmp_path):
    """On one colour, brightness, contrast and saturation keep the hue."""
    data = copies(tmp_path, Image.new("RGB", (20, 20), (150, 110, 100)), [[0.2, 0.2, 0.8, 0.8]])
    own = colorsys.rgb_to_hsv(150, 110, 100)[0]
    shifts, chroma = [], []
    for image, _ in draws(backend, data, 2100, size=(4, 4)):
        pixel = image.reshape(-1, 3).mean(0)
        shifts.append((colorsys.rgb_to_hsv(*pixel)[0] - own + 0.5) % 1 - 0.5)
        chroma.append(np.ptp(pixel) / 50)
    assert -0.065 < min(shifts) < -0.04 and 0.04 < max(shifts) < 0.065  # 0.05, and what 8 bits blur
    assert abs(np.mean(shifts)) < 0.004
    assert 0.15 < min(chroma) < 0.4 and 1.7 < max(chroma) < 1.125 * 1.5 * 1.5 + 0.1


def test_contrast_and_saturation_ranges():
    """Two greys tell the contrast, and a colour beside them the saturation: both scale its distance from grey."""
    pixels = np.zeros((8, 9, 3), dtype=np.uint8)
    pixels[:, :3], pixels[:, 3:6], pixels[:, 6:] = 70, 170, (160, 110, 110)
    image, rng = Image.fromarray(pixels), np.random.default_rng(6)
    greys, colours = [], []
    for _ in range(2500):
        dark, light, colour = np.asarray(colour_jitter(image, rng))[0, [0, 4, 8]].astype(float)
        assert np.ptp(dark) <= 1 and np.ptp(light) <= 1  # grey stays grey
        greys.append((light.mean() - dark.mean()) / 100)
        colours.append(np.ptp(colour) / 50 / greys[-1])
    greys, colours = np.array(greys), np.array(colours)  # brightness × contrast; saturation
    assert 0.4375 - 0.02 < greys.min() < 0.5 and 1.55 < greys.max() < 1.6875 + 0.02 and abs(greys.mean() - 1) < 0.025
    assert 0.4 < colours.min() < 0.56 and 1.44 < colours.max() < 1.6 and abs(colours.mean() - 1) < 0.025
    assert abs(np.std(greys) - 0.305) < 0.015  # of the product of two uniform factors
    assert abs(np.std(colours) - 1 / math.sqrt(12)) < 0.02
    assert abs(np.corrcoef(greys, colours)[0, 1]) < 0.06  # drawn apart


def test_a_sample_depends_only_on_seed_epoch_and_its_image(backend, tmp_path):
    """The other images of the data set, and its place among them, change nothing."""
    pictures = {key: picture(key, 60, 50) for key in range(1, 13)}
    boxes = {key: [[5, 5, 30, 30, 3], [20, 10, 30, 30, 7]] for key in pictures}
    few = {key: pictures[key] for key in (3, 7, 11, 12)}
    loaders = [
        pure(
            backend.train_loader(**write_coco(tmp_path / str(len(some)), some, boxes), image_size=(40, 30), batch_size=4, workers=0, seed=9, epoch=2)
        )
        for some in (pictures, few)
    ]
    all_samples, few_samples = (samples(list(loader)) for loader in loaders)
    assert len(all_samples) == 12 and few_samples == {key: all_samples[key] for key in few}
    assert len({sample[0] for sample in all_samples.values()}) == 12


def test_the_same_random_numbers_give_the_same_bytes():
    image, boxes, labels = picture(1, 70, 50), np.array(ARRANGEMENTS["three boxes"]), np.array([1, 2, 3])
    before = boxes.copy()
    first, second, other = (augment(image, boxes, labels, (30, 40), np.random.default_rng(seed), 1) for seed in (8, 8, 9))
    assert first[0].tobytes() == second[0].tobytes() != other[0].tobytes()
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(boxes, before)  # what the caller gave is left alone


def test_a_sample_has_the_size_asked_for():
    for size in ((30, 40), (41, 17), (1, 1)):
        image, boxes, _ = augment(picture(1, 9, 7), np.array([[0.2, 0.2, 0.8, 0.8]]), np.array([1]), size, np.random.default_rng(0), 1)
        assert (image.height, image.width) == size and image.mode == "RGB" and boxes.dtype == np.float32
    assert resize(picture(1, 9, 7), (5, 3)).size == (3, 5)


@settings(deadline=None, max_examples=150)
@given(st.lists(ltrb(), max_size=8), st.integers(0, 2**32), st.sampled_from([1, 50]), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_boxes_stay_inside_and_none_is_lost_track_of(boxes, seed, tries, sides):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    boxes = boxes[(boxes[:, :2] < boxes[:, 2:]).all(1)].astype(np.float64)
    labels = np.arange(1, len(boxes) + 1)
    image, found, kept = augment(Image.new("RGB", sides), boxes, labels, (6, 5), np.random.default_rng(seed), tries)
    assert image.size == (5, 6)
    assert found.dtype == np.float32 and len(found) == len(kept) and found.shape[1:] == (4,)
    assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all() and (found[:, :2] < found[:, 2:]).all()
    assert kept.tolist() == sorted(set(kept.tolist())) and set(kept.tolist()) <= set(labels.tolist())
    clear = ((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(1)
    if len(boxes) and clear.all():
        assert len(kept) > 0  # a crop without a box is no crop


def test_labels_belong_to_their_boxes(backend, tmp_path):
    """Each class has a size of its own, which survives the mirror; of the whole image all boxes are there."""
    boxes = [[2, 2, 10, 20, 3], [30, 20, 24, 30, 7]]
    data = write_coco(tmp_path, {1: picture(1, 60, 60), 2: picture(2, 60, 60)}, {1: boxes, 2: boxes})
    loader = backend.train_loader(**data, image_size=(20, 20), batch_size=2, workers=0, seed=1)
    both = 0
    for epoch in range(40):
        loader.set_epoch(epoch)
        (batch,) = loader
        for found, labels in zip(batch.boxes, batch.labels, strict=True):
            real = labels > 0
            if real.sum() == 2:
                order = labels.argsort()
                size = (found[order, 2:] - found[order, :2]).prod(1)
                assert labels[order].tolist() == [1, 2] and size[0] < size[1]
                both += 1
            else:
                assert labels[real].tolist() in ([1], [2])
    assert both > 10

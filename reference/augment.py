"""Training augmentation of MLPerf's reference: random crop, flip, resize, colour jitter. Plain PIL and NumPy.

The random numbers come from the caller, one generator a sample (`base.sampling.sample_rng`).
"""

import numpy as np
from PIL import Image
from torchvision.transforms import functional

MINIMUM_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9)  # beside these: the whole image, and a crop without a bound
FLIP_PROBABILITY = 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.125, 0.5, 0.5, 0.05


def augment(
    image: Image.Image, boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int], rng: np.random.Generator, max_samples: int
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """An RGB image, ltrb boxes (M, 4) in [0, 1] and labels (M) → the same of a sample of ``size`` (height, width).

    Boxes come back as float32. One that is so thin that 32 bits do not resolve it where it now lies is dropped.
    """
    crop, kept = random_crop(boxes, rng, max_samples)
    boxes, labels = clip_to_crop(boxes[kept], crop), labels[kept]
    left, top, right, bottom = (int(edge * side) for edge, side in zip(crop, image.size * 2, strict=True))
    image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    if rng.random() < FLIP_PROBABILITY:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
    boxes = np.clip(boxes, 0, 1).astype(np.float32)
    thick = (boxes[:, :2] < boxes[:, 2:]).all(1)
    return colour_jitter(resize(image, size), rng), boxes[thick], labels[thick]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To (height, width), bilinear, with antialiasing when it shrinks."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def random_crop(boxes: np.ndarray, rng: np.random.Generator, max_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The SSD crop (paper, section 2.2, data augmentation): → (ltrb of the crop, bool (M) of the boxes kept).

    Draws one of seven rules until one gives a crop: the whole image; or width and height in [0.3, 1] with an aspect
    ratio in [0.5, 2] such that every box's IoU with the crop is above a minimum (five of them, and none). A rule is tried
    ``max_samples`` times. A box is kept if its centre is inside; a crop without any is no crop.
    """
    whole = np.array([0.0, 0.0, 1.0, 1.0])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    while True:
        rule = rng.integers(len(MINIMUM_IOUS) + 2)
        if rule == 0:
            return whole, np.ones(len(boxes), dtype=bool)
        minimum = MINIMUM_IOUS[rule - 1] if rule <= len(MINIMUM_IOUS) else -np.inf
        for _ in range(max_samples):
            width, height = rng.uniform(0.3, 1.0, 2)
            left, top = rng.uniform(0, 1.0 - np.array([width, height]))
            if not 0.5 <= width / height <= 2:
                continue
            crop = np.array([left, top, left + width, top + height])
            if not (crop_iou(boxes, crop) > minimum).all():
                continue
            inside = ((centres > crop[:2]) & (centres < crop[2:])).all(1)
            if inside.any():
                return crop, inside


def crop_iou(boxes: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """IoU of boxes (M, 4) with one crop (4) → (M)."""
    shared = np.clip(np.minimum(boxes[:, 2:], crop[2:]) - np.maximum(boxes[:, :2], crop[:2]), 0, None).prod(1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + (crop[2:] - crop[:2]).prod() - shared)


def clip_to_crop(boxes: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Boxes (M, 4) of the image → clipped and relative to the crop."""
    corner, size = np.tile(crop[:2], 2), np.tile(crop[2:] - crop[:2], 2)
    return (np.clip(boxes, corner, corner + size) - corner) / size


def colour_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, each by a uniform draw, in random order (torchvision's ColorJitter)."""
    changes = [
        (functional.adjust_brightness, rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
        (functional.adjust_contrast, rng.uniform(1 - CONTRAST, 1 + CONTRAST)),
        (functional.adjust_saturation, rng.uniform(1 - SATURATION, 1 + SATURATION)),
        (functional.adjust_hue, rng.uniform(-HUE, HUE)),
    ]
    for number in rng.permutation(len(changes)):
        change, amount = changes[number]
        image = change(image, amount)
    return image

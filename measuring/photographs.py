"""Photographs for measuring loaders, as COCO's are: 427 to 640 pixels a side, 1/f texture with objects, about 170 kB each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUALITY = 92  # with 4:2:0 chroma this gives about 175 kB at 640×480


def photograph(rng: np.random.Generator) -> tuple[Image.Image, list[list[float]]]:
    """A picture and the x, y, width, height of its objects (2 to 12, seven on average as in COCO)."""
    short, long = int(rng.integers(427, 481)), 640
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falloff = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    channels = []
    for _ in range(3):
        waves = falloff * np.exp(2j * np.pi * rng.random(falloff.shape))
        texture = np.fft.irfft2(waves, s=(height, width))
        channels.append(texture / texture.std())
    mixed = np.stack([channels[0] + 0.35 * channel for channel in channels], -1)
    pixels = np.clip(128 + 32 * mixed + rng.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)
    image, boxes = Image.fromarray(pixels), []
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 13))):
        w, h = np.exp(rng.uniform(np.log(20), np.log(300), 2))
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([x, y, x + w, y + h], outline=tuple(rng.integers(0, 255, 3).tolist()), width=4)
        boxes.append([round(float(v), 2) for v in (x, y, w, h)])
    return image, boxes


def make(folder: Path, count: int, seed: int = 1, times: int = 1) -> Path:
    """``count`` photographs in ``folder/images`` and ``folder/annotations.json`` in COCO's layout; returns the latter.

    Each of them is ``times`` images of the data set.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = np.random.default_rng([seed, number])
        image, boxes = photograph(rng)
        name = f"{number:012d}.jpg"
        image.save(folder / "images" / name, quality=QUALITY, subsampling="4:2:0")
        for key in range(number, number + times * count, count):
            images.append({"id": key, "file_name": name, "width": image.width, "height": image.height})
            for box in boxes:
                fields = {"image_id": key, "category_id": int(rng.integers(1, 81)), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, **fields})
    content = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in range(1, 81)]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"

"""Small data sets of pictures that are drawn, and what loaders make of them; for all tests of loaders."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from base.contracts import Batch

SIZE = (48, 64)  # height, width of the samples: not square, so that swapped sides show
WIDTH, HEIGHT = 80, 40  # of `quarters`
CATEGORIES = [{"id": 3, "name": "three"}, {"id": 7, "name": "seven"}]


def picture(number: int, width: int, height: int) -> Image.Image:
    """A smooth picture that no other number has."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_coco(folder: Path, pictures: dict[int, Image.Image], boxes: dict[int, list], kind: str = "png", name: str = "a.json") -> dict:
    """Writes images and annotations; boxes of an image: [x, y, width, height, category]. → arguments of a loader."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for key, image in pictures.items():
        image.save(folder / f"{key}.{kind}", quality=95)
        images.append({"id": key, "file_name": f"{key}.{kind}", "height": image.height, "width": image.width})
        for x, y, w, h, category in boxes.get(key, []):
            entry = {"id": len(annotations) + 1, "image_id": key, "category_id": category, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append(entry)
    (folder / name).write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return {"annotation_file": folder / name, "image_dir": folder}


def many(folder: Path, count: int, empty: int = 0) -> dict:
    """``count`` images with a box or more and ``empty`` without; ids rise, with gaps."""
    pictures, boxes = {}, {}
    for number in range(count + empty):
        width, height = 50 + number % 7 * 10, 40 + number % 5 * 12
        pictures[10 + 3 * number] = picture(number, width, height)
        if number % (count + empty) < count:
            boxes[10 + 3 * number] = [[n, 2 * n, 20 + n, 15, 3 + 4 * (n % 2)] for n in range(1 + number % 3)]
    return write_coco(folder, pictures, boxes)


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


@st.composite
def ltrb(draw) -> list[float]:
    """A box as the index may give it: within [0, 1] and, in 32 bits, not empty; often thin, often at an edge."""
    edges = st.floats(0, 1, width=32)
    near = st.sampled_from([0.0, 1.0, 0.5, 0.25]) | edges
    thin = st.sampled_from([2.0**-149, 1e-9, 1e-7, 1e-3])
    (a, c), (b, d) = (sorted((x := draw(near), draw(near | thin.map(lambda t, x=x: min(1.0, x + t))))) for _ in range(2))
    return [a, b, c, d]


def training(backend, data: dict, **changes):
    return backend.train_loader(**{**data, "image_size": SIZE, "batch_size": 16, "workers": 0, "seed": 5, **changes})


def evaluating(backend, data: dict, **changes):
    return backend.eval_loader(**{**data, "image_size": SIZE, "batch_size": 4, "workers": 0, **changes})


def pure(loader):
    """The loader, if its samples are promised to be pure functions of seed, epoch and image id."""
    if hasattr(loader, "state_dict"):
        pytest.skip("this loader keeps a state of its own instead")
    return loader


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.image_ids.tolist() for batch in batches]


def samples(batches: list[Batch]) -> dict[int, tuple]:
    """Image id → everything that belongs to it, without padding."""
    found = {}
    for batch in batches:
        for image, boxes, labels, key, size in zip(*batch, strict=True):
            real = labels > 0
            found[int(key)] = (image.cpu().numpy().tobytes(), boxes[real].tolist(), labels[real].tolist(), size.tolist())
    return found


def check_batch(batch: Batch, count: int) -> None:
    """Shapes, types and padding as in `base.contracts.Batch`."""
    longest = batch.labels.shape[1]
    assert isinstance(batch, Batch)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (count, *SIZE, 3)
    assert batch.boxes.dtype == torch.float32 and batch.boxes.shape == (count, longest, 4)
    assert batch.labels.dtype == torch.int64 and batch.labels.shape == (count, longest)
    assert batch.image_ids.dtype == torch.int64 and batch.image_ids.shape == (count,)
    assert batch.sizes.dtype == torch.int64 and batch.sizes.shape == (count, 2)
    real = batch.labels > 0
    assert not batch.boxes[~real].any()
    assert (real.int().diff(dim=1) <= 0).all()  # padding only after an image's boxes
    assert (batch.labels <= len(CATEGORIES)).all()
    boxes = batch.boxes[real]
    assert (boxes >= 0).all() and (boxes <= 1).all() and (boxes[:, :2] < boxes[:, 2:]).all()

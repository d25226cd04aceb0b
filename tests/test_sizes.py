"""Images of any size: large ones, which sizes and strides go together, and memory. Loaders and decoders of large images are in `verify`'s checks."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from base.backends.reference.model import LARGEST_SIDE, SSD, feature_sizes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base.backend import load_backend
from base.boxes import BOXES_PER_CELL
from base.errors import UserError
from conformance.parts import LARGE, Kit, loss_of_large_images, matching_of_large_images
from tests.conftest import DEVICE, ROOT

sides, block_strides = st.integers(16, 2000), st.integers(1, 4)


@pytest.mark.parametrize("check", [matching_of_large_images, loss_of_large_images])
def test_large_images(backend, tmp_path, check):
    rows = list(check(Kit(backend, load_backend("reference"), DEVICE, 1, tmp_path, {})))
    assert rows and all(error <= tolerance for _, error, tolerance in rows), rows


@pytest.mark.parametrize(("name", "boxes"), [("700×700", 46_742), ("800×1200", 25_276), ("1200×1200", 15_130)])
def test_default_boxes_of_the_published_sizes(backend, name, boxes):
    size, strides = LARGE[name]
    model = backend.model(num_classes=2, image_size=size, strides=strides, backbone="resnet18")
    assert len(model.default_boxes) == boxes and model.default_boxes.feature_sizes == feature_sizes(size, strides)


def outputs(size: tuple, strides: tuple) -> int:
    """How many predictions the model makes by torch's own arithmetic, without computing any."""
    with torch.device("meta"):
        model = SSD(num_classes=2, image_size=size, strides=strides, backbone="resnet18").eval()
        offsets, logits = model(torch.empty(1, 3, *size))
    assert offsets.shape == (1, len(model.default_boxes), 4) and logits.shape == (1, len(model.default_boxes), 2)
    return offsets.shape[1]


@settings(max_examples=30)
@given(size=st.tuples(sides, sides), strides=st.tuples(*[block_strides] * 6))
@example(size=(33, 33), strides=(4, 4, 1, 1, 1, 1))
@example(size=(32, 2000), strides=(1, 1, 1, 1, 1, 1))
@example(size=(300, 200), strides=(1, 1, 2, 2, 2, 1))
def test_sizes_and_strides_fit_or_others_are_named_that_do(size, strides):
    try:
        maps = feature_sizes(size, strides)
    except UserError as error:
        said = str(error)
        assert said.startswith(f"image size {size[0]}×{size[1]} with strides {' '.join(map(str, strides))}")
        with pytest.raises(UserError):
            outputs(size, strides)
        if level := re.search(r"no feature map on level (\d) of 6 \((.+)\)", said):
            cells = [tuple(map(int, pair.split("×"))) for pair in level[2].split(", ")]
            assert [0 in pair for pair in cells].index(True) == int(level[1]) - 1
        if least := re.search(r"no strides fit a side below (\d+) pixels", said):
            assert min(size) < int(least[1])
            size, strides = tuple(max(side, int(least[1])) for side in size), (1,) * 6
        else:
            strides = tuple(map(int, re.search(r"strides ([\d ]+) fit", said)[1].split()))
        maps = feature_sizes(size, strides)
    assert len(maps) == 6 and min(map(min, maps)) >= 1
    assert outputs(size, strides) == sum(rows * columns * cell for (rows, columns), cell in zip(maps, BOXES_PER_CELL, strict=True))


@pytest.mark.parametrize("size", [(100_000, 100_000), (300, LARGEST_SIDE + 1), (10**30, 300), (0, 300), (1, 1)])
def test_absurd_sizes_are_refused_at_once(backend, size):
    said = f"a side has at most {LARGEST_SIDE} pixels" if max(size) > 300 else "no strides fit a side below 33 pixels"
    with pytest.raises(UserError, match=f"image size {size[0]}×{size[1]}.*{said}"):
        backend.model(num_classes=2, image_size=size, strides=(1, 1, 2, 2, 2, 1), backbone="resnet18")


def test_absurd_strides_are_refused(backend):
    with pytest.raises(UserError, match="six whole numbers of at least 1, and at most 8192"):
        backend.model(num_classes=2, image_size=(300, 300), strides=(10**30, 10**30, 1, 1, 1, 1), backbone="resnet18")


@pytest.mark.long
def test_memory_grows_no_faster_than_pixels(backend):
    """Loader, matcher, loss, decoder and a step, at a size and at one of four times as many pixels."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    command = [sys.executable, "-m", "tests.memory", backend.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"train_loader", "matcher", "loss", "decoder", "step"}
    assert all(large <= 4 * small + (16 << 20) for small, large in found.values()), found
    assert max(large for _, large in found.values()) > 50 << 20  # so much is not a measure's noise

"""NVIDIA's configurations: each value of the recipes as published."""

import subprocess

import pytest

from base.backends import backend_folder
from base.config import list_configs, resolve
from base.schedule import evaluates_after, scaled_rate, warmup_steps

# nodes, devices, batch a device, rate before scaling, after it, weight decay, warm-up steps, batch of evaluation a device
PUBLISHED = {
    "DGX1": (1, 8, 120, 2.92e-3, 35 * 2.5e-3, 1.6e-4, 650, 160),
    "DGX2": (1, 16, 56, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "DGXA100": (1, 8, 114, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "DGX2_multi_4x16x24": (4, 16, 24, 2.9e-3, 56 * 2.5e-3, 1.7e-4, 850, 40),
    "DGXA100_multi_2x8x56": (2, 8, 56, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "V100x1x8": (1, 8, 120, 2.92e-3, 35 * 2.5e-3, 1.6e-4, 650, 160),
    "V100x1x1": (1, 1, 120, 2.92e-3, 4 * 2.5e-3, 1.6e-4, 650, 160),
    "nodali_V100x1x8": (1, 8, 120, 2.92e-3, 35 * 2.5e-3, 1.6e-4, 650, 160),
    # the same recipes on other machines
    "V100x2x8": (2, 8, 56, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "A100x1x1": (1, 1, 114, 3.2e-3, 5 * 2.5e-3, 1.3e-4, 650, 160),
    "A100x1x8": (1, 8, 114, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "H100x1x8": (1, 8, 114, 3.2e-3, 36 * 2.5e-3, 1.3e-4, 650, 160),
    "H200x1x1": (1, 1, 114, 3.2e-3, 5 * 2.5e-3, 1.3e-4, 650, 160),
}
FOLDER = backend_folder("nvidia")


def test_there_is_a_row_for_each():
    assert PUBLISHED.keys() == {path.stem for path in (FOLDER / "config").glob("*.yaml")} <= set(list_configs(FOLDER))


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_as_published(name):
    c = resolve(FOLDER, name).config
    rate, scaled = c.learning_rate, pytest.approx(scaled_rate(c), rel=1e-12)
    found = (c.nodes, c.devices, c.batch_size, rate, scaled, c.weight_decay, warmup_steps(c, 117_266), c.eval_batch_size)
    assert found == PUBLISHED[name]
    assert (c.decay_epochs, c.decay_factor, c.epochs, c.momentum, c.target, c.warmup_factor) == ((44, 55), 0.1, 80, 0.9, 0.23, 0)
    assert [epoch for epoch in range(1, 81) if evaluates_after(c, epoch)] == [40, 50, 55, 60, 65, 70, 75, 80]
    assert (c.image_size, c.strides, c.backbone) == ((300, 300), (1, 1, 2, 2, 2, 1), "resnet34")
    assert (c.score_threshold, c.iou_threshold, c.max_detections) == (0.05, 0.5, 200)
    assert c.use == ({"loader": "cpu"} if name.startswith("nodali") else {})


def test_the_environment_keeps_what_is_set():
    script = f"set -eu; source {FOLDER}/config/environment_variables.sh; echo $CUDA_DEVICE_ORDER $CUDA_MODULE_LOADING"
    done = subprocess.run(["bash", "-c", script], env={"CUDA_MODULE_LOADING": "LAZY"}, capture_output=True, text=True, check=True)
    assert done.stdout == "PCI_BUS_ID LAZY\n"

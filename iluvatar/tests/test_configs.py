"""Iluvatar's configurations: each value of the recipes as published, and the environment that CoreX needs."""

import os
import subprocess
import sys

import pytest

from base.backends import backend_folder
from base.config import list_configs, resolve
from base.schedule import evaluates_after, scaled_rate, warmup_steps
from tests.conftest import ROOT

# nodes, devices, batch a device, rate before scaling, after it, decay epochs, decay factor
PUBLISHED = {
    "V100x1x8": (1, 8, 192, 2.92e-3, 56 * 2.5e-3, (44, 55), 0.1),
    "V100x1x1": (1, 1, 192, 2.92e-3, 7 * 2.5e-3, (44, 55), 0.1),
    "V100x2x8": (2, 8, 96, 2.92e-3, 56 * 2.5e-3, (44, 55), 0.1),
    "nodali_V100x1x8": (1, 8, 192, 2.92e-3, 56 * 2.5e-3, (44, 55), 0.1),
    "recipe2.1.0_V100x1x8": (1, 8, 160, 5.2e-3, 83 * 2.5e-3, (34, 45), 0.2),
}
FOLDER = backend_folder("iluvatar")


def test_there_is_a_row_for_each():
    assert PUBLISHED.keys() == {path.stem for path in (FOLDER / "config").glob("*.yaml")} <= set(list_configs(FOLDER))


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_as_published(name):
    c = resolve(FOLDER, name).config
    scaled = pytest.approx(scaled_rate(c), rel=1e-12)
    assert (c.nodes, c.devices, c.batch_size, c.learning_rate, scaled, c.decay_epochs, c.decay_factor) == PUBLISHED[name]
    assert (c.weight_decay, warmup_steps(c, 117_266), c.warmup_factor, c.eval_batch_size) == (1.6e-4, 650, 0, 160)
    assert (c.epochs, c.momentum, c.target, c.gradient_accumulation) == (80, 0.9, 0.23, 1)
    assert [epoch for epoch in range(1, 81) if evaluates_after(c, epoch)] == [40, 50, 55, 60, 65, 70, 75, 80]
    assert (c.image_size, c.strides, c.backbone) == ((300, 300), (1, 1, 2, 2, 2, 1), "resnet34")
    assert (c.score_threshold, c.iou_threshold, c.max_detections) == (0.05, 0.5, 200)
    assert c.use == ({"loader": "cpu"} if name.startswith("nodali") else {})


def sourced(folder, script: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script in base/, as the predecessor's README has it, after sourcing the environment from there."""
    command = f"set -eu; source ../iluvatar/config/environment_variables.sh; {script}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT / "base", env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True)


def test_the_environment_finds_the_sdk(tmp_path):
    (tmp_path / "lib64" / "python3" / "dist-packages").mkdir(parents=True)
    said = 'source ../iluvatar/config/environment_variables.sh; echo "$PATH|$LD_LIBRARY_PATH|$PYTHONPATH|$TORCH_NCCL_ASYNC_ERROR_HANDLING"'
    done = sourced(tmp_path, said, COREX_HOME=str(tmp_path), LD_LIBRARY_PATH="/mine", TORCH_NCCL_ASYNC_ERROR_HANDLING="0")
    assert done.stderr == ""
    assert done.stdout.strip() == f"{tmp_path}/bin:{os.environ['PATH']}|{tmp_path}/lib64:/mine|{tmp_path}/lib64/python3/dist-packages|0"


def test_without_an_sdk_it_says_so(tmp_path):
    done = sourced(tmp_path, 'echo "$PATH|${PYTHONPATH:-none}"', COREX_HOME=str(tmp_path / "none"))
    assert done.stdout.strip() == f"{os.environ['PATH']}|none" and f"no CoreX SDK in {tmp_path}/none: set COREX_HOME" in done.stderr


def test_prepare_and_training_start_from_within_base(tmp_path):
    done = sourced(tmp_path, f"{sys.executable} prepare.py --name iluvatar --data_dir data", SSD_BACKEND_PATH="")
    assert done.returncode == 2 and f"{ROOT}/base/data does not exist" in done.stderr, done.stderr
    done = sourced(tmp_path, "bash run_training.sh --name iluvatar --list", SSD_PYTHON=sys.executable)
    assert done.returncode == 0 and "recipe2.1.0_V100x1x8" in done.stdout, done.stderr

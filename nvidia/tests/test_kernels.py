"""What runs in processes of its own: the kernels through Triton's interpreter, which must be chosen before Triton is imported, and
what every backend is held to, for which this one is chosen by name where there is no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton

from tests.conftest import files_on

ROOT = Path(__file__).resolve().parents[2]
FILES = [file for file in sorted((Path(__file__).parent / "interpreted").glob("test_*.py")) if file.stem != "test_step"]  # which needs a GPU
ON_KERNELS = [file for part in ("matcher", "loss", "decoder") for file in files_on(part)]


def release(module) -> tuple[int, int]:
    return tuple(map(int, module.__version__.split(".")[:2]))


INTERPRETER = pytest.mark.skipif(
    release(triton) <= (3, 6) and release(numpy) >= (2, 4), reason=f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4"
)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="here these tests are collected themselves"
)


def passed(*arguments: str, interpreted: bool) -> int:
    """Runs pytest on the CPU; → how many tests passed, of which none may be skipped."""
    chosen = {"TRITON_INTERPRET": str(int(interpreted)), "SSD_TEST_BACKENDS": "nvidia", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment = {**os.environ, **chosen}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@INTERPRETER
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_in_the_interpreter(file):
    assert passed(str(file), interpreted=True) > 3


@INTERPRETER
def test_golden_data_in_the_interpreter():
    assert passed("tests/test_golden.py", interpreted=True) > 6


@INTERPRETER
def test_large_images_in_the_interpreter():
    assert passed("tests/test_sizes.py", "-k", "large_images", interpreted=True) == 2


@INTERPRETER
@pytest.mark.long
def test_what_every_backend_must_do_in_the_interpreter():
    assert passed(*ON_KERNELS, "-k", "nvidia", interpreted=True) > 15


@pytest.mark.long
@pytest.mark.parametrize("subject", ["components", "loader", "augment", "weights", "verify"])
def test_what_every_backend_must_do_on_the_cpu(subject):
    assert passed(*files_on(subject), "-k", "nvidia", interpreted=False) > 3

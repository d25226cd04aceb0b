"""Native code and input of any kind: it ends in a result or an exception, as it is built and under sanitizers (`fuzz.py`)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, files_on

pytest.importorskip("base.backends.cpu._images", reason="the native parts are not built: python3 prepare.py --name cpu", exc_type=ImportError)
from base.backends.cpu import _images
from base.backends.cpu.loader import RULES

CPU = Path(__file__).resolve().parents[1]
FUZZ = [sys.executable, "-m", "base.backends.cpu.tests.fuzz"]


def run(command: list[str], seconds: float, **environment: str) -> str:
    """What a command prints, last of all what it says of its failure: a crash ends its process and not the tests."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:6000]}"
    return done.stdout + done.stderr


def check(report: dict) -> None:
    """Files and arguments that are read, and such as are refused, were among the inputs of each kind."""
    happened = report["happened"]
    for kind in ("jpeg_file", "many_files", "array", "draws", "matching", "decoding", "losses", "figures", "odd_sample"):
        assert happened.get(f"{kind}: read", 0) >= 3, happened
    assert happened["jpeg_file: read"] > 50 and happened["jpeg_file: left"] > 50
    assert sum(number for kind, number in happened.items() if kind.endswith(": ValueError")) > 50


def last_line(printed: str) -> dict:
    return json.loads(re.findall(r"^\{.*\}$", printed, re.MULTILINE)[-1])


def test_damaged_and_absurd_input():
    check(last_line(run([*FUZZ, "--seed", "0", "--count", "800", "--rounds", "5"], 100)))


@pytest.mark.long
def test_damaged_and_absurd_input_for_longer():
    check(last_line(run([*FUZZ, "--seed", "1", "--count", "8000", "--rounds", "4"], 500)))


def test_threads_that_the_system_refuses_are_done_without():
    script = """
import resource, sys
from base.backends.cpu.tests import native
from base.backends.cpu import _coco
import numpy as np
images = 3000
truth = np.arange(images + 1), np.ones((images, 4)), np.ones(images, np.int64), np.zeros(images, bool), np.ones(images), 1
part = np.arange(images), np.ones((images, 2)), np.arange(images + 1), np.ones((images, 4)), np.ones(images, np.int64), np.ones(images)
arguments = *truth, [part], np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
want = _coco.figures(*arguments, 1)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (40 << 20),) * 2)  # no room for 90 stacks of 8 MB
for got, expected in zip(_coco.figures(*arguments, 90), want):
    assert (got == expected).all()
print("done")
"""
    assert "done" in run([sys.executable, "-c", script], 60)


BOXES = {
    "not numbers": [[np.nan] * 4] * 3,
    "infinite": [[-np.inf, -np.inf, np.inf, np.inf]],
    "inside out": [[0.9, 0.9, 0.1, 0.1]],
    "elsewhere": [[5, 5, 6, 6]],
    "none": np.zeros((0, 4)),
}


@pytest.mark.parametrize("case", BOXES)
def test_boxes_that_no_crop_can_keep_end_in_the_whole_picture(case):
    """The index lets no such box through. The rules would, as the reference's: one of seven is the whole picture, which takes all."""
    for seed in range(20):
        drawn = _images.draw(np.random.default_rng(seed), np.array(BOXES[case], np.float32), 50, RULES)
        assert case in ("inside out", "infinite") or drawn.crop == [0, 0, 1, 1]
        assert np.isfinite(drawn.boxes).all()


# Sanitizers


def library(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process with the modules built for AddressSanitizer and UndefinedBehaviorSanitizer."""
    run([sys.executable, str(CPU / "build.py"), "--sanitize"], 600)
    preloaded = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    options = "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32"
    return {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # what Python holds is watched, too
        "SSD_TEST_NATIVE": str(CPU / "native" / "sanitized"),
    }


@pytest.mark.long
def test_damaged_and_absurd_input_under_sanitizers(sanitized):
    printed = run([*FUZZ, "--seed", "2", "--count", "4000", "--rounds", "2", "--seconds", "50"], 500, **sanitized)
    report = last_line(printed)
    assert report["native"] == sanitized["SSD_TEST_NATIVE"]
    check(report)


@pytest.mark.long
def test_native_code_loses_no_memory(sanitized):
    """Of what LeakSanitizer lists, Python's own aside: nothing that native code here has allocated."""
    options = sanitized["ASAN_OPTIONS"].replace("detect_leaks=0", "detect_leaks=1")
    environment = {**sanitized, "ASAN_OPTIONS": options, "LSAN_OPTIONS": "exitcode=0"}
    printed = run([*FUZZ, "--count", "1000", "--seconds", "50"], 500, **environment)
    found = re.findall(r"(?:Direct|Indirect) leak of .*?\n\n", printed, re.DOTALL)
    assert found, "LeakSanitizer did not run"
    ours = [leak for leak in found if re.search(r"/native/|\(_(coco|decoder|images|loss|matcher|norm)\.", leak)]
    assert not ours, ours[0]


@pytest.mark.long
def test_the_other_tests_of_native_code_under_sanitizers(sanitized):
    files = [*(str(CPU / "tests" / f"test_{name}.py") for name in ("images", "coco", "norm")), *files_on("components"), *files_on("golden")]
    selected = "cpu and not (coco_model or model_golden or a_model)"  # whole models take long under sanitizers, most of it in torch
    printed = run([sys.executable, "-m", "pytest", "-x", *files, "-k", selected, "-p", "no:cacheprovider"], 500, **sanitized)
    assert int(re.search(r"(\d+) passed", printed)[1]) > 100

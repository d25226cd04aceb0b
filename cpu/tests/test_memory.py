"""What the training loader holds while thousands of photographs go through it."""

import json
import os
import subprocess
import sys

import pytest

from measuring.photographs import make
from tests.conftest import ROOT

pytest.importorskip("base.backends.cpu._images", reason="the native parts are not built: python3 prepare.py --name cpu", exc_type=ImportError)

PHOTOGRAPHS, BATCH, WORKERS = 64, 32, 2

LOADED = """
import json, sys
from base.backend import load_backend
from base.backends.cpu.tests.fuzz import resident

make, (annotations, images, batch, workers, epochs) = load_backend("cpu").train_loader, sys.argv[1:]
options = {"annotation_file": annotations, "image_dir": images, "image_size": (300, 300), "batch_size": int(batch), "seed": 1}
next(iter(make(**options, workers=0)))  # what the libraries take when they are first used is not the threads'
sizes = [resident()]
loader = make(**options, workers=int(workers))
for epoch in range(int(epochs)):
    loader.set_epoch(epoch)
    for got in loader:
        assert got.images.shape == (int(batch), 300, 300, 3)
    sizes.append(resident())
print(json.dumps(sizes))
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    return [str(make(folder, PHOTOGRAPHS)), str(folder / "images")]


def memory(photographs: list[str], samples: int, **environment: str) -> tuple[float, list[float]]:
    """MB of a process before its loader has threads, and after each epoch."""
    arguments = [*photographs, str(BATCH), str(WORKERS), str(samples // PHOTOGRAPHS)]
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], env=own, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    before, *after = json.loads(done.stdout)
    return before, after


@pytest.mark.long
def test_memory_stays_flat_over_10_000_samples(photographs):
    """Freed batches go back to the system here. Otherwise the C library keeps some, and now this many and now that."""
    _, after = memory(photographs, 10_000, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    assert after[-1] - after[2_000 // PHOTOGRAPHS] < 15, after


@pytest.mark.long
def test_a_thread_costs_at_most_300_mb(photographs):
    before, after = memory(photographs, 3_000)
    assert max(after) - before < 300 * WORKERS, (before, after)

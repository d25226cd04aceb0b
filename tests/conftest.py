"""What the tests share: golden data, the demo data set, and real runs in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from base.backend import list_backends, load_backend
from data_sets.demo_data import generate

settings.register_profile("ssd", deadline=None, print_blob=True)  # a busy machine is no failure
settings.load_profile("ssd")

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device(os.environ.get("SSD_TEST_DEVICE", "cpu"))  # where components are tested
torch.backends.cudnn.allow_tf32 = False  # float32 is held to float32's figures, wherever it is computed
GOLDEN = Path(__file__).parent / "golden"
COMPONENTS = ("model", "matcher", "loss", "decoder", "step", "evaluator")


def runs_here(name: str) -> bool:
    """Whether a backend's parts can be tested on this machine: on the CPU, or on the device that $SSD_TEST_DEVICE names.

    $SSD_TEST_BACKENDS chooses backends by name, for what an accelerator's backend does on a CPU.
    """
    if chosen := os.environ.get("SSD_TEST_BACKENDS"):
        return name in chosen.split()
    return load_backend(name).device in ("auto", DEVICE.type)


def files_on(subject: str) -> list[str]:
    """The files of tests on a subject, such as `loader`; on `components`, those of all that are no loader."""
    return [f"tests/test_{name}.py" for name in (COMPONENTS if subject == "components" else (subject,))]


@pytest.fixture(scope="session", params=[name for name in list_backends() if runs_here(name)])
def backend(request):
    """Every backend that runs here, one after the other."""
    return load_backend(request.param)


def small_model(backend, **changes):
    """A detector of four classes at 96×96, the same for every backend, but for ``changes``."""
    torch.manual_seed(0)
    settings = {"num_classes": 4, "image_size": (96, 96), "strides": (1,) * 6, "backbone": "resnet18", **changes}
    return backend.model(**settings).to(DEVICE)


@pytest.fixture(scope="session")
def model_300(backend):
    """The COCO model at 300×300."""
    torch.manual_seed(0)
    return backend.model(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet34").to(DEVICE).eval()


@pytest.fixture(scope="session")
def golden():
    """Opens a golden .npz or .json by its name."""
    return lambda name: np.load(GOLDEN / f"{name}.npz") if (GOLDEN / f"{name}.npz").exists() else json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory) -> Path:
    """A small demo data set: 72 training and 24 validation images."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    generate(folder, train=72, val=24, size=96, seed=5)
    return folder


@pytest.fixture
def config_folder(tmp_path):
    """A backend's folder: config_folder(name=text, …) writes configurations and returns it."""

    def write(**files):
        (tmp_path / "config").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "config" / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


SMALL = ["--image_size", "96", "96", "--strides", "1", "1", "1", "1", "1", "1", "--batch_size", "8", "--eval_batch_size", "16"]
SMALL += ["--report", "false"]  # which would take longer than such a run


class Started:
    """A run of run_training.sh in a process of its own."""

    def __init__(self, folder: Path, flags: list[str], env: dict | None = None, before: Sequence[str] = (), project: Path = ROOT):
        environment = {**os.environ, "SSD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(env or {})}
        command = [*before, "bash", str(project / "run_training.sh"), *flags]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)

    def wait_done(self, seconds: float = 500) -> subprocess.CompletedProcess:
        """Waits for the end: return code and what it printed."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, out, err)


def one_error(done: subprocess.CompletedProcess) -> str:
    """The only error message of a process that ended as such a one should."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr and done.stderr.count("error:") == 1
    assert done.stderr.startswith("error: ")
    return done.stderr.removeprefix("error: ")


def start_training(folder: Path, data_dir: Path, flags: list[str], run: str = "run", env: dict | None = None) -> Started:
    """Starts a run on small data, in ``folder/run``; with --resume exactly the flags given.

    On the CPU, unless flags say otherwise: runs are compared to the bit.
    """
    if "--resume" not in flags:
        standard = ["--name", "reference", "--config", "demo", "--data_dir", str(data_dir), *SMALL, "--device", "cpu"]
        flags = [*standard, "--runs_dir", str(folder), "--run_name", run, *flags]
    return Started(folder, list(flags), env)


@pytest.fixture
def train(demo_data, tmp_path):
    """train("--epochs", "2", …) → finished process, its run in tmp_path/"run"; with wait=False the running process."""

    def start(*flags: str, wait: bool = True, run: str = "run", data_dir: Path = demo_data, env: dict | None = None):
        started = start_training(tmp_path, data_dir, list(flags), run, env)
        return started.wait_done() if wait else started.process

    return start


def same_losses_on_the_cpu(train, folder: Path, name: str) -> None:
    """Three steps of an accelerator's backend on the CPU beside the reference's: it decodes JPEGs otherwise, and adds in other orders."""
    for backend in (name, "reference"):
        done = train("--name", backend, "--device", "cpu", "--max_steps", "3", "--target", "null", "--log_every", "1", run=backend)
        assert done.returncode == 0, done.stderr
    own, plain = (dict(losses(folder / backend)) for backend in (name, "reference"))
    assert own == pytest.approx(plain, rel=0.01) and len(set(plain.values())) == 3


def one_line_without_its_device(train, name: str) -> None:
    """Where an accelerator's backend has no device, a line says what is missing and what runs here."""
    done = train("--name", name, "--device", "auto", "--max_steps", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: backend {name} needs a cuda device and this machine has none; --name cpu runs here, and --device cpu takes what {name} does on a CPU"
    ]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training line in a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]

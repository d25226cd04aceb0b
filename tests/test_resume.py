"""Nothing is lost: stopped, killed and damaged runs go on to the very weights and losses of an undisturbed run."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from base import checkpoint
from base.backend import list_backends, load_backend
from base.config import Config
from base.errors import UserError
from tests.conftest import losses, start_training
from tests.disturbed import assert_same, final_state, rank_pids, small_checkpoint, steps_done, wait_for

FLAGS = ["--epochs", "3", "--eval_every", "2", "--target", "null", "--log_every", "1", "--checkpoint_every", "3", "--learning_rate", "0.01"]
TWO = ("--nproc", "2", "--device", "cpu", "--batch_size", "4")
ON_THE_CPU = [name for name in list_backends() if load_backend(name).device in ("auto", "cpu")]
WAYS = [pytest.param(("--name", name), id=name, marks=[pytest.mark.long] * (name != "reference")) for name in ON_THE_CPU]
WAYS.append(pytest.param(TWO, id="two ranks", marks=pytest.mark.long))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, demo_data):
    """Runs that nobody disturbed, with one and with two ranks, made once."""
    made = {}

    def get(flags: tuple[str, ...]) -> Path:
        if flags not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            done = start_training(folder, demo_data, [*FLAGS, *flags]).wait_done()
            assert done.returncode == 0, done.stderr
            made[flags] = folder / "run"
        return made[flags]

    return get


@pytest.mark.parametrize("flags", WAYS)
def test_sigterm_saves_and_a_resumed_run_is_the_same(train, tmp_path, undisturbed, flags):
    process = train(*FLAGS, *flags, "--max-restarts", "2", wait=False)
    wait_for(lambda: steps_done(tmp_path / "run") >= 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert "stopped after step" in out and "--resume" in out
    stopped_at = final_state(tmp_path / "run")["progress"]["step"]
    assert stopped_at >= 4 and stopped_at == losses(tmp_path / "run")[-1][0]
    done = train("--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"{stopped_at} steps done" in done.stdout
    assert_same(tmp_path / "run", undisturbed(flags))


@pytest.mark.parametrize("flags", WAYS)
def test_sigkill_in_the_middle_of_an_epoch(train, tmp_path, undisturbed, flags):
    process = train(*FLAGS, *flags, wait=False)
    wait_for(lambda: steps_done(tmp_path / "run") >= 5, process)
    os.kill(rank_pids(process.pid)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137 and "--resume" in err
    done = train("--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", undisturbed(flags))


def test_sigkill_while_a_checkpoint_is_written(train, tmp_path, undisturbed):
    process = train(*FLAGS, wait=False)
    folder = tmp_path / "run" / "checkpoints"
    wait_for(lambda: checkpoint.listed(tmp_path / "run") and list(folder.glob(".*.tmp")), process, pause=0.001)
    os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 137
    for path in checkpoint.listed(tmp_path / "run"):
        checkpoint.read(path)  # whatever is there under its final name is whole
    done = train("--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", undisturbed(("--name", "reference")))


def test_sigkill_between_an_epochs_end_and_its_evaluation(train, tmp_path, undisturbed):
    whole = undisturbed(("--name", "reference"))
    second = final_state(whole)["progress"]["evaluations"][0]["step"]  # the end of the second epoch, the first to be evaluated
    process = train(*FLAGS, wait=False)
    wait_for(checkpoint.step_path(tmp_path / "run", second).exists, process, pause=0.001)
    os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    assert '"kind": "evaluation"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    done = train("--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"{second} steps done" in done.stdout
    assert_same(tmp_path / "run", whole)


@pytest.mark.long
def test_sigkill_of_the_launcher_stops_the_ranks(train, tmp_path, undisturbed):
    process = train(*FLAGS, wait=False)
    wait_for(lambda: steps_done(tmp_path / "run") >= 3, process)
    ranks = rank_pids(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert train("--resume", str(tmp_path / "run")).returncode == 0
    assert_same(tmp_path / "run", undisturbed(("--name", "reference")))


def test_damaged_latest_checkpoint_falls_back_to_the_one_before(train, tmp_path, undisturbed):
    process = train(*FLAGS, wait=False)
    wait_for(lambda: steps_done(tmp_path / "run") >= 7, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    newest, before = checkpoint.listed(tmp_path / "run")[:2]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = train("--resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert f"{newest} is truncated" in done.stdout and f"resumed from {before.name}" in done.stdout
    assert_same(tmp_path / "run", undisturbed(("--name", "reference")))


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    flags = ["--max_steps", "2", "--target", "null", "--log_every", "1"]
    assert train(*flags).returncode == 0
    run = tmp_path / "run"
    before = (run / "mlperf.log").read_text().count("run_stop"), losses(run), final_state(run)["progress"]["evaluations"]
    assert train("--resume", str(run)).returncode == 0
    assert ((run / "mlperf.log").read_text().count("run_stop"), losses(run), final_state(run)["progress"]["evaluations"]) == before


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    flags = ["--checkpoint_every", "1", "--log_every", "1", "--epochs", "2", "--max-restarts", "2"]
    done = train("--learning_rate", "1e30", "--warmup_steps", "0", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "starting again" not in done.stderr
    assert "not finite at step" in done.stderr and "learning rate 1e+30" in done.stderr and "image ids" in done.stderr
    good = final_state(tmp_path / "run")
    assert str(checkpoint.listed(tmp_path / "run")[0]) in done.stderr
    bad_step = int(done.stderr.partition("at step ")[2].split()[0])
    assert good["progress"]["step"] < bad_step


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def test_checkpoints_are_read_by_safe_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = small_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read(path)["model"]["weight"], torch.arange(1000.0))
    torch.save({"format": 1, "model": Hostile()}, path)
    with pytest.raises(UserError, match="refused"):
        checkpoint.read(path)
    assert not Path("hostile-was-here").exists()


@pytest.mark.parametrize("damage", ["half", "empty", "bit", "text", "other", "future"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = small_checkpoint(tmp_path)
    data = path.read_bytes()
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "future":
        torch.save({"format": 99}, path)
    else:
        middle = data.index(torch.arange(1000.0).numpy().tobytes()) + 2000  # inside the weights, which only a checksum protects
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "bit": flipped, "text": b"not a checkpoint"}[damage])
    with pytest.raises(UserError, match=str(path)):
        checkpoint.read(path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    path = small_checkpoint(tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writing beyond fails, as on a full disk
    try:
        with pytest.raises(UserError, match="could not be written"):
            checkpoint.write(path, {"format": checkpoint.FORMAT, "model": {"weight": torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_of_another_architecture_is_refused(train, tmp_path):
    assert train("--max_steps", "1", "--target", "null").returncode == 0
    path = checkpoint.listed(tmp_path / "run")[0]
    content = checkpoint.read(path)
    config = Config(backbone="resnet18", image_size=(128, 128), strides=(1, 1, 1, 1, 1, 1))
    model = load_backend("reference").model(num_classes=6, image_size=(128, 128), strides=config.strides, backbone="resnet18")
    with pytest.raises(UserError, match=r"another architecture: image_size \[96, 96\] instead of \[128, 128\]"):
        checkpoint.load_model(model, content, path, config)
    other = load_backend("reference").model(num_classes=9, image_size=(96, 96), strides=config.strides, backbone="resnet18")
    with pytest.raises(UserError, match="number of classes"):
        checkpoint.load_model(other, content, path)

"""Whole runs in processes of their own: what they leave, what they show, and that ranks agree."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml

from base import checkpoint
from base.config import Config, read_run
from base.contracts import FIGURES
from tests.conftest import ROOT, SMALL, Started, losses, start_training
from tests.disturbed import rank_pids

SHORT = ["--max_steps", "4", "--target", "null", "--log_every", "1"]
TWO = ["--nproc", "2", "--device", "cpu", "--batch_size", "4"]


def figures_of(run, *flags: str) -> dict[str, str]:
    """The 12 figures that `python -m base evaluate` prints for a run's best checkpoint."""
    best = str(run / "checkpoints" / "best.pt")
    command = [sys.executable, "-m", "base", "evaluate", "--name", "reference", "--device", "cpu", "--checkpoint", best, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines()[:12])


def test_a_run_leaves_its_records(train, tmp_path, demo_data):
    done = train(*SHORT, "--seed", "7")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "mlperf.log"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.pt", "step-000000004.pt"]

    config = read_run(run / "config.yaml")
    assert isinstance(config, Config) and config.seed == 7 and config.batch_size == 8 and config.data_dir == str(demo_data)
    assert re.search(r"^seed: 7 +# --seed$", (run / "config.yaml").read_text(), re.M)
    assert re.search(r"^backbone: resnet18 +# base/recipes/demo.yaml$", (run / "config.yaml").read_text(), re.M)
    assert set(yaml.safe_load((run / "config.yaml").read_text())) == set(Config.model_fields)

    facts = json.loads((run / "environment.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0] or facts["packages"]["torch"] == torch.__version__
    assert facts["components"]["loss"] == "reference" and facts["cores"] >= 1 and len(facts["commit"]) >= 7

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in metrics] == ["train"] * 4 + ["evaluation", "end"]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    assert metrics[0]["learning_rate"] == 0.0 and metrics[3]["learning_rate"] == pytest.approx(0.03 * 3 / 100)
    assert all(-1 <= metrics[4][name] <= 1 for name in FIGURES)
    assert metrics[5] == {**metrics[5], "reached": False, "steps": 4}

    assert f"mAP  {metrics[4]['AP']:.4f} after epoch 1 (target" not in done.stdout  # no target, so none is spoken of
    assert "(no target)" in done.stdout and str(run) in done.stdout and "images/s" in done.stdout
    assert "step 1/4" in done.stdout and "\x1b" not in done.stdout  # a pipe gets plain lines
    keys = [json.loads(line.split(" ", 1)[1])["key"] for line in (run / "mlperf.log").read_text().splitlines()]
    for first, then in (("init_start", "init_stop"), ("init_stop", "run_start"), ("run_start", "train_samples"), ("eval_start", "run_stop")):
        assert keys.index(first) < keys.index(then)
    assert figures_of(run) == {name: f"{metrics[4][name]:.4f}" for name in FIGURES}


def test_on_a_terminal_there_is_a_progress_bar(tmp_path, demo_data):
    flags = ["--config", "demo", "--data_dir", str(demo_data), *SMALL, "--runs_dir", str(tmp_path), "--run_name", "run", *SHORT]
    leader, follower = pty.openpty()
    command = ["bash", str(ROOT / "run_training.sh"), *flags]
    environment = {**os.environ, "SSD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "150"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment, cwd=tmp_path)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    assert "━" in text and re.search(r"loss \d+\.\d+", text) and re.search(r"\d images/s", text) and re.search(r"\d:\d\d:\d\d", text)
    assert "run folder" in text and "step 1/4" not in text


def test_two_ranks_train_and_evaluate_as_one(train, tmp_path, demo_data):
    done = train(*SHORT, *TWO, "--sync-bn")
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stdout and done.stdout.count("run folder") == 1
    run = tmp_path / "run"
    evaluation = next(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "evaluation"' in line)
    assert figures_of(run) == {name: f"{evaluation[name]:.4f}" for name in FIGURES}
    # the two ranks' batches make the same global batch as one rank's; rounding grows from the third step on
    assert train(*SHORT, run="one").returncode == 0
    assert dict(losses(run)[:2]) == pytest.approx(dict(losses(tmp_path / "one")[:2]), rel=1e-5)


def test_an_error_of_one_rank_ends_all_with_one_message(train, tmp_path, demo_data):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("annotations", "val2017"):
        (folder / name).symlink_to(demo_data / name)
    (folder / "train2017").mkdir()
    for number, path in enumerate(sorted((demo_data / "train2017").iterdir())):
        (folder / "train2017" / path.name).write_bytes(path.read_bytes()[: 200 if number == 9 else None])
    done = train("--epochs", "1", *TWO, data_dir=folder)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be decoded" in done.stderr and "--skip-bad-images" in done.stderr


@pytest.mark.long
def test_two_nodes(tmp_path, demo_data):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    standard = ["--name", "reference", "--config", "demo", "--data_dir", str(demo_data), *SMALL, *SHORT, "--batch_size", "4", "--device", "cpu"]
    meeting = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--run_name", "run", "--max-restarts", "1"]
    nodes = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        nodes.append(Started(tmp_path, [*standard, *meeting, "--node-rank", str(rank), "--runs_dir", str(tmp_path / str(rank))]))
    metrics = tmp_path / "0" / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"train"' in metrics.read_text()) and all(node.process.poll() is None for node in nodes):
        time.sleep(0.05)
    os.kill(rank_pids(nodes[1].process.pid)[0], signal.SIGKILL)  # all nodes start again, though one has no access to the run's folder
    done = [node.wait_done() for node in nodes]
    assert [d.returncode for d in done] == [0, 0], done
    assert "killed by signal 9; starting again" in done[1].stderr and "starting again" in done[0].stderr
    assert "run folder" in done[0].stdout and "run folder" not in done[1].stdout
    kept = {path.name for path in (tmp_path / "1" / "run").iterdir()}  # only the first rank writes; the rest is for --resume
    assert kept == {"config.yaml", "environment.json"}
    alone = start_training(tmp_path, demo_data, [*SHORT, *TWO], run="alone").wait_done()
    assert alone.returncode == 0
    assert losses(tmp_path / "0" / "run") == losses(tmp_path / "alone")
    ours, theirs = (checkpoint.read(checkpoint.listed(r)[0])["model"] for r in (tmp_path / "0" / "run", tmp_path / "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_in_the_background_changes_nothing_but_time(train, tmp_path):
    flags = ["--epochs", "3", "--eval_every", "1", "--target", "null", "--log_every", "1", "--learning_rate", "0.01"]
    assert train(*flags, run="here").returncode == 0
    done = train(*flags, "--evaluate_in_background", run="background")
    assert done.returncode == 0, done.stderr
    here, background = (checkpoint.read(tmp_path / name / "checkpoints" / "best.pt") for name in ("here", "background"))
    assert background["progress"]["evaluations"] == here["progress"]["evaluations"]
    assert all(torch.equal(background["model"][name], tensor) for name, tensor in here["model"].items())
    assert losses(tmp_path / "background") == losses(tmp_path / "here")
    final = [checkpoint.read(checkpoint.listed(tmp_path / name)[0])["progress"] for name in ("here", "background")]
    assert [e["epoch"] for e in final[1]["evaluations"]] == [1, 2, 3] and final[0]["evaluations"] == final[1]["evaluations"]
    assert not list((tmp_path / "background").glob(".*"))

"""The run's own clock: what its sums hold and that they outlive a stop; TensorBoard, trials, and the report at the end."""

import importlib.util
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from base import checkpoint
from base.__main__ import main
from base.checkpoint import Progress
from base.clock import WARM_UP, Clock, rows, whole_run
from base.config import Config, Resolved, read_run
from base.errors import UserError
from base.records import keep_config
from base.tools.detector import open_checkpoint
from base.tools.finished import ended, members_of, write_report
from base.tools.series import trials_of
from formats import tensorboard
from submission.runs import Run
from submission.trials import closing
from tests.conftest import start_training
from tests.disturbed import final_state

TINY = ["--image_size", "64", "64", "--batch_size", "4", "--workers", "0", "--log_every", "1", "--eval_every", "0"]
HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


def records(run: Path, kind: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_marks_are_summed_by_part_and_the_first_steps_left_out():
    clock = Clock(torch.device("cpu"))
    for number in range(WARM_UP + 2):
        clock.start()
        for part in ("forward", "backward", "forward"):
            time.sleep(0.01)
            clock.mark(part)
        assert clock.add(clock.marks, last=True) >= 0.03
        assert bool(clock.told()) == (number >= WARM_UP)
    clock.add(clock.marks, last=True)
    told = clock.told()
    assert told["steps"] == 1 and told["forward_seconds"] >= 0.02 > told["backward_seconds"] * 0.5 > 0
    assert told["forward_seconds"] + told["backward_seconds"] == pytest.approx(told["step_seconds"], abs=1e-6)
    assert clock.told() == {}


def test_marks_of_a_captured_graph_count_for_the_last_step_only():
    clock = Clock(torch.device("cpu"))
    clock.reused, clock.left = True, 0
    clock.start()
    clock.mark("forward")
    assert clock.add(clock.marks, last=False) > 0 and clock.told() == {}
    clock.add(clock.marks, last=True)
    assert clock.told()["steps"] == 1


def test_a_device_without_such_events_is_no_error():
    clock = Clock(torch.device("meta"))
    clock.start()
    clock.mark("forward")
    assert "meta" in clock.missing and clock.marks == [] and clock.add(clock.marks, last=True) == 0


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory) -> Path:
    """A run of 16 steps that was stopped and went on, with what it had counted until then in stopped.json. A report cannot be written."""
    folder = tmp_path_factory.mktemp("clock")
    flags = [*TINY, "--max_steps", "16", "--target", "0", "--report", "true", "--tensorboard", str(HAS_TENSORBOARD).lower()]
    started = start_training(folder, demo_data, flags)
    metrics = folder / "run" / "metrics.jsonl"
    while started.process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') >= WARM_UP + 2):
        time.sleep(0.02)
    started.process.send_signal(signal.SIGTERM)
    done = started.wait_done()
    assert done.returncode == 143 and not (folder / "run" / "report.html").exists(), done.stderr
    (folder / "stopped.json").write_text(json.dumps(final_state(folder / "run")["progress"]))
    (folder / "run" / "report.html").mkdir()
    done = start_training(folder, demo_data, ["--resume", str(folder / "run")]).wait_done()
    assert done.returncode == 0, done.stderr
    (folder / "run" / "report.html").rmdir()
    (folder / "printed").write_text(done.stdout)
    return folder / "run"


def test_each_rate_has_its_boundaries(run):
    (end,), printed = records(run, "end"), (run.parent / "printed").read_text()
    raw, training, compute = (end[f"images_per_second_{name}"] for name in ("raw", "training", "compute"))
    assert 0 < raw <= training <= compute and end["images"] == 64
    assert raw == pytest.approx(64 / end["run_seconds"], rel=1e-3) and compute == pytest.approx(64 / end["step_seconds"], rel=1e-3)
    assert end["step_seconds"] + end["data_seconds"] <= end["train_seconds"] < end["seconds"] < end["run_seconds"]
    assert end["data_seconds"] == pytest.approx(sum(line["data_seconds"] for line in records(run, "train")), abs=0.1)
    stamps = {event["key"]: event["time_ms"] for event in map(json.loads, (line.split(" ", 1)[1] for line in (run / "mlperf.log").open()))}
    assert end["target_seconds"] == end["run_seconds"] == (stamps["run_stop"] - stamps["run_start"]) / 1e3
    for text in (f"{raw:.1f} raw: every image, from", f"{training:.1f} without evaluation", f"{compute:.1f} pure compute: the steps alone"):
        assert text in printed
    assert f"to target  {end['target_seconds']:,.1f} s, from MLPerf's run_start to run_stop, with the breaks of 1 resumption\n" in printed


def test_the_sums_survive_a_stop(run):
    stopped, (end,) = json.loads((run.parent / "stopped.json").read_text()), records(run, "end")
    assert stopped["resumed"] == 0 and end["resumed"] == 1 and stopped["step"] < 16
    for key in ("train_seconds", "step_seconds", "data_seconds"):
        assert 0 < stopped[key] < end[key], key


def test_the_parts_of_a_step_are_recorded(run):
    parts = records(run, "parts")
    steps = (json.loads((run.parent / "stopped.json").read_text())["step"], 16)
    assert sum(line["steps"] for line in parts) == sum(max(0, done - WARM_UP) for done in (steps[0], 16 - steps[0])) > 0
    for line in parts:
        named = {key: value for key, value in line.items() if key.endswith("_seconds") and key != "step_seconds"}
        assert {"forward_seconds", "loss_seconds", "backward_seconds", "optimizer_seconds", "matching_seconds"} <= named.keys()
        assert sum(named.values()) == pytest.approx(line["step_seconds"], rel=1e-3)


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the package tensorboard")
def test_tensorboard_has_what_metrics_have(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted: dict[str, list] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key not in ("time", "step", "steps", "epoch"):
                prefix = f"{line['kind']}/{line['phase']}" if "phase" in line else line["kind"]
                wanted.setdefault(f"{prefix}/{key}", []).append((line.get("step", line.get("steps")), pytest.approx(float(value), rel=1e-6)))
    assert {"train/loss", "train/learning_rate", "train/data_seconds", "evaluation/AP50", "parts/forward_seconds"} <= wanted.keys()
    assert {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == wanted


def test_tensorboard_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="-m pip install tensorboard"):
        tensorboard.check()


def test_a_report_that_fails_harms_no_run_and_one_that_does_not_is_whole(run, capsys):
    (line,) = [line for line in (run.parent / "printed").read_text().splitlines() if "no report" in line]
    assert f"{run / 'report.html'} cannot be written" in line and line.endswith(f"python -m base report {run} writes it")
    write_report(run)
    page = (run / "report.html").read_text()
    assert capsys.readouterr().out == f"    report  {run / 'report.html'}\n"
    assert "AP a class" in page and "Left out" not in page
    for part in ("forward pass", "backward pass", "optimizer"):
        measured = sum(line["steps"] for line in records(run, "parts"))
        assert re.search(rf"of it {part}\D+[\d.,]+ s, [\d.,]+ ms a step \(mean of {measured} steps\)", page), part


def test_a_report_of_some_images_says_so(run, tmp_path, capsys):
    assert main(["report", str(run), "--images", "5", "--workers", "0", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "on 5 of the 24 validation images" in page and "Left out" not in page
    assert main(["report", str(run), "--images", "0"]) == 2 and "--images 0" in capsys.readouterr().err


@pytest.mark.long
def test_trials_go_on_where_they_were_stopped_and_close_with_a_table(demo_data, tmp_path, capsys):
    flags = [*TINY, "--max_steps", "2", "--target", "0", "--seed", "4", "--trials", "3"]
    started = start_training(tmp_path, demo_data, flags)
    first, second = (tmp_path / "run" / f"trial-{number}" / "log.txt" for number in (1, 2))
    while started.process.poll() is None and not second.exists():
        time.sleep(0.02)
    started.process.send_signal(signal.SIGINT)
    done = started.wait_done()
    assert done.returncode in (130, 143) and f"--resume {tmp_path / 'run'}\n" in done.stdout, done
    before = first.read_bytes()
    done = start_training(tmp_path, demo_data, ["--resume", str(tmp_path / "run")]).wait_done()
    assert done.returncode == 0, done.stderr
    assert first.read_bytes() == before and f"{first.parent} is done" in done.stdout
    table = (tmp_path / "run" / "trials.txt").read_text()
    assert table in done.stdout and "Olympic mean (MLPerf):" in table
    for number in (1, 2, 3):
        (end,) = records(tmp_path / "run" / f"trial-{number}", "end")
        row = next(line.split() for line in table.splitlines() if f"trial-{number}" in line)
        assert row[:2] == [f"trial-{number}", f"{3 + number}"] and row[2] == f"{end['target_seconds']:,.1f}" and row[-1] == f"{end['AP']:.4f}"
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "3 trials of one configuration" in (tmp_path / "run" / "report.html").read_text()
    flags = ["--incomplete", "--org", "acme", "--system", "box", "--out", str(tmp_path / "results")]
    assert main(["submission", str(tmp_path / "run"), *flags]) == 2 and "the system description lacks" in capsys.readouterr().err


def trial(folder: Path, minutes: float, reached: bool = True, target: float | None = 0.2) -> Run:
    return Run(folder, Config(target=target), {}, "", reached, minutes, 3, False)


def test_the_closing_table_counts_as_mlperf_does(tmp_path):
    runs = [trial(tmp_path / f"trial-{number}", minutes) for number, minutes in enumerate((1.0, 5.0, 2.0, 3.0), 1)]
    text, code = closing(runs)
    assert code == 0 and "150.0 s = 2.500 minutes, trial-1, the fastest, and trial-2, the slowest, dropped" in text
    assert next(line.split() for line in text.splitlines() if "median" in line)[1] == "150.0" and "60.0 … 300.0" in text
    missed = trial(tmp_path / "trial-9", 0.5, reached=False)
    text, code = closing([*runs, missed])
    assert code == 0 and "200.0 s" in text and "the target was not reached by trial-9" in text  # it is the slowest; 2, 3 and 5 minutes are left
    assert closing([*runs, missed, missed])[1] == 1 and closing([missed])[1] == 1 and closing([runs[0], missed])[1] == 1
    assert closing(runs[:2])[1] == 0 and "takes 3 trials or more" in closing(runs[:2])[0]
    other = trial(tmp_path / "trial-8", 1.0, target=0.1)
    assert "none, trial-8 differs from trial-1 in target: 0.2 and 0.1" in closing([*runs, other])[0]
    text, code = closing([trial(tmp_path, 1.0, False, target=None)] * 3)
    assert code == 0 and "no target" in text


def test_trials_stay_trials(tmp_path, capsys):
    keep_config(tmp_path, Resolved(Config(trials=3), {}), "reference")
    assert main(["train", "--resume", str(tmp_path), "--trials", "1"]) == 2
    assert "is a folder of trials and stays so" in capsys.readouterr().err
    assert main(["train", "--trials", "2", "--nodes", "2", "--data_dir", "x"]) == 2
    assert "trials 2 are of one node" in capsys.readouterr().err


def test_a_folder_of_trials_knows_how_many_there_are_to_be(tmp_path):
    three, five = (Resolved(Config(trials=number), {}) for number in (3, 5))
    keep_config(tmp_path, three, "reference")
    keep_config(tmp_path, five, "reference", changed=True)  # as --resume --trials 5 does
    assert read_run(tmp_path / "config.yaml").trials == 5
    for number in (1, 2, 3, 4):
        keep_config(tmp_path / f"trial-{number}", three, "reference")
    keep_config(tmp_path / "stage-1", three, "reference")
    assert [path.name for path in members_of(tmp_path, "trial")] == [f"trial-{number}" for number in (1, 2, 3, 4)]
    with pytest.raises(UserError, match="--trials 3: .* has 4 of them already; --trials 4 or more"):
        trials_of(three, tmp_path)
    assert len(trials_of(five, tmp_path)) == 5


def test_a_last_line_that_was_cut_off_is_no_end(tmp_path):
    line = json.dumps({"kind": "end", "AP": 0.5})
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps({'kind': 'train'})}\n{line}\n")
    assert ended(tmp_path) == {"kind": "end", "AP": 0.5}
    (tmp_path / "metrics.jsonl").write_text(line[:-4])
    assert ended(tmp_path) is None


def test_what_was_not_timed_in_a_part_of_the_run_has_no_rate():
    progress = Progress(step=10, train_seconds=5.0, step_seconds=2.0, timed_steps=10)
    assert whole_run(progress, 40, 10.0, True)["images_per_second_compute"] == 20
    progress.timed_steps = 4
    whole = whole_run(progress, 40, 10.0, True)
    assert whole["images_per_second_compute"] is whole["step_seconds"] is whole["data_seconds"] is None
    assert whole["images_per_second_training"] == 8 and "not measured pure compute" in rows(whole, False)[-1][1]


def test_results_of_a_run_on_two_devices_are_looked_at_on_one(run, tmp_path):
    content = checkpoint.read(checkpoint.found_in(run))
    content["config"] |= {"devices": 2, "device_ids": [1, 0]}
    checkpoint.write(tmp_path / "two.pt", content)
    assert open_checkpoint(tmp_path / "two.pt", "reference", "cpu:0").device == torch.device("cpu:0")

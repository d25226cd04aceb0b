"""What goes wrong around a run: ranks and loaders that die or hang, full and read-only disks, clocks that jump, two writers."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from base import checkpoint
from base.config import Config
from base.errors import LostProcess, UserError
from base.records import Records
from base.run import StopRequest
from base.terminal import Display
from base.tools.launch import check_folder
from base.tools.supervise import STOPPED, supervise, verdict
from tests.conftest import ROOT, losses
from tests.disturbed import final_state, mlperf_events, rank_pids, small_checkpoint, steps_done, wait_for
from tests.soak import soak

SHORT = ["--max_steps", "6", "--target", "null", "--log_every", "1", "--checkpoint_every", "1"]


@pytest.mark.long
def test_twenty_kills_at_twenty_moments(tmp_path):
    assert soak(tmp_path, kills=20, seed=1) >= 4


def waits_for_its_end(code: str, notes: Path, rank: int) -> None:
    """Runs code as a rank that the launcher gave a folder for its notes; it has to end with code 1."""
    environment = {**os.environ, "SSD_NOTES": str(notes), "RANK": str(rank), "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, timeout=60).returncode == 1


def test_a_hang_is_named_even_in_native_code_that_keeps_the_gil(tmp_path):
    waits_for_its_end(
        """
        import ctypes
        from base.watchdog import Watchdog
        def stuck():
            ctypes.PyDLL(None).sleep(60)
        Watchdog(0.5)
        stuck()
        """,
        tmp_path,
        3,
    )
    code, why = verdict(tmp_path, [(3, 1, 100)])
    assert code == 1 and re.match(r"rank 3 on \S+ made no progress for 0:00:00.500000 ", why) and "in stuck" in why


def test_progress_keeps_the_watchdog_quiet():
    code = "import time\nfrom base.watchdog import Watchdog\ndog = Watchdog(1)\nfor _ in range(20): time.sleep(0.1); dog.alive()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def stack(*functions: str) -> str:
    """A faulthandler dump of a rank, innermost function first, with a loader's thread before it."""
    lines = [
        "Timeout (0:30:00)!",
        "Thread 0x7f1 (most recent call first):",
        '  File "x.py", line 1 in read',
        "",
        "Thread 0x7f2 (most recent call first):",
    ]
    places = (function.split(":") for function in functions)
    return "\n".join([*lines, *(f'  File "{ROOT}/base/{file}.py", line 1 in {name}' for file, name in places)])


@pytest.mark.parametrize(
    ("stacks", "failures", "code", "said"),
    [
        ({0: stack("distributed:sums", "train:exchange"), 1: stack("train:next_batch")}, [(0, 1, 5)], 1, "rank 1 .*next batch.*rank 0"),
        ({0: stack("x:all_reduce", "train:train_epoch"), 1: stack("train:train_epoch")}, [(0, 1, 5)], 1, "rank 1 .*while in a training step.*rank 0"),
        ({0: stack("reach:lost", "train:main"), 1: stack("train:next_batch")}, [(0, 1, 5)], 1, "rank 1 .*next batch.*rank 0"),
        ({0: stack("distributed:gathered")}, [(0, 1, 5), (1, -9, 35)], 1, "rank 0 .*waiting for the other ranks; rank 1 did not answer"),
        ({}, [(0, 1, 5), (1, -9, 5)], 137, "rank 1 .*signal 9"),
        ({}, [(0, -15, 5), (1, -9, 5)], 137, "rank 1 .*signal 9"),
        ({}, [(0, 1, 5), (1, -9, 35)], 1, "rank 0 .*exit code 1"),  # the second by torchrun
        ({}, [(0, 143, 5)], STOPPED[0], "rank 0"),
        ({}, [(0, 1, 5), (1, 2, 6)], 2, "rank 1 .*error"),  # its note found no room
    ],
)
def test_the_rank_that_is_the_cause_is_named(tmp_path, stacks, failures, code, said):
    for rank, text in stacks.items():
        (tmp_path / f"{rank}.stack").write_text(text)
    got, why = verdict(tmp_path, failures)
    assert got == code and re.match(said, why.replace("\n", " "))


RANK = """
import os, sys
from base.watchdog import note_error
code = int(sys.argv[1])
if code < 0:
    os.kill(os.getpid(), -code)
if code in (2, 75):
    note_error(code, f"a reason for {code}")
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("codes", "restarts", "ends", "said"),
    [
        ([-9, 75, 1, 0], 3, 0, ["signal 9; starting again", "a reason for 75; starting again", "exit code 1; starting again"]),
        ([-9, -9], 1, 137, ["signal 9; starting again", "error: rank 0 on .* signal 9; go on with: .*--resume"]),
        ([1, 2], 5, 2, ["exit code 1; starting again", "error: a reason for 2"]),
        ([143], 5, 143, []),
        ([75], 0, 75, ["error: a reason for 75; go on with"]),
    ],
)
def test_what_is_started_again_and_how_often(tmp_path, capfd, codes, restarts, ends, said):
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "log.txt").touch()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in numbers]
    environment = dict(os.environ)
    starts = []

    def command(attempt: int) -> list[str]:
        starts.append(attempt)
        return ["--standalone", "--nproc-per-node", "1", str(tmp_path / "rank.py"), str(codes[attempt])]

    try:
        assert supervise(command, Config(max_restarts=restarts), tmp_path) == ends
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert starts == list(range(len(codes)))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == len(said) and all(re.search(text, line) for text, line in zip(said, lines, strict=True))
    assert "Traceback" not in capfd.readouterr().err


HANGS = """
import os, time
from pathlib import Path
from base.backend import Backend
from base.backends.reference.loss import multibox_loss

def hangs_once(predictions, targets):
    here = Path(__file__).parent / "has_hung"
    hangs_once.calls = getattr(hangs_once, "calls", 0) + 1
    if os.environ.get("RANK") == "1" and hangs_once.calls == 3 and not here.exists():
        here.touch()
        time.sleep(600)
    return multibox_loss(predictions, targets)

BACKEND = Backend(name="hangs", loss=hangs_once)
"""


@pytest.mark.long
def test_a_rank_that_hangs_is_ended_and_the_run_goes_on(train, tmp_path):
    folder = tmp_path / "backends" / "hangs"
    folder.mkdir(parents=True)
    (folder / "backend.py").write_text(HANGS)
    two = ["--name", "hangs", "--nproc", "2", "--batch_size", "4", "--timeout", "30", "--max-restarts", "1"]
    done = train(*SHORT, *two, env={"SSD_BACKEND_PATH": str(folder.parent)})
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"rank 1 on \S+ made no progress for 0:00:30 .--timeout. while in a training step", said) and "in hangs_once" in said
    assert "starting again from the latest checkpoint" in said and "resumed from step-000000002.pt" in said
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_a_loader_process_that_is_killed_is_named_and_the_run_goes_on(train, tmp_path):
    process = train(*SHORT, "--workers", "1", "--max-restarts", "1", wait=False)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, process)
    (worker,) = rank_pids(rank_pids(process.pid)[0])
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "a loader process ended unexpectedly" in err and f"pid {worker}" in err.replace("pid(s)", "pid") and "starting again" in err
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


JUMPS = """
import random, time
now, draw = time.time, random.Random()
time.time = lambda: now() + draw.uniform(-36000, 36000)
"""


@pytest.mark.long
def test_clocks_that_jump_by_hours(train, tmp_path):
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(JUMPS)
    assert train(*SHORT, run="whole").returncode == 0
    began = time.monotonic()
    process = train(*SHORT, "--max-restarts", "1", wait=False, env={"PYTHONPATH": str(tmp_path / "clock")})
    wait_for(lambda: steps_done(tmp_path / "run") >= 3, process)
    for path in checkpoint.listed(tmp_path / "run"):
        os.utime(path, (0, 0) if path == checkpoint.listed(tmp_path / "run")[0] else None)
    os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    took = time.monotonic() - began
    ours, theirs = final_state(tmp_path / "run"), final_state(tmp_path / "whole")
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and 0 < ours["progress"]["train_seconds"] <= ours["progress"]["seconds"] < took
    stamps = [event["time_ms"] for event in mlperf_events(tmp_path / "run")]
    assert stamps == sorted(stamps)


@pytest.fixture
def disk(tmp_path):
    """disk("size=1m", …) mounts a small file system, or mounts it again with other options → its folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", "remount," + options] if os.path.ismount(place) else ["-o", options]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine lets nobody mount a small file system here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.long
def test_a_disk_that_fills_up_while_saving(train, tmp_path, disk):
    place = disk("size=150m")  # a checkpoint of this model takes 59 MB: the third finds no room
    flags = [*SHORT, "--keep_checkpoints", "9", "--runs_dir", str(place), "--max-restarts", "2"]
    done = train(*flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert re.search(r"checkpoint .*step-000000003.pt could not be written \(No space left on device\); \d+ MiB are free", done.stderr)
    run = place / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000001.pt", "step-000000002.pt"]
    assert all(checkpoint.read(path) for path in checkpoint.listed(run)) and "No space left" in (run / "log.txt").read_text()
    disk("size=2g")
    done = train("--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_records_on_a_full_disk_end_the_run_and_can_be_gone_on_with(disk):
    run = disk("size=64k") / "run"
    records = Records(run, Display(silent=True))
    records.metric("train", step=1)
    records.mlperf.init_start("a CPU", cache_cleared=False)
    sizes = records.sizes()
    with pytest.raises(OSError, match="No space"), open(run / "filler", "wb") as filler:
        filler.write(bytes(1 << 20))
    for number in range(2000):
        records.mlperf.epoch_start(number)
        records.log("a line")
    with pytest.raises(UserError, match=r"run/\S+ cannot be written \(No space left on device\).*--resume"):
        records.check()
    broken = {name: (run / name).read_bytes() for name in sizes}
    records.metric("train", step=2)  # nothing comes after a line that is missing
    records.close()
    assert {name: (run / name).read_bytes() for name in sizes} == broken
    (run / "filler").unlink()
    again = Records(run, Display(silent=True))
    again.cut_back(sizes)
    again.metric("train", step=2)
    again.check()
    assert [line.partition('"step"')[2] for line in (run / "metrics.jsonl").read_text().splitlines()] == [": 1}", ": 2}"]
    again.close()


def test_a_folder_that_is_read_only_is_an_error_before_anything_starts(disk):
    run = disk("size=4m") / "run"
    path = small_checkpoint(run)
    before = path.read_bytes()
    disk("ro")
    for folder in (run, run.parent / "another" / "run"):
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\).*--runs_dir"):
            check_folder(folder)
    with pytest.raises(UserError, match="could not be written"):  # it has become read-only during the run
        checkpoint.write(path, {"format": checkpoint.FORMAT})
    with pytest.raises(UserError, match="cannot be removed"):
        checkpoint.prune(run, 0)
    assert path.read_bytes() == before


def test_a_run_folder_has_one_writer(tmp_path):
    first = Records(tmp_path, Display(silent=True))
    code = "import sys\nfrom pathlib import Path\nfrom base.records import Records\nfrom base.terminal import Display\n"
    code += "Records(Path(sys.argv[1]), Display(silent=True), patience=0.3)"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert "UserError: run folder" in other.stderr and "is still written by another process" in other.stderr
    first.close()
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode == 0, other.stderr


def test_a_rank_whose_launcher_has_gone_before_it_looked_stops(monkeypatch):
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        monkeypatch.setenv("SSD_LAUNCHER", str(os.getppid()))
        assert not StopRequest()()
        monkeypatch.setenv("SSD_LAUNCHER", str(os.getpid()))
        assert StopRequest()()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def test_what_may_pass_is_told_from_what_a_person_must_put_right(tmp_path):
    failures = [(0, 75, 5), (1, 1, 5)]
    (tmp_path / "0.error").write_text(f'[{LostProcess.code}, "a loader process ended"]')
    assert verdict(tmp_path, failures) == (LostProcess.code, "a loader process ended")
    (tmp_path / "1.error").write_text(f'[{UserError.code}, "the data set is bad"]')
    assert verdict(tmp_path, failures) == (UserError.code, "the data set is bad")

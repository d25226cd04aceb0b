"""Power, memory, utilisation and clock: summed up by phase, recorded, and never a run's end."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from base import clock
from base.backend import Backend
from base.checkpoint import Progress
from base.config import Config
from base.distributed import Ranks, check_cards
from base.errors import UserError
from base.records import Records, summary
from base.telemetry import Reading, Sampler, record, whole_run
from base.terminal import Display
from base.tools.launch import check_sensor
from tests.conftest import losses

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


class Recorded:
    """A sensor that plays back what it is given, the last for ever; an exception is raised. ``faults`` are raised first, one an opening."""

    def __init__(self, *readings: Reading | Exception, faults: Sequence[Exception] = ()):
        self.readings, self.faults, self.missing, self.threads, self.opened = list(readings), list(faults), "", [], 0

    def __call__(self, device: torch.device, local_rank: int) -> "Recorded":
        self.threads.append(threading.current_thread())
        self.opened += 1
        if self.faults:
            raise self.faults.pop(0)
        return self

    def read(self) -> Reading:
        self.threads.append(threading.current_thread())
        now = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(now, Exception):
            raise now
        return now


class Metered:
    """A sensor whose counter rises by ``watts`` a second, or that tells the power itself."""

    missing = ""

    def __init__(self, watts: float, counts: bool):
        self.watts, self.counts, self.start = watts, counts, time.monotonic()

    def __call__(self, device: torch.device, local_rank: int) -> "Metered":
        return self

    def read(self) -> Reading:
        joules = self.watts * (time.monotonic() - self.start)
        return Reading(memory_bytes=7, joules=joules) if self.counts else Reading(memory_bytes=7, power_watts=self.watts)


@pytest.fixture
def records(tmp_path):
    made = Records(tmp_path / "run", Display(silent=True))
    yield made
    made.close()


def lines(folder: Path) -> list[dict]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["kind"] == "telemetry"]


def finished(sensor, *phases: tuple[str, float], seconds: float = 0.01) -> Sampler:
    """A sampler that has been through the phases, each with its seconds, and has ended."""
    sampler = Sampler(sensor, seconds, CPU, 0)
    for phase, lasting in phases:
        sampler.switch(phase)
        time.sleep(lasting)
    sampler.close()
    return sampler


@pytest.mark.parametrize("counts", [True, False], ids=["energy counter", "power"])
def test_energy_goes_to_the_phase_in_which_it_was_drawn(records, counts):
    sampler, progress = finished(Metered(50.0, counts), ("training", 0.5), ("evaluation", 0.25), ("training", 0.25)), Progress()
    record(sampler, ALONE, records, progress)
    by_phase = {line["phase"]: line for line in lines(records.folder)}
    assert by_phase["training"]["power_watts"] == pytest.approx(50, rel=0.01) == by_phase["evaluation"]["power_watts"]
    assert by_phase["training"]["joules"] == progress.joules == pytest.approx(50 * progress.joules_seconds, rel=0.01)
    assert 0.5 < progress.joules_seconds / 0.75 < 3 and 0.5 < by_phase["evaluation"]["joules"] / 12.5 < 4  # as exact as a busy machine sleeps
    assert by_phase["training"]["memory_bytes"] == 7 and by_phase["training"]["utilisation"] is None
    record(sampler, ALONE, records, progress)
    assert len(lines(records.folder)) == len(by_phase)  # nothing is told twice


def test_power_between_two_readings_is_their_mean():
    sampler = Sampler(None, 1.0, CPU, 0)
    sampler._add(Reading(power_watts=10, clock_hz=1e9, utilisation=0.5))
    assert "watts" not in sampler.sums["set-up"]  # one reading alone says nothing of the time before it
    sampler.spent, sampler.since = type(sampler.spent)({"training": 3.0, "evaluation": 1.0}), time.monotonic()
    sampler._add(Reading(power_watts=30, clock_hz=2e9, utilisation=1.0))
    assert sampler.sums["training"]["watts"] == pytest.approx(60, rel=1e-3) and sampler.sums["training"]["s watts"] == pytest.approx(3, rel=1e-3)
    assert sampler.sums["evaluation"]["watts"] == pytest.approx(20, rel=1e-3)
    assert sampler.sums["training"]["clock_hz"] == pytest.approx(6e9, rel=1e-3)
    sampler.spent, sampler.since = type(sampler.spent)({"training": 2.0}), time.monotonic()
    sampler._add(Reading())  # the power is not known at the end of this stretch
    assert sampler.sums["training"]["s watts"] == pytest.approx(3, rel=1e-3)


class Gathering:
    """Ranks as `record` sees them, with what the others sent."""

    def __init__(self, *others):
        self.others = others

    def gathered(self, value):
        return [value, *self.others]


def test_devices_are_summed_and_the_rest_is_their_mean(records):
    own = Sampler(Recorded(Reading()), 60, CPU, 0)
    own.close()
    own.sums = {"training": own.spent.__class__({"watts": 1000.0, "s watts": 10.0, "clock_hz": 1e10, "s clock_hz": 10.0, "memory_bytes": 5})}
    other = {"training": own.spent.__class__({"watts": 2000.0, "s watts": 10.0, "utilisation": 9.0, "s utilisation": 10.0, "memory_bytes": 9})}
    silent = {"training": own.spent.__class__({"memory_bytes": 1})}  # the second rank of a host, whose first tells the power
    progress = Progress(step=640, train_seconds=10.5)
    record(own, Gathering((other, "", True), (silent, "", False)), records, progress)
    (line,) = lines(records.folder)
    assert (line["power_watts"], line["joules"], line["memory_bytes"], line["step"]) == (300, 3000, 9, 640)
    assert (line["clock_hz"], line["utilisation"]) == (1e9, 0.9)
    found = whole_run(progress, images=6300)
    assert found == {"memory_bytes": 9, "power_watts": 300, "joules": pytest.approx(3150), "images_per_joule": pytest.approx(2)}
    table = summary(Config(), progress, 100, Path("runs/x"), False, "acme", found | clock.whole_run(progress, 6300, 12.0, False), "")
    assert "energy  3,150 J in training (300.0 W), 2 images/J" in table and "memory  0.00 GiB at most" in table


def test_without_a_whole_measure_no_energy_is_stated(records):
    progress = Progress(joules=100.0, joules_seconds=5.0, train_seconds=10.0)
    found = whole_run(progress, 1000)
    assert found["joules"] is found["images_per_joule"] is None
    said = summary(Config(), progress, 100, Path("runs/x"), False, "acme", found | clock.whole_run(progress, 1000, None, False), "")
    assert "energy  not measured (power was known for too little of the training)" in said
    assert "memory  not measured (no sensor told it)" in said
    assert whole_run(Progress(), 0)["joules"] is None


def test_a_rank_whose_power_is_not_known_counts_as_time_not_covered(records):
    own = Sampler(Recorded(Reading()), 60, CPU, 0)
    own.close()
    for other in ({}, {"training": own.spent.__class__({"memory_bytes": 1})}):  # its reading hangs, or has no power
        own.sums, own.tells = {"training": own.spent.__class__({"watts": 1000.0, "s watts": 10.0, "memory_bytes": 5})}, True
        progress = Progress(train_seconds=10.0)
        record(own, Gathering((other, "", True)), records, progress)
        assert progress.joules_seconds == 5 and whole_run(progress, 1)["joules"] is None


def test_a_sensor_that_stops_is_recorded_once_and_ends_nothing(records):
    watts = Reading(power_watts=5.0)
    sampler, progress = finished(Recorded(watts, watts, OSError("the card fell out")), ("training", 0.3)), Progress(train_seconds=0.3)
    for _ in range(3):
        record(sampler, ALONE, records, progress)
        sampler.missing += " again"  # other words each time
    assert not sampler.thread.is_alive() and sampler.make.opened > 2  # it was tried again
    told = (records.folder / "log.txt").read_text().splitlines()
    assert len(told) == 1 and told[0].endswith("power is not always known; rank 0: its sensor does not work: the card fell out")
    whole = whole_run(progress, 1) | clock.whole_run(progress, 1, None, False)
    said = summary(Config(), progress, 9, Path("x"), False, "acme", whole, sampler.missing)
    assert said.count("not measured (rank 0: its sensor does not work: the card fell out)") == 2  # memory and energy


@pytest.mark.parametrize("fault", ["opening", "reading"])
def test_energy_counts_again_when_a_sensor_works_again(records, fault):
    watts, broken = Reading(power_watts=5.0), [TimeoutError("no answer")] * 3
    sensor = Recorded(watts, faults=broken) if fault == "opening" else Recorded(*[watts] * 3, *broken, watts)
    sampler, progress = finished(sensor, ("training", 0.6)), Progress()
    record(sampler, ALONE, records, progress)
    assert sensor.opened == 4 and progress.joules == pytest.approx(5 * progress.joules_seconds) and 0 < progress.joules_seconds < 0.6
    assert sampler.missing == "its sensor does not work: no answer" and "no answer" in (records.folder / "log.txt").read_text()


def test_a_gap_is_not_power():
    sampler = Sampler(Recorded(Reading(joules=0.0), OSError("asleep"), Reading(joules=1e6)), 0.05, CPU, 0)
    time.sleep(0.5)
    sampler.close()
    assert sampler.sums["set-up"]["watts"] == 0 < sampler.sums["set-up"]["s watts"]  # the counter rose while nobody looked


def test_a_reading_that_hangs_does_not_hold_up_the_run():
    entered, leave = threading.Event(), threading.Event()

    class Hanging:
        missing = ""

        def read(self) -> Reading:
            entered.set()
            leave.wait(30)
            return Reading()

    sampler = Sampler(lambda device, local_rank: Hanging(), 0.01, CPU, 0)
    assert entered.wait(10)
    began = time.monotonic()
    sampler.switch("training")
    assert time.monotonic() - began < 5  # the lock is not held while a sensor reads
    sampler.close(0.1)
    assert sampler.thread.is_alive() and sampler.thread.daemon and not leave.is_set()  # left behind, and the interpreter does not wait for it
    leave.set()
    sampler.thread.join(10)
    assert not sampler.thread.is_alive()


def test_only_what_a_user_can_put_right_keeps_a_run_from_starting():
    with pytest.raises(UserError, match="install it"):
        check_sensor(Recorded(Reading(), faults=[UserError("install it")]), "cpu")
    check_sensor(broken := Recorded(Reading(), faults=[RuntimeError("driver asleep")]), "cpu")
    assert broken.opened == 1


def test_no_sensor_no_thread_and_the_reason(records):
    off, none = Sampler(Recorded(Reading()), 0, CPU, 0), Sampler(None, 1.0, CPU, 0)
    assert (off.missing, none.missing) == ("telemetry_seconds is 0", "the backend has no sensor")
    for sampler in (off, none):
        assert sampler.switch("training") == "set-up" and not sampler.thread.is_alive()
        record(sampler, ALONE, records, Progress())
        sampler.close()
    assert not lines(records.folder)


def test_opening_and_every_reading_are_in_the_thread():
    sensor = Recorded(Reading())
    sampler = finished(sensor, ("training", 0.1))
    assert sensor.opened == 1 and len(sensor.threads) > 2 and set(sensor.threads) == {sampler.thread}


def test_sensors_and_cards_come_from_the_backend_that_is_extended_if_the_device_is_the_same(tmp_path, monkeypatch):
    from base import backends
    from base.backend import load_backend

    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    for name, more in {
        "parent": "device='cuda', cards='Acme', telemetry=print",
        "same": "device='cuda', extends='parent'",
        "other": "extends='parent'",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "backend.py").write_text(f"from base.backend import Backend\nBACKEND = Backend(name={name!r}, {more})\n")
    assert [(load_backend(n).cards, load_backend(n).telemetry) for n in ("parent", "same", "other")] == [
        ("Acme", print),
        ("Acme", print),
        (None, None),
    ]
    assert Backend(name="x").telemetry is None and load_backend("reference").telemetry is None


def test_cards_of_another_vendor_are_refused():
    check_cards(Backend(name="acme", cards=r"Acme|A\d+\b"), ["Acme One", "A100-SXM4-40GB"])
    check_cards(Backend(name="acme"), ["whatever"])
    check_cards(Backend(name="acme", cards="Acme"), [])
    with pytest.raises(UserError, match=r"backend acme is for devices whose names begin with Acme, and this machine has 'Bolt 2'; --list"):
        check_cards(Backend(name="acme", cards="Acme"), ["Acme One", "Bolt 2"])


# Whole runs, with a backend that reads a file instead of a device

BACKEND = """
import os
from pathlib import Path
from base.backend import Backend
from base.errors import UserError
from base.telemetry import Reading

class Sensor:
    missing = ""

    def __init__(self, device, local_rank):
        self.file, self.rank = Path(os.environ["METER"]), local_rank
        if self.file.is_dir():
            raise UserError("reading a meter needs the package meters: pip install meters")
        self.file.open().close()

    def read(self):
        return Reading(memory_bytes=2**30 * (1 + self.rank), power_watts=float(self.file.read_text()), utilisation=0.5)

BACKEND = Backend(name="metered", device="cpu", telemetry=Sensor)
"""
FLAGS = ("--name", "metered", "--epochs", "1", "--target", "null", "--log_every", "1", "--learning_rate", "0.01")


@pytest.fixture
def metered(tmp_path):
    """Environment variables with which the backend `metered` is found."""
    (tmp_path / "strangers" / "metered").mkdir(parents=True)
    (tmp_path / "strangers" / "metered" / "backend.py").write_text(BACKEND)
    (tmp_path / "meter").write_text("100")
    return {"SSD_BACKEND_PATH": str(tmp_path / "strangers"), "METER": str(tmp_path / "meter")}


def test_a_run_records_what_two_ranks_draw(train, tmp_path, metered):
    done = train(*FLAGS, "--nproc", "2", "--batch_size", "4", "--telemetry_seconds", "0.05", env=metered)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["power_watts"] == pytest.approx(200) and end["memory_bytes"] == 2**31
    assert end["images_per_joule"] == pytest.approx(end["images_per_second_training"] / 200, rel=0.02)
    assert {"training", "evaluation", "checkpoint"} <= {line["phase"] for line in lines(run)}
    assert [line["utilisation"] for line in lines(run)] == pytest.approx([0.5] * len(lines(run)))
    assert "(200.0 W)" in done.stdout and "memory  2.00 GiB at most" in done.stdout


def test_a_run_goes_on_without_its_sensor_and_trains_the_same(train, tmp_path, metered):
    assert train(*FLAGS, "--telemetry_seconds", "0", run="none", env=metered).returncode == 0
    (tmp_path / "meter").unlink()
    done = train(*FLAGS, "--telemetry_seconds", "0.05", env=metered)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("power is not always known") == 1 and "energy  not measured (rank 0: its sensor does not work" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "none")


def test_a_package_that_is_missing_is_said_once_before_any_rank_starts(train, tmp_path, metered):
    (tmp_path / "meter").unlink()
    (tmp_path / "meter").mkdir()
    done = train(*FLAGS, "--nproc", "2", "--batch_size", "4", env=metered)
    assert (done.returncode, done.stderr) == (2, "error: reading a meter needs the package meters: pip install meters\n")
    assert not (tmp_path / "run").exists()
    done = train(*FLAGS, "--telemetry_seconds", "0", "--dry_run", env=metered)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_keeps_what_was_drawn_before(train, tmp_path, metered):
    assert train(*FLAGS, "--telemetry_seconds", "0.05", env=metered).returncode == 0
    before = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    (tmp_path / "meter").write_text("300")
    done = train("--resume", str(tmp_path / "run"), "--epochs", "3", env=metered)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert before["power_watts"] == pytest.approx(100) and 100 < after["power_watts"] < 300 and after["joules"] > 2 * before["joules"]

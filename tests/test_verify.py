"""`python -m base verify`: what is right passes; each backend of tests/mutants fails where it is wrong, and no component for another's fault."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import base.backends
from base.__main__ import main
from base.backend import SLOTS, load_backend
from conformance import whole
from conformance.verify import CHECKS, Kit, rows_of
from tests.conftest import DEVICE, ROOT

MUTANTS = Path(__file__).parent / "mutants"
LONG = {"early_buckets", "uncompressed"}  # found by the last checks of a step
NAMES = sorted(file.parent.name for file in MUTANTS.glob("*/backend.py"))
WRONG = {"loader": "bgr", "model": "shifted_level", "matcher": "earlier_box_wins", "loss": "loss_of_the_batch", "step": "late_rate"}
WRONG |= {"optimizer": "bias_without_decay", "decoder": "nms_across_classes", "evaluator": "sides_swapped"}


def slots(*long: str, of: tuple = SLOTS) -> list:
    """Parameters of a test, some of which take long."""
    return [pytest.param(slot, marks=pytest.mark.long) if slot in long else slot for slot in of]


@pytest.fixture
def places(monkeypatch):
    """places(folder) has backends found in a folder too, here and in processes that are started."""

    def add(folder: Path) -> None:
        monkeypatch.setenv("SSD_BACKEND_PATH", str(folder))
        monkeypatch.setattr(base.backends, "__path__", [str(ROOT), str(folder)])

    return add


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One folder for all kits, so that pictures are drawn once."""
    return tmp_path_factory.mktemp("verify")


def kit_of(name: str, scratch: Path, use: dict | None = None) -> Kit:
    return Kit(load_backend(name, use), load_backend("reference"), DEVICE, 3, scratch, use or {})


def not_passed(kit: Kit, slot: str) -> list:
    return [row for row in rows_of(kit, slot) if row.passed is False]


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "base", "verify", *arguments], capture_output=True, text=True, env=environment, timeout=1500)


@pytest.mark.parametrize("name", slots(*LONG, of=NAMES))
def test_a_mutant_fails_where_it_is_wrong(name, places, scratch):
    places(MUTANTS)
    kit = kit_of(name, scratch)
    own = [slot for slot in SLOTS if kit.backend.suppliers[slot] == name]
    for slot in own:
        failed = next((row for row in rows_of(kit, slot) if row.passed is False), None)
        assert failed and (failed.component, failed.supplied_by) == (slot, name)
        assert failed.error > failed.tolerance and not failed.note  # found by its figures, not by an exception


@pytest.mark.parametrize("slot", slots("step", "run", of=(*SLOTS, "run")))
def test_every_backend_passes(backend, slot, tmp_path):
    """Each component of every backend, and a run with all of them."""
    assert not_passed(kit_of(backend.name, tmp_path), slot) == []


@pytest.mark.parametrize("slot", slots("model", "step"))
def test_a_right_component_passes_among_wrong_ones(slot, places, scratch):
    places(MUTANTS)
    kit = kit_of("reference", scratch, WRONG | {slot: "reference"})
    assert len(set(kit.backend.suppliers.values())) >= len(WRONG) and not_passed(kit, slot) == []


@pytest.mark.long
def test_steps_that_a_loss_scale_skips_are_no_failure(tmp_path, places):
    (tmp_path / "scaled").mkdir()
    text = "from base.backend import Backend\nfrom tests.loss_scale import ScaledStep\nclass Own(ScaledStep): ...\n"
    (tmp_path / "scaled" / "backend.py").write_text(text + "BACKEND = Backend(name='scaled', step=Own)\n")
    places(tmp_path)
    kit = kit_of("scaled", tmp_path)
    assert not_passed(kit, "step") == [] and all(error <= tolerance for _, error, tolerance in whole.thirty_steps(kit))


def test_a_run_finds_a_backend_through_a_relative_path(tmp_path, places, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", "zeta", "--dir", "place", "--device", "cpu"]) == 0
    places(tmp_path / "place")
    monkeypatch.setenv("SSD_BACKEND_PATH", "place")
    found = list(whole.records_of_a_run(kit_of("zeta", tmp_path)))
    assert found and all(error <= tolerance for _, error, tolerance in found)


def test_what_is_not_checked_is_said(tmp_path, places, capsys):
    """A loader with a state need not be a function of seed, epoch and image id."""
    (tmp_path / "kept").mkdir()
    text = "from base.backends.reference.loader import train_loader\nfrom base.backend import Backend\ndef make(**options):\n"
    text += "    loader = train_loader(**options)\n    loader.state_dict = dict\n    return loader\n"
    (tmp_path / "kept" / "backend.py").write_text(text + "BACKEND = Backend(name='kept', train_loader=make)\n")
    places(tmp_path)
    assert main(["verify", "--name", "kept", "--only", "train_loader", "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert [row["passed"] for row in content["rows"]].count(None) == 1 and content["passed"]
    said = capsys.readouterr().out
    assert re.search(r"not checked: the loader keeps a state", said)
    assert f"\n{len(content['rows']) - 1} checks of 1 part: all passed, 1 not checked; " in said


@pytest.mark.long
def test_the_command_passes_a_whole_backend(tmp_path):
    done = command("--name", "cpu", "--seed", "11", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["passed"] and content["seed"] == 11 and {row["component"] for row in content["rows"]} == {*SLOTS, "run"}
    assert all((value is not None) == (part != "run") for part, value in content["speeds"].items())
    assert not re.search(r"\bFAIL", done.stdout)


def test_the_report_of_a_failure(tmp_path, places):
    """Exit code 1; the table, JSON and Markdown say the same; what was not asked for is not checked."""
    done = command("--name", "nms_across_classes", "--only", "decoder", "matcher", "--out", str(tmp_path / "out"), SSD_BACKEND_PATH=str(MUTANTS))
    assert done.returncode == 1, done.stderr
    content = json.loads((tmp_path / "out" / "verify.json").read_text())
    failed = [row for row in content["rows"] if not row["passed"]]
    assert {row["component"] for row in failed} == {"decoder"} and {row["component"] for row in content["rows"]} == {"decoder", "matcher"}
    assert failed[0]["error"] == "inf" and failed[0]["tolerance"] == 1e-4 and not content["passed"]
    assert content["speeds"]["decoder"] > 0 and content["speeds"]["matcher"] is None
    seed = re.search(r"--seed (\d+) repeats", done.stdout)[1]
    assert content["seed"] == int(seed) and f"{len(failed)} FAILED" in done.stdout
    text = (tmp_path / "out" / "verify.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(content["rows"]) and {line.count("|") for line in lines} == {8}
    assert text.count("FAIL |") == len(failed) and f"--seed {seed}" in text
    assert "decoder: checking" in done.stderr and "\x1b" not in done.stderr


def test_what_a_component_raises_is_its_failure_and_the_rest_runs(tmp_path, places):
    (tmp_path / "raising").mkdir()
    text = "from base.backend import Backend\ndef match(boxes, labels, default_boxes): raise KeyError('of\\nno use')\n"
    (tmp_path / "raising" / "backend.py").write_text(text + "BACKEND = Backend(name='raising', matcher=match)\n")
    places(tmp_path)
    rows = list(rows_of(kit_of("raising", tmp_path), "matcher"))
    assert [row.check for row in rows] == [check.__name__.replace("_", " ") for check in CHECKS["matcher"]]
    assert all(not row.passed and row.error is None and row.note == r"KeyError: 'of\nno use' (backend.py:2)" for row in rows)
    assert main(["verify", "--name", "raising", "--only", "matcher", "loss", "--out", str(tmp_path / "out")]) == 1
    content = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert [row["passed"] for row in content["rows"] if row["component"] == "loss"].count(False) == 0
    assert content["speeds"] == {"matcher": None, "loss": None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "cpus"], r"no backend is called 'cpus'; did you mean cpu\?"),
        (["--only", "decodr"], r"--only 'decodr' is no component; did you mean decoder"),
        (["--use", "loss"], r"--use 'loss' is not COMPONENT=BACKEND"),
        (["--use", "los=reference"], r"no component is called 'los'; did you mean loss\?"),
        (["--device", "abacus"], r"'abacus' is not a device type"),
        (["--seed", "-1"], r"--seed -1 is not between 0 and"),
        (["--only", "loss", "--out", "/dev/null/x"], r"--out /dev/null/x cannot be written \(.+\); name another folder"),
    ],
)
def test_wrong_calls_end_with_2_and_say_what_is_wrong(arguments, said, capsys):
    assert main(["verify", "--name", "reference", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("dtypes", ["('float8',)", "'float32'", "()"])
def test_dtypes_that_are_none_are_refused(dtypes, tmp_path, places, capsys):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "backend.py").write_text(f"from base.backend import Backend\nBACKEND = Backend(name='odd', dtypes={dtypes})\n")
    places(tmp_path)
    assert main(["verify", "--name", "odd"]) == 2
    assert re.search(r"odd/backend.py:\d+: dtypes=.* must be a tuple of some of float32, bfloat16, float16", capsys.readouterr().err)

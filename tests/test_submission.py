"""`python -m base submission`: folders from a real run's log and others derived from it, held to MLPerf's own checkers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from base.__main__ import main
from base.config import read_run
from base.records import commit
from submission.implementation import write_code
from submission.package import with_identity
from submission.runs import read
from submission.system import told
from tests.conftest import ROOT, start_training

HARDWARE = {
    **dict.fromkeys(("host_processor_frequency", "host_processor_caches", "host_processor_interconnect", "host_memory_configuration"), ""),
    "host_processors_per_node": 2, "host_processor_core_count": 26, "host_storage_type": "SSD", "host_storage_capacity": "2 TB",
    "host_networking": "none", "host_networking_topology": "N/A", "cooling": "air",
}  # fmt: skip
MINUTES = (12.0, 10.0, 11.0, 14.0, 11.5)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory, demo_data) -> Path:
    """A finished run of two steps, of the recipe's form that the closed division wants."""
    folder = tmp_path_factory.mktemp("pattern")
    flags = ["--max_steps", "2", "--target", "0", "--decay_epochs", "40", "50", "--warmup_steps", "1", "--workers", "0"]
    done = start_training(folder, demo_data, flags).wait_done()
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "run" / "checkpoints")
    return folder / "run"


@pytest.fixture
def derived(pattern, tmp_path):
    """derived("a", seed=2, …) → a copy of the run with another seed, time, evaluation and batch."""

    def make(name: str, seed: int, minutes: float = 10.0, ap: float = 0.24, epoch: int = 50, batch: int = 1024, status="success", **keys) -> Path:
        run = shutil.copytree(pattern, tmp_path / name)
        config = {**yaml.safe_load((run / "config.yaml").read_text()), "seed": seed, "batch_size": batch, "target": 0.23, **keys}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [json.loads(line.partition(" ")[2]) for line in (run / "mlperf.log").read_text().splitlines()]
        start = next(line["time_ms"] for line in lines if line["key"] == "run_start")
        own = {"seed": seed, "global_batch_size": batch, "eval_accuracy": ap, "cache_clear": True}
        own["opt_learning_rate_decay_boundary_epochs"] = config["decay_epochs"]
        for line in lines:
            line["value"] = own.get(line["key"], line["value"])
            if line["key"].startswith("eval"):
                line["metadata"]["epoch_num"] = epoch
            if line["key"] == "run_stop":
                line["time_ms"], line["metadata"]["status"] = start + round(minutes * 6e4), status
        (run / "mlperf.log").write_text("".join(f":::MLLOG {json.dumps(line)}\n" for line in lines))
        return run

    return make


@pytest.fixture
def five(derived):
    """Five runs as MLPerf wants them; keys go to each."""
    return lambda **keys: [derived(f"run{place}", place + 1, minutes, **keys) for place, minutes in enumerate(MINUTES)]


@pytest.fixture
def submit(tmp_path, capsys):
    """submit(runs, "--flag", …) → exit code and what was printed; the folder is tmp_path/"out"/"acme"."""
    (tmp_path / "hardware.json").write_text(json.dumps(HARDWARE))
    usual = ["--org", "acme", "--system", "box1", "--status", "onprem", "--system-description", str(tmp_path / "hardware.json")]

    def call(runs, *flags: str, division: str = "closed") -> tuple[int, str]:
        code = main(["submission", *map(str, runs), *usual, "--division", division, "--out", str(tmp_path / "out"), *flags])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def values(log: Path, *keys: str) -> list:
    events = [json.loads(line.partition(" ")[2]) for line in log.read_text().splitlines()]
    return [event["value"] for key in keys for event in events if event["key"] == key]


def test_five_runs_make_a_folder_that_passes(five, submit, tmp_path):
    runs = five()
    code, said = submit(runs)
    assert code == 0, said
    org = tmp_path / "out" / "acme"
    files = {str(path.relative_to(org)) for path in org.rglob("*") if path.is_file()}
    instructions = {"README.md", "setup.sh", "init_datasets.sh", "run_and_time.sh", "box1_reference.json"}
    wanted = {"systems/box1.json", *(f"results/box1/ssd/result_{place}.txt" for place in range(5))}
    wanted |= {f"benchmarks/ssd/implementations/box1/{name}" for name in instructions}
    assert wanted == {name for name in files if not name.startswith("benchmarks/ssd/implementations/reference/")}
    assert "benchmarks/ssd/implementations/reference/README.md" in files
    assert not list((tmp_path / "out").glob(".*"))
    for checker in ("compliance_checker", "system_desc_checker", "seed_checker", "rcp_checker", "package_checker"):
        assert f"{checker}: passed" in said
    # 12.0, 11.0 and 11.5 are left
    assert "Olympic mean: 11.500 minutes; median 11.500, from 10.000 to 14.000" in said
    assert re.findall(r"(result_\d).*dropped: the (\w+)", said) == [("result_1", "fastest"), ("result_3", "slowest")]
    described = json.loads((org / "systems/box1.json").read_text())
    facts = json.loads((runs[0] / "environment.json").read_text())
    assert described["host_processor_model_name"] == facts["cpu"] and described["accelerators_per_node"] == "0"
    assert described["host_processor_core_count"] == "26" and described["framework"] == f"PyTorch {facts['packages']['torch']}"
    for place, run in enumerate(runs):
        copy, own = (org / f"results/box1/ssd/result_{place}.txt"), run / "mlperf.log"
        identity = ("submission_org", "submission_platform", "submission_division", "submission_status")
        assert values(copy, *identity) == ["acme", "box1", "closed", "onprem"]
        differing = [a for a, b in zip(copy.read_text().splitlines(), own.read_text().splitlines(), strict=True) if a != b]
        assert len(differing) == 2 and all("submission_org" in line or "submission_platform" in line for line in differing)
    assert "submission_org 'reference_implementation' → 'acme'" in said
    assert submit(runs) == (0, said.replace("written: ", "", 1).replace(f"{org}\n", f"{org} is there already, the same\n"))
    (org / "systems/box1.json").write_text("{}")
    assert submit(runs)[0] == 2
    assert (org / "systems/box1.json").read_text() == "{}"


def test_the_script_repeats_the_configuration(derived, submit, tmp_path, demo_data):
    run = derived("run", 3, batch=8)
    code, said = submit([run], "--incomplete")
    assert code == 0 and "rcp_checker: not run" in said and "Unofficial: 1 of the 5" in said, said
    org = tmp_path / "out" / "acme"
    assert "Unofficial" in (org / "UNOFFICIAL.txt").read_text()
    env = {"PROJECT": str(ROOT), "DATADIR": str(demo_data), "SEED": "3", "LOGDIR": str(run.parent), "PATH": "/usr/bin:/bin"}
    env["SSD_PYTHON"] = sys.executable
    script = org / "benchmarks/ssd/implementations/box1/run_and_time.sh"
    done = subprocess.run(["bash", str(script), "--dry_run"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again.yaml"
    again.write_text(re.search(r"^# backend: reference\n(?:.+\n)+", done.stdout, re.MULTILINE)[0])
    assert read_run(again).model_dump() == {**read_run(run / "config.yaml").model_dump(), "runs_dir": str(run.parent)}


def test_a_run_without_the_target_is_the_slowest(derived, submit):
    runs = [derived(f"run{place}", place, minutes) for place, minutes in enumerate(MINUTES[:4])]
    code, said = submit([*runs, derived("lost", 9, 5.0, ap=0.2, status="aborted")])
    assert code == 0, said
    assert (
        "Olympic mean: 12.333 minutes; median 11.500" in said
        and "result_4.txt  seed 9  5.000 minutes, target not reached, dropped: the slowest" in said
    )
    assert "result_4.txt: Failed checks for eval_accuracy : v['value'] >= 0.230 and v['value'] < 1.0; none needed" in said
    code, said = submit([*runs[:3], *(derived(f"lost{seed}", seed, ap=0.2, status="aborted") for seed in (7, 8))])
    assert code == 2 and "the target was not reached by" in said and "lost7" in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"ap": 0.1},
            ["compliance_checker: FAILED", "result_0.txt: Failed checks for eval_accuracy", "fix: train on COCO 2017", "5 files do not comply"],
        ),
        ({"decay_epochs": [12, 16]}, ["result_4.txt: CHECK for 'opt_learning_rate_decay_boundary_epochs' failed", "50 and a multiple of 5"]),
        ({"decay_epochs": [40]}, ["Failed executing CHECK code: is_integer(10 * (v['value'][1]", "50 and a multiple of 5"]),
        ({"epoch": 45}, ["rcp_checker: FAILED", "global batch 1024, references at 1024, 2048, 4096: RCP found", "package_checker: FAILED"]),
        ({"batch": 8192, "epoch": 90}, ["rcp_checker: FAILED", "Missing RCP, please submit RCP with BS = 8192"]),
    ],
    ids=["target", "decays", "one decay", "convergence", "batch"],
)
def test_what_a_checker_refuses_is_not_written(five, submit, tmp_path, keys, said):
    code, printed = submit(five(**keys))
    assert code == 1 and all(text in printed for text in said), printed
    assert list((tmp_path / "out").iterdir()) == []


def test_convergence_within_bounds_and_bypassed(five, submit):
    code, said = submit(five(batch=4096, epoch=86))
    assert code == 0 and "MLPerf multiplies the result by 1.0" in said and "with MLPerf's factor: 11." in said, said


def test_convergence_can_be_bypassed(five, submit):
    code, said = submit(five(epoch=45), "--rcp-bypass")
    assert code == 0 and "RCP found passed using rcp_bypass" in said and "factor" not in said, said


def test_seeds_are_used_once(derived, submit, tmp_path):
    code, said = submit([derived(name, 1) for name in "abcde"])
    assert code == 1 and "seed_checker: FAILED" in said and "already logs the same seed" in said
    code, said = submit([tmp_path / name for name in "abcde"], division="open")
    assert code == 0 and "rcp_checker: not run" in said, said


def test_a_real_log_as_it_is(pattern, submit, tmp_path):
    """Nothing derived: a run that found nothing is none of the closed division, and one of the open."""
    code, said = submit([pattern], "--incomplete")
    assert code == 1 and "eval_accuracy" in said
    code, said = submit([pattern], "--incomplete", division="open")
    assert code == 0 and "cache_clear is false" in said, said
    assert values(tmp_path / "out/acme/results/box1/ssd/result_0.txt", "submission_division") == ["open"]


def test_what_does_not_go_together_is_refused(derived, submit, tmp_path):
    run = derived("run", 1)

    def refused(*runs: Path, flags=("--incomplete",)) -> str:
        code, said = submit(runs, *flags)
        assert code == 2 and said.count("error: ") == 1 and not (tmp_path / "out" / "acme").exists()
        return said

    assert re.search(
        r"may differ in their seed only, and differ in weight_decay: \S+ and 0.0004$", refused(run, derived("decay", 2, weight_decay=4e-4)).strip()
    )
    other = derived("other", 2)
    facts = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps({**facts, "host": "elsewhere", "packages": {**facts["packages"], "torch": "1.0"}}))
    assert "differ in packages.torch" in refused(run, other)
    assert "MLPerf wants 5 runs of ssd, and 1 are given" in refused(run, flags=())
    assert "a run is given twice" in refused(run, run)
    unfinished = derived("unfinished", 4)
    lines = (unfinished / "mlperf.log").read_text().splitlines(keepends=True)
    (unfinished / "mlperf.log").write_text("".join(line for line in lines if "run_stop" not in line))
    assert "has not finished" in refused(unfinished)
    (unfinished / "mlperf.log").write_text("".join(lines)[:-20])
    assert "is no line of an MLPerf log" in refused(unfinished)
    assert "is no finished run's folder: it has no config.yaml" in refused(tmp_path)
    assert "'.hidden' is no name" in refused(run, flags=("--incomplete", "--org", ".hidden"))


def test_the_description_is_merged_and_complete(derived, submit, tmp_path):
    run = derived("run", 1)
    (tmp_path / "more.yaml").write_text("cooling: air\nhost_processors_per_node: 2\nhost_processor_model_name: Real Name\n")
    code, said = submit([run], "--incomplete", "--system-description", str(tmp_path / "more.yaml"))
    lacking = sorted(set(HARDWARE) - {"cooling", "host_processors_per_node"})
    assert code == 2 and sorted(re.search(r"description lacks (.+?);", said)[1].split(", ")) == lacking
    (tmp_path / "more.yaml").write_text(json.dumps({**HARDWARE, "host_processor_model_name": "Real Name", "system_name": "Box One"}))
    code, said = submit([run], "--incomplete", "--system-description", str(tmp_path / "more.yaml"))
    assert code == 0 and "host_processor_model_name: 'Real Name' from" in said
    assert values(tmp_path / "out/acme/results/box1/ssd/result_0.txt", "submission_platform") == ["Box One"]
    facts = {**json.loads((run / "environment.json").read_text()), "device": "cuda", "accelerator": {"name": "X100", "count": 8}}
    (run / "environment.json").write_text(json.dumps(facts))
    code, said = submit([run], "--incomplete")
    assert code == 2 and "lacks accelerator_host_interconnect, accelerator_frequency, accelerator_on-chip_memories" in said
    assert "accelerator_model_name" not in said and told(read(run))["accelerators_per_node"] == "1"
    for text, wrong in (
        ("division: open", "division is 'open', and by its flag 'closed'"),
        ("cooling: [1]", "cooling is [1]"),
        ("host_processors_per_node: two", "a whole number is needed"),
        ("cooling: &a air\nhw_notes: *a", "aliases are not allowed"),
    ):
        (tmp_path / "more.yaml").write_text(text)
        code, said = submit([run], "--incomplete", "--system-description", str(tmp_path / "more.yaml"))
        assert code == 2 and wrong in said


def test_nothing_but_the_values_is_rewritten():
    event = {"namespace": "", "time_ms": 1, "key": "submission_org", "value": "x", "metadata": {"file": "a b", "lineno": 1}}
    log = f"0: :::MLLOG {json.dumps(event)}  \nother\r\n:::MLLOG {json.dumps({**event, 'key': 'seed'})}"
    assert with_identity(log, {"submission_org": "ü"}) == (log.replace('"value": "x"', '"value": "\\u00fc"', 1), {"submission_org": "x"})


def test_the_code_is_that_of_the_commit(tmp_path):
    head = commit().removesuffix("+changes")
    if head != "unknown":
        assert write_code(head, tmp_path / "a") == f"The code is that of commit {head}."
        assert (tmp_path / "a/base/train.py").is_file() and not list((tmp_path / "a").rglob(".*"))
    for name, why in (("0" * 40, "does not have that commit"), (f"{head}+changes", "that is no commit"), ("--remote=x", "that is no commit")):
        assert why in write_code(name, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["README.md"]


def test_a_path_in_the_configuration_is_not_executed(derived, submit, tmp_path):
    code, said = submit([derived("run", 1, backbone_path="/x/$(touch hit)`touch hit`.pth", train_images="a;touch hit")], "--incomplete")
    assert code == 0, said
    script = tmp_path / "out/acme/benchmarks/ssd/implementations/box1/run_and_time.sh"
    (tmp_path / "run_training.sh").write_text('printf "%s\\n" "$@"')
    env = {"PATH": os.environ["PATH"], "PROJECT": str(tmp_path), "DATADIR": "d", "SEED": "3", "BACKBONE_PATH": "weights"}
    done = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "hit").exists()
    words = done.stdout.splitlines()
    assert words[words.index("--backbone_path") + 1] == "weights" and words[words.index("--train_images") + 1] == "a;touch hit"

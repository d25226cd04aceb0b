"""Every command that README.md, docs/ and the folders' READMEs tell people to type works.

Commands are found in fenced blocks and between backticks, and each is put to the first line of `WAYS` whose beginning it has. One that has none
fails: add a line. docs/adding-a-backend.md is a sitting of its own, which tests/test_docs.py goes through.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from base.__main__ import TOOLS, main
from base.backend import load_backend
from tests.conftest import ROOT, Started, start_training
from tests.test_docs import BLOCK, DOCUMENTS, SITTING

PROGRAMS = "python3?|bash|source|sbatch|docker|pip|ruff|apt-get|sudo|torchrun"
COMMAND = re.compile(rf"((?:[A-Z_]+=\S+ )*)((?:{PROGRAMS}) .+|\./run\.sub.*|\w+/docker/run_with_docker\.sh.*)")
INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # perhaps over two lines of a paragraph

# How a command is run, by its beginning (with $: by all of it), the first that fits. The third column names the test that goes further, or
# says why there is none.
#   run    as it stands, with what `places` has for its names; `python -m base …` in this process, all others by bash
#   slow   likewise, as a long test
#   train  by a dry run in this process; then, as a long test, SHORT flags are added and it trains a few steps
#   check  by a dry run: devices, data and weights are looked for as before training
#   parse  its options are read by its own parser
#   test   not here; the project's files that it names are there, and its scripts can be read by bash
WAYS = (
    ("python3 prepare.py --check", "parse", "tests/test_prepare.py::test_check_names_every_fault_and_its_fix"),
    ("python3 prepare.py --name acme --check", "parse", "tests/test_prepare.py::test_prepare_installs_a_vendors_wheels"),
    ("python3 prepare.py --name reference --data_dir /data/coco --download", "parse", "tests/test_download.py::test_data_set_and_second_call"),
    ("python3 prepare.py --data_dir", "parse", "tests/test_layouts.py::test_it_is_found_before_anything_is_installed"),
    ("python3 prepare.py", "parse", "tests/test_prepare.py::test_first_run_second_run_check_and_a_changed_package"),
    ("bash run_training.sh$", "check", "tests/test_demo.py::test_the_demo_reaches_the_target_and_its_log_is_compliant"),
    ("bash run_training.sh --list", "run", ""),
    ("bash run_training.sh --nnodes 2", "check", "tests/test_runs.py::test_two_nodes"),
    ("bash run_training.sh --name … --config …x2x8", "check", "tests/test_hosts.py::test_hosts_that_differ_are_told_before_anything_starts"),
    ("bash run_training.sh --image_size 800 1200", "check", "tests/test_stages.py::test_the_published_commands_for_larger_and_larger_images"),
    ("bash run_training.sh --checkpoint runs/NAME --image_size 700", "check", "tests/test_stages.py::test_another_size_begins_with_all_the_weights"),
    ("bash run_training.sh --config large_image", "check", "tests/test_stages.py::test_the_large_image_recipe_as_published"),
    ("bash run_training.sh --trials", "check", "tests/test_clock.py::test_trials_go_on_where_they_were_stopped_and_close_with_a_table"),
    ("bash run_training.sh --name cpu", "check", "tests/test_demo.py::test_the_demo_reaches_the_target_and_its_log_is_compliant"),
    ("bash run_training.sh --name", "check", "COCO, and devices of which there may be none here"),
    ("bash run_training.sh", "train", ""),
    ("python -m base bench", "parse", "tests/test_bench.py::test_every_part_compares_backends"),
    ("python -m base verify", "parse", "tests/test_verify.py::test_the_command_passes_a_whole_backend"),
    ("python -m base scale --check", "parse", "tests/test_scale.py::test_predictions_beside_measured_steps"),
    ("python -m base submission runs/NAME …", "test", "tests/test_submission.py::test_five_runs_make_a_folder_that_passes"),
    ("python -m base submission", "parse", "tests/test_submission.py::test_five_runs_make_a_folder_that_passes"),
    ("python -m base new-backend", "parse", "tests/test_new_backend.py::test_within_the_project_it_is_a_backend_at_once"),
    ("python -m base export --checkpoint runs/NAME/checkpoints/best.pt --out detector.onnx", "parse",
     "tests/test_predict.py::test_what_is_exported_detects_the_same"),
    ("python -m base scale --from runs/NAME --latency", "run", ""),
    ("python -m base scale", "slow", ""),
    ("python -m base ", "run", ""),
    ("python -m mlperf_logging.compliance_checker", "test", "tests/test_demo.py::test_the_demo_reaches_the_target_and_its_log_is_compliant"),
    ("python -m base.backends.cpu.tests.fuzz", "test", "cpu/tests/test_fuzz.py::test_damaged_and_absurd_input_for_longer"),
    ("python -m tests.soak", "test", "tests/test_faults.py::test_twenty_kills_at_twenty_moments"),
    ("source <(python -m base config", "test", "tests/test_slurm.py::test_a_configuration_is_sourced_as_the_submissions_scripts_were"),
    ("source .venv/bin/activate", "test", "tests/test_prepare.py::test_half_made_venv_is_rebuilt"),
    ("source config_", "test", "a file of MLPerf's submissions, not of this project"),
    ("source ", "run", ""),
    ("./run.sub", "test", "tests/test_slurm.py::test_run_sub_runs_here_without_slurm_goes_on_and_leaves_what_is_done"),
    ("sbatch ", "test", "tests/test_slurm.py::test_a_job_at_its_time_limit_saves_and_the_next_one_goes_on"),
    ("nvidia/docker/run_with_docker.sh", "test", "tests/test_slurm.py::test_what_docker_is_given"),
    ("iluvatar/docker/run_with_docker.sh", "test", "tests/test_slurm.py::test_what_docker_is_given"),
    ("docker ", "test", "tests/test_slurm.py::test_an_image_is_made_by_prepare_and_runs_run_training"),
    ("bash nvidia/bench.sh", "test", "nvidia/tests/test_without_gpu.py::test_the_bench_works"),
    ("bash corex-installer", "test", "a vendor's program"),
    ("sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj", "test", "cpu/tests/test_telemetry.py::test_counters_for_root_only"),
    ("apt-get install -y g++ libjpeg62-turbo-dev", "test", ".ci/run"),
    ("bash .ci/run", "test", ".ci/run"),
    ("bash tests/run.sh", "test", ".ci/run"),
    ("ruff check", "test", ".ci/run"),
    ("pip install", "parse", "no package index is asked here"),
)  # fmt: skip

SHORT = ["--image_size", "64", "64", "--strides", *["1"] * 6, "--backbone", "resnet18", "--batch_size", "4", "--max_steps", "2", "--target", "null"]
SHORT += ["--workers", "0", "--device", "cpu"]


def commands() -> list[str]:
    """Every command, once: lines of fenced blocks that have no file's name above them, and what stands between backticks."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        blocks = [] if document == SITTING else BLOCK.findall(text)
        lines = [line for name, language, block in blocks if not name and language in ("", "sh") for line in block.replace("\\\n", " ").splitlines()]
        found += [re.sub(r"\s+#.*", "", line) for line in lines] + INLINE.findall(BLOCK.sub("", text))
    return list(dict.fromkeys(text for text in (" ".join(each.split()) for each in found) if COMMAND.fullmatch(text)))


def way(command: str) -> tuple[str, str, str] | None:
    """The line of WAYS for a command; None: there is none."""
    plain = COMMAND.fullmatch(command)[2]
    return next((line for line in WAYS if f"{plain}$".startswith(line[0])), None)


def cases(command: str) -> list:
    """A command's cases: (command, whether it trains), with their marks."""
    _, how, _ = way(command) or ("", "", "")
    first = pytest.param(command, False, id=command, marks=[pytest.mark.long] * (how == "slow"))
    trained = pytest.param(command, True, id=f"{command}, trained", marks=pytest.mark.long)
    return [first] + [trained] * (how == "train" and "--dry-run" not in command)


@pytest.fixture(scope="module")
def places(tmp_path_factory, demo_data) -> dict[str, str]:
    """What stands for the names in commands: a word (after a flag, if one is given), or the beginning of a path."""
    folder = tmp_path_factory.mktemp("commands")
    flags = [*SHORT, "--max_steps", "3", "--target", "0", "--decay_epochs", "40", "50", "--learning_rate", "1e-3", "--log_every", "1"]
    done = start_training(folder, demo_data, flags).wait_done()
    assert done.returncode == 0, done.stderr
    run, weights = folder / "run", folder / "resnet34.pth"
    model = load_backend("reference").model(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet34")
    torch.save(model.backbone.state_dict(), weights)
    for name in "ABC":
        (folder / name).symlink_to(run)
    photo = next((demo_data / "val2017").iterdir())
    values = {
        "/data/coco/resnet34-333f7ec4.pth": weights, "/data/coco": demo_data, "/data/mine": demo_data, "D": demo_data,
        "--data_dir DIR": demo_data, "data DIR": demo_data,
        "runs/NAME": run, "RUN…": run, "runs/A": folder / "A", "runs/B": folder / "B", "runs/C": folder / "C",
        "--checkpoint …": run, "--data_dir …": demo_data, "--backbone_path …": weights, "FILE": weights, "--out FILE": "detector.pt",
        "--name …": "nvidia", "--name acme": "cpu", "--config …": "demo", "--config …x2x8": "V100x2x8",
        "HOST:PORT": "localhost:29500", "alpha:29500": "localhost:29500",
        "IMAGES…": photo, "photo.jpg": photo, "folder/": demo_data / "val2017",
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def filled(command: str, places: dict[str, str]) -> list[str]:
    """A command's words with what stands for its names."""
    given = shlex.split(command)
    words = []
    for before, word in zip(["", *given], given, strict=False):
        start = next((name for name in places if word == name or word.startswith(f"{name}/")), None)
        if f"{before} {word}" in places:
            words.append(places[f"{before} {word}"])
        elif start:
            words.append(places[start] + word.removeprefix(start))
        elif word != "…":
            words.append(word)
    return words


def outcome(tool: list[str], capsys) -> None:
    """A tool of `python -m base` in this process has to end well."""
    code = main(tool)
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err


class ParsedError(Exception):
    """Options were read; the rest of the program is not wanted."""


def parsed(words: list[str], monkeypatch) -> None:
    """The program's own parser reads the options, and refuses what it does not know."""
    if words[0] == "pip":
        listed = [(ROOT / name).read_text().splitlines() for flag, name in zip(words, words[1:], strict=False) if flag == "-r"]
        wanted = [line.partition("#")[0].strip() for file in listed for line in file] or [word for word in words[2:] if word[0] != "-"]
        assert [str(Requirement(text)) for text in wanted if text]
        return
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given):
        read(parser, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    program, arguments = (TOOLS[words[3]][0], words[4:]) if words[1:3] == ["-m", "base"] else ("prepare", words[2:])
    with pytest.raises(ParsedError):
        importlib.import_module(program).main(arguments)


@pytest.mark.parametrize(("command", "trained"), [case for command in commands() for case in cases(command)])
def test_a_command_works(command, trained, places, tmp_path, monkeypatch, capsys):
    _, how, _ = way(command) or pytest.fail(f"{command!r} is new: write in WAYS of {Path(__file__).name} how it is run")
    words = filled(command, places)
    monkeypatch.chdir(tmp_path)
    if words[:3] == ["python", "-m", "base"] and len(words) == 4:  # a tool that is only named
        assert words[3] in TOOLS
    elif how == "test":
        named_files(words)
    elif how == "parse":
        parsed(words, monkeypatch)
    elif trained:
        trains(words[2:], Path(places["runs/NAME"]), tmp_path, places)
    elif how in ("train", "check"):
        outcome(["train", *words[2:], *["--dry-run"] * ("--dry-run" not in words), *elsewhere(words, places)], capsys)
    elif words[:3] == ["python", "-m", "base"]:
        outcome(words[3:], capsys)
    else:
        text = shlex.join(words).replace("python ", f"{sys.executable} ", 1)
        done = subprocess.run(["bash", "-euc", text], cwd=ROOT, env={**os.environ, "SSD_PYTHON": sys.executable}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def named_files(words: list[str]) -> None:
    """What a command that is not run names of the project is there."""
    for word in words:
        room, slash, _ = word.partition("/")
        if slash and (ROOT / room / "backend.py").exists() or room in ("tests", ".ci"):
            assert (ROOT / word).exists(), word
            if word.endswith((".sh", ".sub", "/run")):
                subprocess.run(["bash", "-n", ROOT / word], check=True)


def elsewhere(words: list[str], places: dict[str, str]) -> list[str]:
    """Flags for a machine without COCO or an accelerator."""
    data = [] if "--data_dir" in words or "--resume" in words else ["--data_dir", places["D"]]
    return [*data, "--device", "cpu"]


def trains(flags: list[str], run: Path, folder: Path, places: dict[str, str]) -> None:
    """Some steps by ``bash run_training.sh`` with these flags. A run that goes on is a copy, as it was when it had a step to do."""
    if "--resume" in flags:
        copy = shutil.copytree(run, folder / "copy")
        flags = [str(copy) if word == str(run) else word for word in flags] + ["--max_steps", "5"]
    else:
        flags = [*flags, *SHORT, *elsewhere(flags, places), "--runs_dir", str(folder)]
    done = Started(folder, flags).wait_done()
    assert done.returncode == 0 and "images/s" in done.stdout, done.stdout + done.stderr


def test_the_tests_that_go_further_are_there():
    named = {match for *_, text in WAYS for match in re.findall(r"\S+\.py::\w+", text)}
    for test in named:
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
    assert all((ROOT / text).is_file() for *_, text in WAYS if text.startswith(".ci/"))
    assert all(text for _, how, text in WAYS if how in ("parse", "test"))


def test_no_way_is_left_over():
    used = [way(command) for command in commands()]
    assert [line for line in WAYS if line not in used] == []

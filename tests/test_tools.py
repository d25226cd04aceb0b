"""The tools of ``python -m base``: their help, `config`, and what `evaluate` refuses."""

import pickle
import re
import subprocess
import sys

import pytest

from base.__main__ import TOOLS
from base.__main__ import main as tool
from base.config import Config, meanings
from base.errors import UserError
from base.tools.launch import main
from tests.conftest import ROOT, one_error


def test_the_entry_without_a_tool_or_with_none_that_exists():
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    bare, wrong = (subprocess.run([sys.executable, "-m", "base", *words], **run) for words in ([], ["nonsense"]))
    assert bare.returncode == 2 and all(f"\n  {name} " in bare.stdout for name in TOOLS)
    assert "no tool is called 'nonsense'" in one_error(wrong) and "usage:" in wrong.stderr


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        tool([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("usage:") and len(shown.splitlines()) > 3


def test_help_of_train_explains_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for key, meaning in meanings().items():
        assert f"--{key}" in shown and meaning in shown
    assert "images a device and step (default 32)" in shown and "(default 40 50)" in shown and "(default null)" in shown


def test_config_needs_no_data_and_says_where_values_come_from(capsys):
    assert tool(["config", "--name", "reference", "--config", "DGX1_singlenode", "--seed", "3"]) == 0
    shown = {line.partition(":")[0]: line.split("  # ")[-1] for line in capsys.readouterr().out.splitlines()}
    assert shown["devices"] == "reference/config/DGX1_singlenode.yaml" and shown["weight_decay"] == "base/recipes/mlperf_reference.yaml"
    assert shown["seed"] == "--seed" and shown["data_dir"] == "default"


def test_config_as_shell_can_be_sourced(capsys, tmp_path):
    wild = """/data/it's "here" $(touch no) `x` \\ $HOME é
two"""
    flags = ["--name", "reference", "--config", "DGX1_singlenode", "--data_dir", wild, "--use", "loss=reference", "--skip_bad_images"]
    assert tool(["config", *flags, "--shell"]) == 0
    (tmp_path / "values.sh").write_text(capsys.readouterr().out)
    script = 'set -eu; source ./values.sh; printf "%s\\0" ' + " ".join(f'"$SSD_{key.upper()}"' for key in Config.model_fields)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    values = dict(zip(Config.model_fields, done.stdout.split("\0")[:-1], strict=True))
    assert values["data_dir"] == wild and values["use"] == "loss=reference" and values["skip_bad_images"] == "true"
    assert (values["devices"], values["decay_epochs"], values["max_steps"], values["warmup_epochs"]) == ("8", "40 50", "", "2.619685")
    assert [path.name for path in tmp_path.iterdir()] == ["values.sh"]
    exported = subprocess.run(["bash", "-c", "source ./values.sh; env -0"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"SSD_DATA_DIR={wild}" in exported.stdout.split("\0")


def test_config_of_a_finished_run_is_not_asked_here():
    with pytest.raises(UserError, match="a finished run keeps its own in config.yaml"):
        from base.tools.config import main as config

        config(["--resume", "x"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_evaluate_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes(pickle.dumps([1]))
    assert tool(["evaluate", "--checkpoint", str(tmp_path / "x.pt")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'x.pt'} is")
    assert tool(["evaluate", "--checkpoint", str(tmp_path / "none.pt")]) == 2
    assert "none.pt does not exist" in capsys.readouterr().err


def test_a_python_that_is_not_the_environments_is_told_where_that_is():
    done = subprocess.run([sys.executable, "-S", "-m", "base", "report", "runs"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(r"error: \S+ has no \w+: source .venv/bin/activate.*prepare.py\n", done.stderr)

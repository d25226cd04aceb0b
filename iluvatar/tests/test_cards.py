"""Which machines this backend is for: cards by the names that their driver gives them, torch by its build."""

import json
import os
import subprocess
import sys

import pytest

from base.backend import load_backend
from base.distributed import check_cards
from base.errors import UserError
from tests.conftest import ROOT

CARDS = ["Iluvatar BI-V100", "Iluvatar BI-V150", "Iluvatar BI-V150S", "BI-V150", "Iluvatar MR-V100"]  # as torch.cuda.get_device_name tells


@pytest.mark.parametrize("other", ["NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X", "V100"])
def test_cards_of_other_vendors_are_refused(other):
    backend = load_backend("iluvatar")
    check_cards(backend, CARDS)
    with pytest.raises(UserError, match=f"backend iluvatar is for devices whose names begin with .*, and this machine has '{other}'; --list"):
        check_cards(backend, [*CARDS, other])


LOOK = """
import runpy, json, sys
from pathlib import Path
fault = runpy.run_path("iluvatar/build.py")["torch_fault"]
print(json.dumps(fault(Path(sys.argv[1]) / "dev", Path(sys.argv[1]) / "packages")))
"""


def fault(machine, torch_version: str | None, sdk: bool = False) -> str:
    """What build.py says of an environment with this torch on a recorded machine."""
    site = machine / "site"
    for path in (site, machine / "dev", machine / "packages"):
        path.mkdir(exist_ok=True)
    if torch_version:
        (site / f"torch-{torch_version}.dist-info").mkdir()
        (site / f"torch-{torch_version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "COREX_HOME": str(machine if sdk else machine / "none")}
    command = [sys.executable, "-S", "-c", LOOK, str(machine)]  # without this environment's own packages
    return json.loads(subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_any_torch_will_do_where_there_are_no_cards(tmp_path):
    assert fault(tmp_path, "2.15.0+cpu") == ""


@pytest.mark.parametrize("sdk", [True, False], ids=["SDK", "device file"])
def test_cards_need_corex_torch(tmp_path, sdk):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / ("null" if sdk else "iluvatar0")).touch()
    said = fault(tmp_path, "2.15.0+cu130", sdk)
    assert "its cards need CoreX's torch" in said and "this environment has 2.15.0+cu130" in said and f"wheels into {tmp_path}/packages" in said
    (tmp_path / "packages" / "torch-2.7.1+corex.4.4.0-cp312-cp312-linux_x86_64.whl").touch()
    assert fault(tmp_path, None, sdk) == ""  # prepare.py is about to install it


def test_none_and_corex(tmp_path):
    assert "this environment has none" in fault(tmp_path, None, sdk=True)
    assert fault(tmp_path, "2.7.1+corex.4.4.0", sdk=True) == ""


def test_build_ends_with_2_and_the_reason(tmp_path):
    environment = {**os.environ, "COREX_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "iluvatar" / "build.py", "--check"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "need CoreX's torch" in done.stderr
    done = subprocess.run(
        [sys.executable, ROOT / "iluvatar" / "build.py", "--check"], env={**environment, "COREX_HOME": "/none"}, capture_output=True
    )
    assert done.returncode == 0

"""ixsmi's sensor on outputs as CoreX 3 and 4 give them, replayed by a command of that name."""

import os
import sys
from pathlib import Path

import pytest
import torch
from base.backends.cpu.telemetry import HostSensor
from base.backends.iluvatar.telemetry import IxsmiSensor, number, open_sensor

from base.telemetry import Reading

CUDA = torch.device("cuda", 1)
ROWS = {  # field → the two cards' values
    "index": ("0", "1"),
    "uuid": ("GPU-4a8348cb-505c-507f-8df7-ff3c796e3033", "GPU-2421fa19-18cf-47bb-b629-1ae3e642436d"),
    "memory.used": ("513", "20480"),
    "utilization.gpu": ("0", "97"),
    "clocks.current.sm": ("500", "1500"),
    "gpu.power.draw": ("55", "187.5"),
}
IXSMI = """#!{python}
import sys
rows = {rows!r}
assert sys.argv[2] == "--format=csv,noheader,nounits", sys.argv
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
for field in fields:
    if field not in rows:
        sys.exit(f'Field "{{field}}" is not a valid field to query.')
for card in range(2):
    print(", ".join(rows[field][card] for field in fields))
"""


@pytest.fixture
def ixsmi(tmp_path, monkeypatch):
    """Puts a command `ixsmi` on the path that knows these fields."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(rows: dict | None = None, text: str | None = None) -> None:
        (tmp_path / "ixsmi").write_text(text or IXSMI.format(python=sys.executable, rows=rows))
        (tmp_path / "ixsmi").chmod(0o755)

    return make


def without_power() -> dict:
    return {field: values for field, values in ROWS.items() if "power" not in field}


@pytest.mark.parametrize("field", ["gpu.power.draw", "power.draw"])
def test_a_card_of_corex_4_and_of_corex_3(ixsmi, field):
    ixsmi(without_power() | {field: ROWS["gpu.power.draw"]})
    sensor = open_sensor(CUDA, 1)
    assert sensor.read() == Reading(memory_bytes=20480 << 20, power_watts=187.5, utilisation=0.97, clock_hz=1.5e9)
    assert isinstance(sensor, IxsmiSensor) and sensor.missing == ""


def test_units_although_none_were_asked_for(ixsmi):
    ixsmi({field: tuple(v + u for v in ROWS[field]) for field, u in zip(ROWS, ("", "", "MiB", " %", "MHz", " W"), strict=True)})
    assert open_sensor(torch.device("cuda", 0), 0).read() == Reading(513 << 20, 55.0, None, 0.0, 500e6)
    assert [number(cell) for cell in ("N/A", "[Not Supported]", "", "65535", "65535W", "12.5 W")] == [None] * 5 + [12.5]


@pytest.mark.parametrize("visible, used", [("1,0", 513), ("0,1", 20480), (" 0 , GPU-4a8348cb-505c-507f-8df7-ff3c796e3033", 513), ("", 20480)])
def test_torchs_second_gpu_is_found_among_the_machines(ixsmi, monkeypatch, visible, used):
    ixsmi(ROWS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_sensor(CUDA, 1).read().memory_bytes == used << 20


@pytest.mark.parametrize("power", ["N/A", "65535"])
def test_a_card_that_does_not_tell_its_power(ixsmi, power):
    ixsmi(ROWS | {"gpu.power.draw": (power, power)})
    sensor = open_sensor(CUDA, 1)
    assert sensor.read() == Reading(20480 << 20, None, None, 0.97, 1.5e9) and sensor.missing == "ixsmi shows no power of GPU 1"


def test_a_card_that_tells_its_power_again(ixsmi):
    ixsmi(ROWS | {"gpu.power.draw": ("N/A", "N/A")})
    sensor = open_sensor(CUDA, 1)
    assert sensor.read().power_watts is None and sensor.missing
    ixsmi(ROWS)
    assert sensor.read().power_watts == 187.5 and sensor.missing == ""


def test_an_ixsmi_that_knows_no_power(ixsmi):
    ixsmi(without_power())
    sensor = open_sensor(CUDA, 1)
    assert sensor.read() == Reading(20480 << 20, None, None, 0.97, 1.5e9)
    assert sensor.missing == "ixsmi knows none of the fields gpu.power.draw, power.draw"


def test_what_is_no_answer_is_said(ixsmi, monkeypatch, tmp_path):
    ixsmi(text="#!/bin/sh\necho 'Failed to initialize IXML: driver not loaded' >&2\nexit 9\n")
    with pytest.raises(ValueError, match="ended with 9 and has no row of GPU 1: Failed to initialize IXML"):
        open_sensor(CUDA, 1).read()
    ixsmi(ROWS)
    with pytest.raises(ValueError, match="has no row of GPU 5"):
        open_sensor(torch.device("cuda", 5), 5).read()
    (tmp_path / "ixsmi").unlink()
    monkeypatch.setenv("COREX_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no command ixsmi: source iluvatar/config"):
        open_sensor(CUDA, 1).read()


def test_a_card_that_falls_out_is_an_error_of_the_reading(ixsmi):
    ixsmi(ROWS)
    sensor = open_sensor(CUDA, 1)
    sensor.read()
    ixsmi({field: values[:1] * 2 for field, values in ROWS.items()})
    with pytest.raises(ValueError, match="has no row of GPU 1"):
        sensor.read()


def test_it_is_found_in_the_sdks_folder(ixsmi, monkeypatch, tmp_path):
    ixsmi(ROWS)
    (tmp_path / "bin").mkdir()
    (tmp_path / "ixsmi").rename(tmp_path / "bin" / "ixsmi")
    monkeypatch.setenv("COREX_HOME", str(tmp_path))
    sensor = open_sensor(CUDA, 1)
    assert sensor.read().memory_bytes and sensor.command == str(Path(tmp_path, "bin", "ixsmi"))


def test_on_a_cpu_it_is_the_hosts():
    assert isinstance(open_sensor(torch.device("cpu"), 0), HostSensor)

"""The host's sensor on trees of files as the kernel shows them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base.backends.cpu.telemetry import PAGE, TICK, HostSensor

CPU = torch.device("cpu")


def tree(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def zone(root: Path, name: str, kind: str, microjoules: int, most: int = 262143328850) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", kind), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


@pytest.fixture
def host(tmp_path):
    """Makes the sensor of a recorded machine."""
    for name in ("rapl", "proc", "cpus"):
        (tmp_path / name).mkdir()

    def sensor(local_rank: int = 0) -> HostSensor:
        return HostSensor(CPU, local_rank, rapl=tmp_path / "rapl", proc=tmp_path / "proc", cpus=tmp_path / "cpus")

    process(tmp_path / "proc", os.getpid(), resident=1000, shared=400, ticks=0)
    sensor.root = tmp_path
    return sensor


def process(proc: Path, pid: int, resident: int, shared: int, ticks: int, children: str = "") -> None:
    folder = proc / str(pid)
    (folder / "task" / str(pid)).mkdir(parents=True, exist_ok=True)
    (folder / "statm").write_text(f"99999 {resident} {shared} 1 0 5 0\n")
    (folder / "stat").write_text(f"{pid} (a (b) c) S 1 1 1 0 -1 4194304 1 0 0 0 {ticks} {ticks // 2} 7 7 20 0 1 0 100 1 1\n")
    (folder / "task" / str(pid) / "children").write_text(children)


def test_energy_of_all_packages_also_when_a_counter_starts_again(host):
    rapl = host.root / "rapl"
    first, second = zone(rapl, "intel-rapl:0", "package-0", 262143000000), zone(rapl, "intel-rapl:1", "package-1", 5_000_000)
    zone(rapl, "intel-rapl:0:0", "dram", 77)  # a part of another zone's folder, as the kernel lists it too
    zone(rapl, "intel-rapl:2", "psys", 99)
    zone(rapl, "intel-rapl-mmio:0", "package-0", 1)
    sensor = host()
    assert sensor.missing == "" and sensor.read().joules == 0
    first.write_text("262143328849\n")
    second.write_text("7500000\n")
    assert sensor.read().joules == pytest.approx(0.328849 + 2.5)
    first.write_text("1000001\n")  # past its largest value
    assert sensor.read().joules == pytest.approx(0.328850 + 1.000001 + 2.5, abs=1e-6)


def test_one_rank_of_a_machine_tells_its_energy(host):
    zone(host.root / "rapl", "intel-rapl:0", "package-0", 5)
    sensor = host(local_rank=1)
    assert sensor.read().joules is None and sensor.missing == ""


def test_without_rapl_the_rest_is_told(host):
    sensor = host()
    assert "has no intel-rapl:* of a processor package" in sensor.missing and sensor.read().memory_bytes == 1000 * PAGE
    zone(host.root / "rapl", "intel-rapl:0", "package-0", 5).unlink()
    assert host().missing.endswith("energy_uj cannot be read: No such file or directory")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_counters_for_root_only(host):
    zone(host.root / "rapl", "intel-rapl:0", "package-0", 5).chmod(0o400)
    for folder in (host.root, *host.root.parents):
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o005 and folder != Path("/"):
            folder.chmod(0o755)
    code = f"""
import os, torch
from pathlib import Path
from base.backends.cpu.telemetry import HostSensor
os.setuid(65534)
print(HostSensor(torch.device("cpu"), 0, rapl=Path({str(host.root / "rapl")!r})).missing)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert "intel-rapl:0/energy_uj is readable by root only: sudo chmod a+r" in done.stdout, done.stderr


def test_memory_and_time_of_the_rank_and_its_children(host):
    proc, me = host.root / "proc", os.getpid()
    process(proc, me, 1000, 400, ticks=200, children="77777 77778 ")
    process(proc, 77777, 500, 400, ticks=100, children="77779 ")
    process(proc, 77779, 60, 10, ticks=0)  # 77778 has ended meanwhile
    sensor = host()
    assert sensor._processes() == ((1000 + 100 + 50) * PAGE, pytest.approx((300 + 150) / TICK))
    assert sensor.read().utilisation is None and sensor.read().utilisation == 0.0
    process(proc, me, 1000, 400, ticks=10_000_000, children="")
    assert sensor.read().utilisation > 1  # recorded figures know nothing of this machine's time


def test_the_clock_is_the_cores_mean(host):
    assert host().read().clock_hz is None
    tree(host.root / "proc", cpuinfo="processor\t: 0\ncpu MHz\t\t: 2000.500\nprocessor\t: 1\ncpu MHz\t\t: 3000.500\n")
    assert host().read().clock_hz == pytest.approx(2500.5e6)
    tree(host.root / "cpus", cpu0__cpufreq__scaling_cur_freq="1800000\n", cpu1__cpufreq__scaling_cur_freq="2200000\n")
    assert host().read().clock_hz == pytest.approx(2e9)


def test_on_this_machine():
    sensor = HostSensor(CPU, 1)
    assert sensor.read().memory_bytes > 20e6 and sensor.read().utilisation >= 0

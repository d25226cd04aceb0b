"""What the host draws: energy from RAPL's counters, memory and processor time of the rank and its children, the cores' clock.

RAPL is the kernel's powercap folder; only root may read its counters (CVE-2020-8694), unless the machine's owner allows it.
"""

import os
import re
import time
from pathlib import Path

import torch

from base.telemetry import Reading

RAPL, PROC, CPUS = Path("/sys/class/powercap"), Path("/proc"), Path("/sys/devices/system/cpu")
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Rapl:
    """The energy counters of all processor packages together; each starts again from 0 after its ``max_energy_range_uj``."""

    def __init__(self, root: Path):
        zones = sorted(path for path in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", path.name))  # AMD's have this name too
        self.zones = [path for path in zones if (path / "name").read_text().startswith("package")]
        self.ranges = [int((path / "max_energy_range_uj").read_text()) for path in self.zones]
        self.last, self.joules = self._counters(), 0.0

    def read(self) -> float:
        """Joules since it was opened."""
        now = self._counters()
        self.joules += sum((new - old) % wrap for new, old, wrap in zip(now, self.last, self.ranges, strict=True)) / 1e6
        self.last = now
        return self.joules

    def _counters(self) -> list[int]:
        return [int((path / "energy_uj").read_text()) for path in self.zones]


class HostSensor:
    """The rank's share of this machine; the packages' energy is told by the first rank of a machine only.

    Memory: the rank's, and what its children (a loader's processes) do not share with others. Utilisation: of the cores that it may use.
    """

    def __init__(self, device: torch.device, local_rank: int, *, rapl: Path = RAPL, proc: Path = PROC, cpus: Path = CPUS):
        self.proc, self.cpus, self.pid = proc, cpus, os.getpid()
        self.cores, self.last = len(os.sched_getaffinity(0)), None
        self.rapl, self.missing = None, ""
        if local_rank == 0:
            try:
                self.rapl = Rapl(rapl)
            except PermissionError as error:
                self.missing = f"{error.filename} is readable by root only: sudo chmod a+r {rapl}/intel-rapl:*/energy_uj"
            except OSError as error:
                self.missing = f"{error.filename} cannot be read: {error.strerror}"
            if self.rapl and not self.rapl.zones:
                self.rapl = None
                self.missing = f"{rapl} has no intel-rapl:* of a processor package (a virtual machine, a container, or a module not loaded)"

    def read(self) -> Reading:
        joules = self.rapl.read() if self.rapl else None
        memory, seconds = self._processes()
        now, last = (time.monotonic(), seconds), self.last
        self.last = now
        busy = max(0.0, (now[1] - last[1]) / (now[0] - last[0]) / self.cores) if last else None  # a child that ends takes its time with it
        return Reading(memory_bytes=memory, joules=joules, utilisation=busy, clock_hz=self._clock())

    def _processes(self) -> tuple[int, float]:
        """Bytes of memory and seconds of processor time of this process and all below it."""
        pages, ticks, todo = 0, 0, [self.pid]
        while todo:
            folder = self.proc / str(todo.pop())
            try:
                resident, shared = map(int, (folder / "statm").read_text().split()[1:3])
                user, system = map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13])
                todo += [int(pid) for listed in folder.glob("task/*/children") for pid in listed.read_text().split()]
            except OSError:  # it has ended meanwhile
                if folder.name == str(self.pid):
                    raise
                continue
            pages += resident if folder.name == str(self.pid) else resident - shared
            ticks += user + system
        return pages * PAGE, ticks / TICK

    def _clock(self) -> float | None:
        """The mean of the cores' clocks, as far as they tell it."""
        files = self.cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        clocks = [float(path.read_text()) * 1e3 for path in files]
        if not clocks and (self.proc / "cpuinfo").exists():
            clocks = [float(mhz) * 1e6 for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)$", (self.proc / "cpuinfo").read_text(), re.MULTILINE)]
        return sum(clocks) / len(clocks) if clocks else None

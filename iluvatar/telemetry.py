"""What a GPU draws, from ixsmi, CoreX's command after the model of nvidia-smi."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from base.backends.cpu.telemetry import HostSensor

from base.telemetry import Reading, Sensor

FIELDS = ("index", "uuid", "memory.used", "utilization.gpu", "clocks.current.sm")
POWER_FIELDS = ("gpu.power.draw", "power.draw")  # CoreX 4's name, and CoreX 3's
SECONDS = 10  # that ixsmi may take
NOT_KNOWN = 65535  # which ixsmi shows as the power of a card that does not answer


class IxsmiSensor:
    """One GPU; starts ``ixsmi`` for every reading. ``wanted`` is its number or its UUID."""

    def __init__(self, wanted: str):
        self.command, self.wanted, self.missing, self.fields = "", wanted, "", FIELDS

    def read(self) -> Reading:
        if not self.command:
            self._open()
        _, _, memory, busy, clock, *watts = self._row(*self.fields)
        lacking = f"shows no power of GPU {self.wanted}" if watts else f"knows none of the fields {', '.join(POWER_FIELDS)}"
        self.missing = f"ixsmi {lacking}" if watts in ([], [None]) else ""
        return Reading(
            memory_bytes=None if memory is None else int(memory * 2**20),
            power_watts=watts[0] if watts else None,
            utilisation=None if busy is None else busy / 100,
            clock_hz=None if clock is None else clock * 1e6,
        )

    def _open(self) -> None:
        """Finds the command, and the name under which it knows the power."""
        sdk = Path(os.environ.get("COREX_HOME", "/usr/local/corex"))
        self.command = shutil.which("ixsmi") or shutil.which(str(sdk / "bin" / "ixsmi")) or ""
        if not self.command:
            raise FileNotFoundError("there is no command ixsmi: source iluvatar/config/environment_variables.sh")
        for power in POWER_FIELDS:
            try:
                self._row(*FIELDS, power)
            except ValueError:  # it does not know the field, or does not work at all: the next question shows
                continue
            self.fields = (*FIELDS, power)
            return

    def _row(self, *fields: str) -> list:
        """The GPU's values: index and UUID as text, then numbers, None for what is not told. Raises ValueError for another output."""
        command = [self.command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        for row in rows:
            if len(row) == len(fields) and self.wanted in row[:2]:
                return row[:2] + [number(cell) for cell in row[2:]]
        said = " ".join((done.stdout + done.stderr).split())[:200]
        raise ValueError(f"{' '.join(command)} ended with {done.returncode} and has no row of GPU {self.wanted}: {said or 'nothing'}")


def number(cell: str) -> float | None:
    """``55``, ``55 W``, ``513MiB`` → the number; ``N/A``, ``[Not Supported]``, 65535 → None."""
    found = re.match(r"\d+(\.\d+)?", cell)
    return None if found is None or float(found[0]) == NOT_KNOWN else float(found[0])


def open_sensor(device: torch.device, local_rank: int) -> Sensor:
    """ixsmi's sensor of a GPU, the host's for a CPU. torch counts the GPUs of $CUDA_VISIBLE_DEVICES, ixsmi all of the machine."""
    if device.type == "cpu":
        return HostSensor(device, local_rank)
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return IxsmiSensor(visible[device.index] if visible else str(device.index))

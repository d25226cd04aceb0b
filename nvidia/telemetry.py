"""What a GPU draws, from NVML: the library that nvidia-smi asks too, without starting a program for every reading."""

import torch
from base.backends.cpu.telemetry import HostSensor

from base.errors import UserError
from base.telemetry import Reading, Sensor


class NvmlSensor:
    """One GPU, found by its UUID: NVML counts all GPUs of the machine, torch those of $CUDA_VISIBLE_DEVICES.

    The energy counter (from Volta on) is in the driver, so nothing is lost between two readings.
    """

    def __init__(self, nvml, uuid: str):
        self.nvml, self.uuid, self.gpu, self.missing = nvml, uuid, None, ""

    def read(self) -> Reading:
        nvml = self.nvml
        if self.gpu is None:
            nvml.nvmlInit()
            self.gpu = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
        joules, watts = self._power()
        self.missing = f"NVML tells neither the energy nor the power of {self.uuid}" if joules is watts is None else ""
        busy = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(self.gpu).gpu / 100)
        clock = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(self.gpu, nvml.NVML_CLOCK_SM) * 1e6)
        return Reading(nvml.nvmlDeviceGetMemoryInfo(self.gpu).used, watts, joules, busy, clock)

    def _power(self) -> tuple[float | None, float | None]:
        """Joules of the counter, or watts at the moment where there is none."""
        joules = self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.gpu) / 1e3)
        return joules, self._ask(lambda: self.nvml.nvmlDeviceGetPowerUsage(self.gpu) / 1e3) if joules is None else None

    def _ask(self, question) -> float | None:
        """An answer, or None if this GPU has none. Other errors of NVML, such as a GPU that is lost, are raised."""
        try:
            return question()
        except self.nvml.NVMLError as error:
            if error.value in (self.nvml.NVML_ERROR_NOT_SUPPORTED, self.nvml.NVML_ERROR_NO_PERMISSION):
                return None
            raise


def open_sensor(device: torch.device, local_rank: int) -> Sensor:
    """NVML's sensor of a GPU, the host's for a CPU. Raises UserError if the package is not installed."""
    if device.type == "cpu":
        return HostSensor(device, local_rank)
    try:
        import pynvml
    except ModuleNotFoundError as error:
        fix = "python3 prepare.py --name nvidia installs it, --telemetry_seconds 0 does without"
        raise UserError(f"reading a GPU's power needs the package nvidia-ml-py, which is not installed: {fix}") from error
    return NvmlSensor(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")

"""The package that asks NVML, real, against a library that answers as a driver does: built here from a few lines of C."""

import os
import subprocess
import sys

import pytest
import torch
from base.backends.cpu.telemetry import HostSensor
from base.backends.nvidia.telemetry import open_sensor

from base.backend import load_backend
from base.distributed import check_cards
from base.errors import UserError
from tests.conftest import ROOT

LIBRARY = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
static unsigned long long millijoules = 5000000;
int nvmlInitWithFlags(unsigned flags) { return INIT; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = &millijoules; return strcmp(uuid, "GPU-1-2") ? 6 : 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *value) { *value = millijoules += 1500; return ENERGY; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 287650; return POWER; }
int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) { rates->gpu = 97; rates->memory = 61; return UTILISATION; }
int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *mhz) { *mhz = type == 1 ? 1410 : 1215; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) { memory->total = 80ull << 30; memory->used = 41ull << 30; return MEMORY; }
"""
ASK = """
import pynvml
from base.backends.nvidia.telemetry import NvmlSensor
try:
    sensor = NvmlSensor(pynvml, {uuid!r})
    print(tuple(sensor.read()), sensor.read().joules, sensor.missing)
except pynvml.NVMLError as error:
    print("raised", error)
"""


def answers(folder, uuid: str = "GPU-1-2", **codes: int) -> str:
    """What the sensor makes of a driver whose calls return these codes, the others 0."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: python3 prepare.py --name nvidia")
    (folder / "nvml.c").write_text(LIBRARY)
    defined = [f"-D{name}={codes.get(name, 0)}" for name in ("INIT", "ENERGY", "POWER", "UTILISATION", "MEMORY")]
    subprocess.run(["gcc", "-shared", "-fPIC", *defined, "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", ASK.format(uuid=uuid)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_energy_is_the_drivers_counter(tmp_path):
    assert answers(tmp_path) == f"({41 << 30}, None, 5001.5, 0.97, 1410000000.0) 5003.0"


def test_before_volta_there_is_only_the_power(tmp_path):
    assert answers(tmp_path, ENERGY=3) == f"({41 << 30}, 287.65, None, 0.97, 1410000000.0) None"


def test_what_a_gpu_does_not_tell(tmp_path):
    said = answers(tmp_path, ENERGY=3, POWER=3, UTILISATION=4)
    assert said == f"({41 << 30}, None, None, None, 1410000000.0) None NVML tells neither the energy nor the power of GPU-1-2"


@pytest.mark.parametrize("codes, why", [({"INIT": 9}, "Driver Not Loaded"), ({"MEMORY": 15}, "GPU is lost"), ({"uuid": "GPU-3"}, "Not Found")])
def test_other_errors_are_raised(tmp_path, codes, why):
    assert answers(tmp_path, **codes) == f"raised {why}"


def test_on_a_cpu_it_is_the_hosts():
    assert isinstance(open_sensor(torch.device("cpu"), 0), HostSensor)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match=r"needs the package nvidia-ml-py.*prepare.py --name nvidia"):
        open_sensor(torch.device("cuda", 0), 0)


GPUS = ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "Tesla V100-SXM2-16GB", "A100-SXM4-40GB", "GeForce RTX 2080 Ti", "Quadro RTX 6000", "TITAN V"]


@pytest.mark.parametrize("other", ["Iluvatar BI-V100", "AMD Instinct MI300X", "BI-V150", "MetaX C550"])
def test_cards_of_other_vendors_are_refused(other):
    backend = load_backend("nvidia")
    check_cards(backend, GPUS)
    with pytest.raises(UserError, match=f"this machine has '{other}'"):
        check_cards(backend, [other])

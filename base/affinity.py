"""Keeps a rank on the CPU cores beside its device. Memory then comes from there too: Linux gives a page where it is first written."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

PCI_DEVICES, CPUS = Path("/sys/bus/pci/devices"), Path("/sys/devices/system/cpu")


def bind(device: torch.device, devices: Sequence[int]) -> str:
    """Binds this process, and what it starts from now on, to its share of the cores beside ``device``, one of the ``devices`` here
    that each have a rank. Returns what was done, or why nothing was."""
    allowed = os.sched_getaffinity(0)
    try:
        addresses = [pci_address(torch.device(device.type, index)) for index in devices]
        mine = share([cores_beside(address) & allowed for address in addresses], devices.index(device.index))
    except (AttributeError, OSError, ValueError) as error:
        return f"not bound to cores, as it is unknown which lie beside {device}: {error}"
    if not mine:
        return f"not bound to cores: too few that this process may use lie beside {pci_address(device)}"
    os.sched_setaffinity(0, mine)
    return f"bound to {len(mine)} cores beside {pci_address(device)}: {' '.join(map(str, sorted(mine)))}"


def pci_address(device: torch.device) -> str:
    """Such as "0000:3b:00.0". Raises AttributeError if torch does not know it."""
    found = torch.get_device_module(device).get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def cores_beside(address: str) -> set[int]:
    """The cores that Linux calls local to a PCI device. Raises OSError or ValueError if it does not say."""
    return cpu_list((PCI_DEVICES / address / "local_cpulist").read_text())


def share(beside: Sequence[set[int]], rank: int) -> set[int]:
    """A rank's part of its cores, where ranks have the same ones; both threads of a core stay together where there are enough."""
    same = [other for other, cores in enumerate(beside) if cores == beside[rank]]
    first = {core: min(cpu_list((CPUS / f"cpu{core}/topology/thread_siblings_list").read_text())) for core in beside[rank]}
    ordered = sorted(beside[rank], key=lambda core: (first[core], core))
    size, place = len(ordered) // len(same), same.index(rank)
    return set(ordered[place * size : (place + 1) * size])


def cpu_list(text: str) -> set[int]:
    """Linux's notation for a set of cores, "0-3,8" → {0, 1, 2, 3, 8}. Raises ValueError for anything else."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}

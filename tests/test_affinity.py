"""Ranks beside their devices: on a machine's description that the test writes."""

import os
from types import SimpleNamespace

import pytest
import torch

from base import affinity


@pytest.fixture
def two_sockets(tmp_path, monkeypatch):
    """Four devices on two sockets of four cores with two threads each, numbered as Linux does: 0-3 and 8-11, 4-7 and 12-15."""
    for device in range(4):
        folder = tmp_path / f"pci/0000:{0x3A + device:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text("0-3,8-11\n" if device < 2 else "4-7,12-15\n")
    for core in range(16):
        folder = tmp_path / f"cpu/cpu{core}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 8},{core % 8 + 8}\n")
    monkeypatch.setattr(affinity, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(affinity, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    properties = lambda device: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3A + device.index, pci_device_id=0)  # noqa: E731
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(get_device_properties=properties))
    return bound


def test_ranks_share_the_cores_beside_their_devices(two_sockets):
    said = [affinity.bind(torch.device("cuda", index), range(4)) for index in range(4)]
    assert two_sockets == [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15}]
    assert said[3] == "bound to 4 cores beside 0000:3d:00.0: 6 7 14 15"


def test_cores_that_a_process_may_not_use_are_left_alone(two_sockets, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 8, 9, 4})
    said = [affinity.bind(torch.device("cuda", index), range(4)) for index in range(4)]
    assert two_sockets == [{0}, {8}]
    assert all("too few" in line for line in said[2:])


def test_a_machine_that_does_not_say_is_left_alone(two_sockets, tmp_path):
    (tmp_path / "pci/0000:3b:00.0/local_cpulist").unlink()
    assert "0000:3b:00.0" in affinity.bind(torch.device("cuda", 0), range(2)) and not two_sockets


@pytest.mark.parametrize(("text", "cores"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set())])
def test_lists_of_cores(text, cores):
    assert affinity.cpu_list(text) == cores
    with pytest.raises(ValueError, match="invalid"):
        affinity.cpu_list("0-x")

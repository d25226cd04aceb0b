"""Work on several processes of this machine, outside a run."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def on_ranks(count: int, work: Callable, *arguments) -> list:
    """What ``work(*arguments)`` returns on each of ``count`` processes, in whose environment `base.reach.join` finds the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ssd-ranks-") as folder:
        torch.multiprocessing.spawn(_rank, (count, port, folder, work, arguments), nprocs=count)
        return [torch.load(Path(folder, f"{rank}.pt"), map_location="cpu") for rank in range(count)]


def _rank(rank: int, count: int, port: int, folder: str, work: Callable, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.save(work(*arguments), Path(folder, f"{rank}.pt"))

"""The ranks of a run: who I am, and the few things that ranks tell each other outside the training step."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from base.backends import DEFAULT_BACKEND
from base.errors import UserError
from base.watchdog import Watchdog


class AgreedError(UserError):
    """An error that every rank raises at the same place; the first rank of each machine prints it."""

    def __init__(self, message: str, code: int = UserError.code):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Ranks:
    """This process among the ``world_size`` of the run; ``control`` is a CPU process group beside the device's own."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    timeout: timedelta | None = None  # of what ranks do together
    local_rank: int = 0  # among those of this machine
    hosts: tuple[str, ...] = ()  # of each rank
    store: Any = None  # where the ranks met
    watchdog: Watchdog | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the records."""
        return self.rank == 0

    def alive(self) -> None:
        """Tells the watchdog that this rank makes progress."""
        if self.watchdog:
            self.watchdog.alive()

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        self.alive()
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        self.alive()
        return tensor.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of ranks."""
        self.alive()
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        self.alive()
        return values

    def first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives on the first rank, which alone calls it, on every rank. Its UserError is an AgreedError on all."""
        made, failure = None, None
        if self.is_first:
            try:
                made = make()
            except UserError as error:
                failure = error
        made, failure = self._broadcast([made, failure])
        if failure:
            raise AgreedError(str(failure), failure.code) from failure
        return made

    def _broadcast(self, values: list[Any]) -> list[Any]:
        self.alive()
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.control)
            self.alive()
        return values

    def neighbours(self, count: int) -> Any:
        """The process group, on the device, of this rank and those beside it, ``count`` in a row (0: all); None if it is alone.

        Every rank has to call it, as every rank takes part in making the groups.
        """
        count = count or self.world_size
        if count == 1:
            return None
        rows = [list(range(first, first + count)) for first in range(0, self.world_size, count)]
        return [dist.new_group(row, timeout=self.timeout) for row in rows][self.rank // count]


def device_type(wanted: str) -> str:
    """``auto`` → the machine's accelerator, or cpu; anything else as it stands."""
    if wanted != "auto":
        return wanted
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def devices_here(kind: str) -> int | None:
    """How many devices of a type this machine has; None for the CPU, which any number of processes can share.

    Raises UserError if this torch cannot use the type at all.
    """
    if kind == "cpu":
        return None
    try:
        module = torch.get_device_module(kind)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"device {kind!r} is not a device type of this torch ({torch.__version__}); use --device cpu or auto") from error
    return module.device_count() if module.is_available() else 0


def device_names(kind: str) -> list[str]:
    """What the driver calls this machine's devices of a type that `devices_here` found; the CPU has none."""
    return [] if kind == "cpu" else [torch.get_device_module(kind).get_device_name(index) for index in range(devices_here(kind))]


def device_for(backend, wanted: str) -> str:
    """The torch device type that a user wants, or with ``auto`` a backend. Raises UserError if this machine has none, or another vendor's."""
    kind = device_type(wanted if wanted != "auto" else backend.device)
    if devices_here(kind) == 0:
        needs = f"backend {backend.name} needs a {kind} device and this machine has none"
        lacks = needs if wanted == "auto" else f"this machine has no {kind} device"
        raise UserError(f"{lacks}; --name {DEFAULT_BACKEND} runs here, and --device cpu takes what {backend.name} does on a CPU")
    check_cards(backend, device_names(kind))
    return kind


def one_device(backend, wanted: str) -> torch.device:
    """`device_for`, and of a ``wanted`` such as cuda:1 the second of them."""
    kind, sign, number = wanted.partition(":")
    return torch.device(device_for(backend, kind) + sign + number)


def check_cards(backend, names: list[str]) -> None:
    """Raises UserError if a device's name does not begin as ``backend.cards`` says: another vendor's torch has the same device type."""
    if other := [name for name in names if backend.cards and not re.match(backend.cards, name)]:
        what = f"backend {backend.name} is for devices whose names begin with {backend.cards}, and this machine has {other[0]!r}"
        raise UserError(f"{what}; --list shows the other backends")

"""The ranks of a run: who I am, and the few things that ranks tell each other outside the training step."""

import contextlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from base.errors import UserError

REACH = 60  # seconds within which all ranks have to come, and then a first all-reduce has to work


class AgreedError(UserError):
    """An error that every rank raises at the same place; the first rank of each machine prints it."""


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

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the records."""
        return self.rank == 0

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on the first rank, on every rank. If it raises UserError, all of them raise AgreedError."""
        if self.world_size == 1:
            return make()
        told = [None, ""]
        if self.is_first:
            try:
                told[0] = make()
            except UserError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1]:
            raise AgreedError(told[1])
        return told[0]

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


def check_cards(backend, names: list[str]) -> None:
    """Raises UserError if a device's name does not begin as ``backend.cards`` says: another vendor's torch has the same device type."""
    if other := [name for name in names if backend.cards and not re.match(backend.cards, name)]:
        what = f"backend {backend.name} is for devices whose names begin with {backend.cards}, and this machine has {other[0]!r}"
        raise UserError(f"{what}; --list shows the other backends")


def join(wanted_device: str, wanted_group: str, timeout: int, device_ids: Sequence[int] = ()) -> Ranks:
    """Joins the process groups that torchrun's environment describes, once every rank is there, and proves that all reach each other.

    ``timeout`` in seconds, ``device_ids`` of this machine's ranks. Raises AgreedError naming the ranks that do not come.
    """
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    kind = device_type(wanted_device)
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, device_ids[local] if device_ids else local)
    if kind != "cpu":
        torch.get_device_module(kind).set_device(device)
    if world_size == 1:
        return Ranks(rank, world_size, device, local_rank=local)
    group = wanted_group if wanted_group != "auto" else dist.get_default_backend_for_device(device)
    nodes = os.environ.get("SSD_HOSTS", platform.node()).split()  # by the launcher
    hosts = tuple(nodes[number * len(nodes) // world_size] for number in range(world_size))
    limit = timedelta(seconds=timeout - 3 * grace(timeout))
    try:
        store = meeting_place(rank, world_size)
    except dist.DistError as error:
        raise AgreedError(f"{hosts[rank]} cannot reach {hosts[0]}, where the ranks meet: {first_line(error)}") from error
    ranks = Ranks(rank, world_size, device, None, limit, local, hosts, store)
    if missing := absent(ranks, "join", REACH):
        raise AgreedError(f"{named(missing, hosts)} did not come within {REACH} s")
    everyone = named(range(world_size), hosts)
    advice = "is there a firewall, or does a host take the wrong network interface (for gloo, GLOO_SOCKET_IFNAME names the right one)?"
    failed = f"an all-reduce over {group} did not work within {REACH} s between {everyone}: {advice}"
    alarm = threading.Timer(REACH, give_up, [failed if local == 0 else ""])  # a library that hangs raises nothing
    alarm.daemon = True
    alarm.start()
    try:
        dist.init_process_group(group, store=store, rank=rank, world_size=world_size, timeout=limit)
        control = dist.group.WORLD if group == "gloo" else dist.new_group(backend="gloo", timeout=limit)
        for each, place in ((dist.group.WORLD, device), (control, "cpu")):
            total = torch.ones(1, device=place)
            dist.all_reduce(total, group=each)
            if total.item() != world_size:
                raise AgreedError(f"an all-reduce of ones over {group} gave {total.item()} between {everyone}")
    except RuntimeError as error:
        raise AgreedError(f"an all-reduce over {group} failed between {everyone} ({first_line(error)}): {advice}") from error
    finally:
        alarm.cancel()
    store.set_timeout(limit)
    if len(set(hosts)) > 1:
        threading.Thread(target=answer, args=(meeting_place(rank, world_size), rank), daemon=True).start()
    return replace(ranks, control=control)


def meeting_place(rank: int, world_size: int) -> dist.Store:
    """A connection to the store of this attempt to run."""
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=REACH)))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def answer(store: dist.Store, rank: int) -> None:
    """Answers when a rank calls the roll for lost ones, although this rank's main thread may be waiting for one of them too."""
    with contextlib.suppress(dist.DistError):  # the run is over
        store.wait(["lost"], timedelta(days=20))  # about the most that fits into 31 bits of milliseconds
        store.set(f"lost {rank}", "here")


def give_up(message: str) -> None:
    """Ends a process whose main thread is stuck."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def absent(ranks: Ranks, roll: str, seconds: float) -> list[int]:
    """The ranks that do not answer this call of the roll in so many seconds."""
    keys = [f"{roll} {rank}" for rank in range(ranks.world_size)]
    ranks.store.set(keys[ranks.rank], "here")
    ranks.store.set(roll, "called")
    try:
        ranks.store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return [rank for rank, key in enumerate(keys) if not ranks.store.check([key])]
    return []


def named(some: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their hosts, such as ``alpha (ranks 0 1), beta (rank 2)``."""
    of_host: dict[str, list[str]] = {}
    for rank in some:
        of_host.setdefault(hosts[rank], []).append(str(rank))
    return ", ".join(f"{host} (rank{'s' * (len(own) > 1)} {' '.join(own)})" for host, own in of_host.items())


def grace(timeout: float) -> float:
    """Seconds of ``timeout`` kept for finding out who is lost, once an exchange has failed; twice as many are kept for ending."""
    return min(5.0, timeout / 8)


def lost(error: RuntimeError, ranks: Ranks, timeout: float) -> str | None:
    """Which ranks of other machines do not answer any more, if it is an exchange between machines that failed, else None."""
    if len(set(ranks.hosts)) < 2 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    found: list[list[int]] = []

    def call_roll() -> None:
        with contextlib.suppress(dist.DistError):
            found.append(absent(ranks, "lost", grace(timeout)))

    call = threading.Thread(target=call_roll, daemon=True)  # it hangs if the store's machine is the lost one
    call.start()
    call.join(1.5 * grace(timeout))
    if not found:
        return f"{ranks.hosts[0]} (rank 0), where the ranks met, does not answer any more: {first_line(error)}"
    if found[0]:
        return f"no answer from {named(found[0], ranks.hosts)}: {first_line(error)}"
    others = [rank for rank, host in enumerate(ranks.hosts) if host != ranks.hosts[ranks.rank]]
    return f"an exchange with {named(others, ranks.hosts)} failed, although all of them answer: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an error of torch.distributed says, without its advice and stack."""
    return re.split(r"\n|\. This ", str(error))[0]


def leave() -> None:
    """Closes the process groups, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""How the ranks of a run find each other, prove that they reach each other, and tell who is lost when an exchange fails."""

import contextlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from base.distributed import AgreedError, Ranks, device_type
from base.errors import LostProcess, UserError
from base.watchdog import Watchdog, note_error

REACH = 60  # seconds within which all ranks have to come, and then a first all-reduce has to work
PATIENCE = 30  # seconds that an exchange waits longer than a watchdog where a rank that hangs can only be one of this machine's


def join(
    wanted_device: str, wanted_group: str, timeout: float, device_ids: Sequence[int] = (), watchdog: Watchdog | None = None
) -> Ranks:
    """Joins the process groups that torchrun's environment describes, once every rank is there, and proves that all reach each other.

    ``timeout`` in seconds: with a rank of another machine lost, the others are to have ended within it; where all are on one machine,
    watchdogs end first what hangs. ``device_ids`` of this machine's ranks. Raises AgreedError naming the ranks that do not come.
    """
    rank, world_size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    kind = device_type(wanted_device)
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, device_ids[local] if device_ids else local)
    if kind != "cpu":
        torch.get_device_module(kind).set_device(device)
    if world_size == 1:
        return Ranks(rank, world_size, device, local_rank=local, watchdog=watchdog)
    group = wanted_group if wanted_group != "auto" else dist.get_default_backend_for_device(device)
    nodes = os.environ.get("SSD_HOSTS", platform.node()).split()  # by the launcher
    hosts = tuple(nodes[number * len(nodes) // world_size] for number in range(world_size))
    limit = timedelta(seconds=timeout - 3 * grace(timeout) if len(set(hosts)) > 1 else timeout + PATIENCE)
    try:
        store = meeting_place(rank, world_size)
        ranks = Ranks(rank, world_size, device, None, limit, local, hosts, store, watchdog)
        missing = absent(ranks, "join", REACH)
    except dist.DistError as error:
        raise AgreedError(f"{hosts[rank]} cannot reach {hosts[0]}, where the ranks meet: {first_line(error)}", LostProcess.code) from error
    if missing:
        raise AgreedError(f"{named(missing, hosts)} did not come within {REACH} s", LostProcess.code)
    everyone = named(range(world_size), hosts)
    advice = "is there a firewall, or does a host take the wrong network interface (for gloo, GLOO_SOCKET_IFNAME names the right one)?"
    failed = f"an all-reduce over {group} did not work within {REACH} s between {everyone}: {advice}"
    alarm = threading.Timer(REACH, give_up, [LostProcess.code, failed])  # a library that hangs raises nothing
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
        text = f"an all-reduce over {group} failed between {everyone} ({first_line(error)}): {advice}"
        raise AgreedError(text, LostProcess.code) from error
    finally:
        alarm.cancel()
    store.set_timeout(limit)
    if len(set(hosts)) > 1:
        threading.Thread(target=answer, args=(meeting_place(rank, world_size), rank), daemon=True).start()
    return replace(ranks, control=control)


def meeting_place(rank: int, world_size: int) -> dist.Store:
    """A connection to the store of the launchers, or of the first rank where there are none."""
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=REACH)))
    return store


def answer(store: dist.Store, rank: int) -> None:
    """Answers when a rank calls the roll for lost ones, although this rank's main thread may be waiting for one of them too."""
    with contextlib.suppress(dist.DistError):  # the run is over
        store.wait(["lost"], timedelta(days=20))  # about the most that fits into 31 bits of milliseconds
        store.set(f"lost {rank}", "here")


def give_up(code: int, message: str) -> None:
    """Ends a process whose main thread is stuck, at once: what was sent to a lost rank would be waited for. The launcher says why."""
    note_error(code, message)
    os._exit(code)


def tell(error: UserError, ranks: Ranks) -> None:
    """Leaves the error that this rank alone ends with, for those that lose it."""
    if ranks.store is not None:
        with contextlib.suppress(dist.DistError):  # this machine's launcher says it anyway
            ranks.store.set("error", json.dumps([error.code, f"{named([ranks.rank], ranks.hosts)}: {error}"]))


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


def lost(error: RuntimeError, ranks: Ranks, timeout: float) -> tuple[int, str] | None:
    """If it is an exchange between machines that failed, else None: → exit code, and which ranks of others do not answer any more."""
    if len(set(ranks.hosts)) < 2 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    found: list[list[int]] = []
    told: list[tuple[int, str]] = []

    def call_roll() -> None:
        with contextlib.suppress(dist.DistError):
            if ranks.store.check(["error"]):
                told.append(tuple(json.loads(ranks.store.get("error"))))
            else:
                found.append(absent(ranks, "lost", grace(timeout)))

    call = threading.Thread(target=call_roll, daemon=True)  # it hangs if the store's machine is the lost one
    call.start()
    call.join(1.5 * grace(timeout))
    if told:
        return told[0]
    if not found:
        return LostProcess.code, f"{ranks.hosts[0]} (rank 0), where the ranks met, does not answer any more: {first_line(error)}"
    if found[0]:
        if ranks.hosts[ranks.rank] == ranks.hosts[0]:
            time.sleep(1.5 * grace(timeout))  # the store ends with this machine's launcher, and others may still call the roll
        return LostProcess.code, f"no answer from {named(found[0], ranks.hosts)}: {first_line(error)}"
    if ranks.watchdog:
        time.sleep(PATIENCE)  # one of them may hang: its watchdog says where, and this rank's ends it meanwhile
    others = [rank for rank, host in enumerate(ranks.hosts) if host != ranks.hosts[ranks.rank]]
    return LostProcess.code, f"an exchange with {named(others, ranks.hosts)} failed, although all of them answer: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an error of torch.distributed says, without its advice and stack."""
    return re.split(r"\n|\. This ", str(error))[0]


def leave() -> None:
    """Closes the process groups, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""Before a run of several nodes: they meet, and what has to be the same on all of them is compared.

Node 0 listens at ``--rdzv_endpoint`` until every node has come or the time is over. Each node, itself too, sends it one line of JSON there and
gets the verdict back, which is the same for all. Then the port is free for torchrun.
"""

import argparse
import contextlib
import fcntl
import json
import os
import platform
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.backends import backend_folder
from base.config import Config
from base.errors import UserError
from data_sets.coco_json import digest
from data_sets.index import AnnotationIndex

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
# What may differ between nodes: where things lie, and how much of a machine is used. Weights are compared by content.
OWN = {"data_dir", "runs_dir", "backbone_path", "checkpoint", "device_ids", "bind_cores", "workers", "telemetry_seconds"}
LINE = 1 << 20  # bytes of a report at most
DIGITS = 16  # of a sum, hexadecimal
SHOWN = 6  # differences, and nodes with the same value, that a message lists at most


@dataclass(frozen=True)
class Meeting:
    """What a node takes along from a successful meeting."""

    number: int  # of this node
    hosts: list[str]  # names of all nodes' hosts, by number
    interface: str | None  # the network interface to the other nodes, where it can be told


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--node_rank", type=int, default=None, help="which node this is, with more than one (default: as they come)")
    parser.add_argument("--rdzv_endpoint", default=None, help="HOST:PORT where the nodes meet: of node 0, and free")
    parser.add_argument("--rdzv_id", default="ssd", help="name of the meeting, the same on all nodes")
    parser.add_argument("--preflight_timeout", type=int, default=60, metavar="SECONDS", help="how long nodes wait for each other to start")


def check_flags(flags: argparse.Namespace, nodes: int) -> None:
    """Raises UserError for flags that do not fit the number of nodes."""
    last = nodes - 1
    if flags.node_rank is not None and not 0 <= flags.node_rank <= last:
        raise UserError(f"--node_rank {flags.node_rank} is not one of {nodes} nodes, which are 0…{last}; --nodes sets how many there are")
    if nodes > 1 and not re.fullmatch(r".+:\d{1,5}", flags.rdzv_endpoint or ""):
        given = "is missing" if flags.rdzv_endpoint is None else f"is {flags.rdzv_endpoint!r}"
        raise UserError(f"{nodes} nodes need --rdzv_endpoint HOST:PORT (and --node_rank 0…{last}) on each of them; it {given}")


def torchrun_place(flags: argparse.Namespace, nodes: int, attempt: int) -> list[str]:
    """torchrun's arguments for where this node is; N: the number that the meeting gives. Nodes find only those in the same ``attempt``."""
    if nodes == 1:
        return ["--standalone"]
    number = "N" if flags.node_rank is None else str(flags.node_rank)
    meeting = flags.rdzv_id + f"-{attempt}" * bool(attempt)
    where = ["--nnodes", str(nodes), "--rdzv-endpoint", flags.rdzv_endpoint, "--rdzv-id", meeting, "--rdzv-backend", "static"]
    return [*where, "--rdzv-conf", "timeout=60", "--node-rank", number]


def meet_nodes(flags: argparse.Namespace, name: str, backend: Any, config: Config) -> None:
    """Compares this node with the others, and sets its number and what its ranks need to reach theirs. Raises UserError, as `meet`."""
    met = meet(flags, config.nodes, facts(config, name, backend, bool(flags.resume), flags.rdzv_id))
    hosts = ", ".join(f"{host} (node {number})" for number, host in enumerate(met.hosts))
    print(f"{hosts}: the same code, configuration, torch and data; this is node {met.number}", flush=True)
    alone = [host if met.hosts.count(host) == 1 else f"{host}#{number}" for number, host in enumerate(met.hosts)]
    flags.node_rank, os.environ["SSD_HOSTS"] = met.number, " ".join(alone)
    if met.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", met.interface)  # else Gloo takes that of the host's name, often the loopback


def facts(config: Config, name: str, backend: Any, resume: bool, run: str) -> dict[str, str]:
    """What has to be the same on all nodes, each under the name that a message gives it."""
    import torch

    from base.checkpoint import found_in
    from base.distributed import device_type

    found = {"--rdzv_id": run, "backend": name, "torch": torch.__version__, "Python": platform.python_version()}
    found["device type"] = device_type(config.device if config.device != "auto" else backend.device)
    found["--resume"] = "given" if resume else "not given"
    found |= {key: json.dumps(value) for key, value in config.model_dump(mode="json").items() if key not in OWN}
    for key in ("train_annotations", "val_annotations"):
        found[f"SHA-256 of {getattr(config, key)}"] = AnnotationIndex.open(config.path(key)).sha256[:DIGITS]
    for key in ("backbone_path", "checkpoint"):
        if path := getattr(config, key):
            found[f"SHA-256 of --{key}"] = digest(found_in(path))[:DIGITS]
    return found | code({name, "reference", *backend.suppliers.values()})


def code(backends: Iterable[str]) -> dict[str, str]:
    """The sums of the project's source files and those of the backends that a run uses, without tests."""
    found = {}
    for folder in (ROOT / "base", ROOT / "data_sets", ROOT / "formats", *(backend_folder(name) for name in sorted(backends))):
        for path in sorted(folder.rglob("*")):
            if path.suffix in CODE and "tests" not in path.relative_to(folder).parts:
                found[f"file {path.relative_to(folder.parent)}"] = digest(path)[:DIGITS]
    return found


def meet(flags: argparse.Namespace, nodes: int, found: Mapping[str, str], failure: str = "", host: str = "") -> Meeting:
    """Meets the other nodes and compares ``found``; ``failure``: why this node cannot take part, for the others to know.

    Raises UserError naming every host that does not answer, cannot take part or differs. It takes ``--preflight_timeout`` seconds at most.
    """
    place, _, port = flags.rdzv_endpoint.rpartition(":")
    place, host = place.strip("[]"), host or platform.node()
    deadline = time.monotonic() + flags.preflight_timeout
    desk = None
    if (listener := _listener(place, int(port), flags.node_rank, host)) is not None:
        expected = host_names(os.environ.get("SLURM_JOB_NODELIST", ""))
        desk = threading.Thread(target=_receive, args=(listener, nodes, flags.preflight_timeout, expected), daemon=True)
        desk.start()
    number = 0 if desk and flags.node_rank is None else flags.node_rank
    report = {"host": host, "number": number, "failure": failure, "facts": dict(found)}
    verdict, address = _ask(place, int(port), report, deadline)
    if desk:
        desk.join()
        address = verdict["address"] or address
    if verdict["faults"]:
        raise UserError("\n       ".join([f"the {nodes} nodes cannot train together:", *verdict["faults"]]))
    return Meeting(verdict["number"], verdict["hosts"], interface_of(address))


def _listener(place: str, port: int, number: int | None, host: str) -> socket.socket | None:
    """The socket where nodes arrive, if this is node 0: by its number, or else because the endpoint's address is one of this machine."""
    if number == 0:
        both = socket.has_dualstack_ipv6()
        try:
            return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both)
        except OSError as error:
            raise UserError(f"port {port} of {host} cannot be listened at ({os.strerror(error.errno)}); choose another in --rdzv_endpoint") from error
    if number is None:
        with contextlib.suppress(OSError):  # unknown names are reported by whoever connects
            for family, _, _, _, address in socket.getaddrinfo(place, port, type=socket.SOCK_STREAM):
                with contextlib.suppress(OSError):
                    return socket.create_server(address[:2], family=family, backlog=1024)
    return None


def _receive(listener: socket.socket, nodes: int, seconds: int, expected: list[str]) -> None:
    """Node 0's side: takes reports until all nodes have come, or until one of them can wait no longer; then tells them the verdict."""
    deadline = time.monotonic() + seconds
    arrived: list[tuple[dict, socket.socket]] = []
    with listener:
        while len(arrived) < nodes and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
                connection.settimeout(5)
                report = checked(json.loads(connection.makefile("rb").readline(LINE)))
                deadline = min(deadline, time.monotonic() + report["seconds"])
                arrived = [pair for pair in arrived if _still_there(pair[1])]  # a node that was started anew comes twice
                arrived.append((report, connection))
            except (OSError, ValueError, LookupError, TypeError):
                continue  # a stranger, or the time is over
    numbers, faults = judge([report for report, _ in arrived], nodes, seconds, expected)
    hosts = [report["host"] for _, (report, _) in sorted(zip(numbers, arrived, strict=True), key=lambda pair: pair[0])]
    # the address by which the others reach this machine
    address = next((c.getsockname()[0] for n, (_, c) in zip(numbers, arrived, strict=True) if n), "")
    for number, (_, connection) in zip(numbers, arrived, strict=True):
        verdict = {"number": number, "hosts": hosts, "faults": faults, "address": address}
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(verdict).encode() + b"\n")
    for _, connection in arrived:
        with connection, contextlib.suppress(OSError):
            connection.recv(1)  # the other side closes first, so that the port is free at once


def checked(report: Any) -> dict:
    """A node's report, as it may be of a stranger. Raises ValueError, TypeError or LookupError if it is none."""
    kinds = {"host": str, "number": int | None, "failure": str, "facts": dict, "seconds": int | float}
    if not all(isinstance(report[key], kind) for key, kind in kinds.items()) or not 0 <= report["seconds"] < 86_400:
        raise ValueError("not a report")
    if not all(isinstance(text, str) for fact in report["facts"].items() for text in fact):
        raise ValueError("not a report")
    return {**report, **{key: "".join(c if c.isprintable() else "?" for c in report[key]) for key in ("host", "failure")}}


def _still_there(connection: socket.socket) -> bool:
    """Whether the other side, which says no more than its report, has not closed the connection."""
    return not select.select([connection], [], [], 0)[0]


def _ask(place: str, port: int, report: dict, deadline: float) -> tuple[dict, str]:
    """Sends a node's report until it is taken: → (node 0's verdict, this machine's address on the way there)."""
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((place, port), timeout=min(left, 5)) as connection:
                connection.settimeout(left)
                line = json.dumps({**report, "seconds": left - 1})  # so that the verdict is here in time
                connection.sendall(line.encode() + b"\n")
                why = "what listens there does not answer as node 0 of a run does"
                verdict = json.loads(connection.makefile("rb").readline())
                return verdict, connection.getsockname()[0]
        except socket.gaierror as error:
            why = f"the name {place} is not known: {error.strerror}"
            if error.errno != socket.EAI_AGAIN:
                break
        except TimeoutError:
            pass
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or why
        time.sleep(0.3)
    raise UserError(
        f"node 0 cannot be reached at {place}:{port} from {report['host']} ({why}); --rdzv_endpoint must name node 0's host, where the same "
        "command has to be started, and a port that no firewall closes"
    )


def judge(reports: list[dict], nodes: int, seconds: int, expected: Iterable[str] = ()) -> tuple[list[int], list[str]]:
    """→ (each report's node number, what is wrong, a line each). Nodes without a number get one in the order of their arrival."""
    free = [number for number in range(nodes) if number not in {report["number"] for report in reports}]
    numbers = [free.pop(0) if report["number"] is None else report["number"] for report in reports]
    placed = sorted(zip(numbers, reports, strict=True), key=lambda pair: pair[0])
    names = [f"{report['host']} (node {number})" for number, report in placed]
    faults = []
    for number in sorted(set(numbers)):
        if len(same := [report["host"] for n, report in placed if n == number]) > 1:
            faults.append(f"--node_rank {number} was given on {' and on '.join(same)}")
    if free:
        here = {report["host"].partition(".")[0] for report in reports}
        lost = [name for name in expected if name.partition(".")[0] not in here]
        who = f"node {_some(map(str, free))}" + (f" (of the job's hosts {_some(lost)})" if lost else "")
        faults.append(f"{who} did not answer within {seconds} s; answered: {_some(names)}")
    faults += [f"{name}: {report['failure']}" for name, (_, report) in zip(names, placed, strict=True) if report["failure"]]
    able = {name: report["facts"] for name, (_, report) in zip(names, placed, strict=True) if not report["failure"]}
    return numbers, faults + differences(able)


def differences(able: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Node → its facts; → a line for each fact that is not the same on all, the rarest value first."""
    found = []
    for key in dict.fromkeys(key for own in able.values() for key in own):
        values: dict[str, list[str]] = {}
        for name, own in able.items():
            values.setdefault(own.get(key, "missing"), []).append(name)
        if len(values) > 1:
            rarest = sorted(values.items(), key=lambda item: len(item[1]))
            found.append(f"{key} differs: " + ", ".join(f"{value} on {_some(names)}" for value, names in rarest))
    return found[:SHOWN] + [f"and {len(found) - SHOWN} more differences"] * (len(found) > SHOWN)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def host_names(text: str) -> list[str]:
    """Slurm's short form of a list of hosts: ``a[1-3,07],b`` → a1 a2 a3 a07 b."""
    names = []
    for part in filter(None, re.split(r",(?![^\[]*\])", text)):
        if not (found := re.fullmatch(r"(.*?)\[([\d,-]+)\](.*)", part)):
            names.append(part)
            continue
        for item in found[2].split(","):
            first, _, last = item.partition("-")
            numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
            names += [name for number in numbers for name in host_names(found[1] + number + found[3])]
    return names


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, such as eth0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address.removeprefix("::ffff:"):
                    return name
    return None

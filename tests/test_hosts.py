"""Several machines: they meet and are compared before a run; a lost one ends it on the others, which name it; it goes on from there."""

import argparse
import contextlib
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from base import checkpoint, reach
from base.errors import LostProcess, UserError
from base.tools import preflight
from base.tools.launch import main
from base.tools.preflight import differences, host_names, judge
from tests import ranks
from tests.conftest import ROOT, Started, losses
from tests.disturbed import assert_same, wait_for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def met(monkeypatch):
    """met({host: (node rank, facts)}, …) → host → its Meeting, or what the error says; each host is a thread."""
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)

    def call(hosts: dict, nodes: int = 2, seconds: int = 20, port: int = 0, failures: dict | None = None) -> dict:
        endpoint = f"127.0.0.1:{port or free_port()}"

        def one(host: str):
            number, facts = hosts[host]
            flags = argparse.Namespace(rdzv_endpoint=endpoint, node_rank=number, preflight_timeout=seconds)
            try:
                return preflight.meet(flags, nodes, facts, (failures or {}).get(host, ""), host)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            return dict(zip(hosts, pool.map(one, hosts), strict=True))

    return call


def connected(port: int) -> socket.socket:
    """A connection, as soon as somebody listens."""
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.01)
    return pytest.fail("nobody listens")


# The meeting


def test_nodes_that_agree_go_on(met):
    found = met({"beta": (1, {"torch": "2.15"}), "alpha": (0, {"torch": "2.15"})})
    assert [found[host].number for host in ("alpha", "beta")] == [0, 1]
    assert all(one.hosts == ["alpha", "beta"] and one.interface == "lo" for one in found.values())


def test_nodes_without_a_number_get_one(met):
    found = met({host: (None, {}) for host in "abcd"}, nodes=4)
    assert sorted(one.number for one in found.values()) == [0, 1, 2, 3]
    for host, one in found.items():
        assert one.hosts[one.number] == host and one.hosts == found["a"].hosts


def test_every_node_is_told_what_differs_and_where(met):
    new, old = {"torch": "2.15.0", "seed": "1"}, {"torch": "2.7.1", "seed": "1"}
    found = met({"a": (0, new), "b": (1, old), "c": (2, new)}, 3)
    assert set(found.values()) == {"the 3 nodes cannot train together:\n       torch differs: 2.7.1 on b (node 1), 2.15.0 on a (node 0), c (node 2)"}


def test_a_node_that_cannot_start_tells_the_others(met):
    found = met({"a": (0, {"torch": "1"}), "b": (1, {})}, failures={"b": "data folder /data does not exist"})
    assert set(found.values()) == {"the 2 nodes cannot train together:\n       b (node 1): data folder /data does not exist"}


def test_the_checks_of_one_machine_are_told_to_the_others(met):
    port, told = free_port(), {}
    other = threading.Thread(target=lambda: told.update(met({"a": (0, {})}, port=port)))
    other.start()
    with pytest.raises(UserError) as caught:
        main(["--data_dir", "/nowhere", "--nodes", "2", "--node-rank", "1", "--rdzv-endpoint", f"127.0.0.1:{port}"])
    other.join()
    assert told["a"] == str(caught.value) and f"{platform.node()} (node 1): data folder /nowhere does not exist" in told["a"]


def test_a_number_that_is_given_twice(met):
    found = met({"a": (0, {}), "b": (1, {}), "c": (1, {})}, 3)
    for said in found.values():
        assert "--node_rank 1 was given on" in said and {"b", "c"} <= set(said.replace("\n", " ").split())
        assert "node 2 did not answer" in said


def test_a_node_that_does_not_come_is_named_in_time(met, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[08-10]")
    began = time.monotonic()
    found = met({"node08": (0, {}), "node10.cluster": (2, {})}, 3, seconds=3)
    assert time.monotonic() - began < 4
    assert set(found.values()) == {
        "the 3 nodes cannot train together:\n       node 1 (of the job's hosts node09) did not answer within 3 s; "
        "answered: node08 (node 0), node10.cluster (node 2)"
    }


def test_a_node_alone_says_why_it_reaches_nobody(met):
    port = free_port()
    said = met({"b": (1, {})}, seconds=2, port=port)["b"]
    assert f"node 0 cannot be reached at 127.0.0.1:{port} from b (Connection refused)" in said
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        assert "does not answer as node 0 of a run does" in met({"b": (1, {})}, seconds=2, port=port)["b"]
        assert f"port {port} of a cannot be listened at (Address already in use)" in met({"a": (0, {})}, seconds=2, port=port)["a"]


def test_strangers_and_nodes_started_anew_do_no_harm(met):
    port, done = free_port(), {}
    first = threading.Thread(target=lambda: done.update(met({"a": (0, {})}, 3, port=port)))
    first.start()
    wrong = b'{"seconds": 9}\n', b'{"host": "x", "number": 1, "failure": "", "facts": {}, "seconds": -9}\n'
    for said in (b"GET / HTTP/1.0\n", b"[]\n", *wrong, b'{"host": "b", "number": 1, "failure": "", "facts": {"old": "x"}, "seconds": 20}\n'):
        with contextlib.closing(connected(port)) as stranger:
            stranger.sendall(said)
    assert met({"b": (1, {}), "c": (2, {})}, 3, port=port)["b"].hosts == ["a", "b", "c"]
    first.join()
    assert done["a"].number == 0


def test_slurms_lists_of_hosts():
    assert host_names("a[1-3,07],b") == ["a1", "a2", "a3", "a07", "b"]
    assert host_names("rack[1-2]n[08-10].x") == [f"rack{r}n{n}.x" for r in (1, 2) for n in ("08", "09", "10")]
    assert host_names("") == [] and host_names("node-1") == ["node-1"]


def test_long_lists_are_cut_short():
    able = {f"n{number}": {f"key {k}": str(number if k else "same") for k in range(10)} for number in range(20)}
    found = differences(able)
    assert len(found) == 7 and found[-1] == "and 3 more differences" and "key 0" not in "".join(found)
    reports = [{"host": f"n{number}", "number": number, "failure": "", "facts": {}} for number in range(50)]
    [said] = judge(reports, 64, 60)[1]
    assert said.startswith("node 50, 51, 52, 53, 54, 55 and 8 more did not answer within 60 s; answered: n0 (node 0), ")
    assert said.endswith(" and 44 more")


def test_code_is_compared_by_content(tmp_path, monkeypatch):
    here = preflight.code({"reference"})
    assert "file base/train.py" in here and "file reference/loss.py" in here and not any("tests" in name for name in here)
    for name in ("base", "data_sets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert preflight.code(()).items() <= here.items()
    with open(tmp_path / "base" / "train.py", "a") as file:
        file.write("# a comment\n")
    [said] = differences({"a": here, "b": {**here, **preflight.code(())}})
    assert said.startswith("file base/train.py differs: ")


# Ranks


def test_ranks_that_do_not_come_are_named(monkeypatch):
    launcher = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launcher.port, "SSD_HOSTS": "alpha beta"}
    here["TORCHELASTIC_USE_AGENT_STORE"] = True  # as torchrun sets it
    for name, value in here.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(reach, "REACH", 1)
    with pytest.raises(UserError, match=r"^alpha \(rank 1\), beta \(ranks 2 3\) did not come within 1 s$"):
        reach.join("cpu", "gloo", 15)


@pytest.mark.long
def test_a_lost_rank_is_told_from_those_that_wait_for_it(tmp_path):
    torch.multiprocessing.spawn(ranks.lose_the_last, (3, free_port(), str(tmp_path)), nprocs=3)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert all(line.startswith("no answer from c (rank 2): ") for line in said), said


# Two hosts: network namespaces with names, addresses and folders of their own, joined by a cable


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


class Hosts:
    """alpha, 10.77.0.1, and beta, 10.77.0.2."""

    names = ("alpha", "beta")

    def __init__(self, folder: Path):
        self.folder, self.spaces = folder, [f"ssd-{os.getpid()}-{name}" for name in self.names]

    def set_up(self) -> None:
        for command in self._commands():
            if (done := ip(*command)).returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {' '.join(command)}: {done.stderr.strip()}")

    def _commands(self):
        alpha, beta = self.spaces
        yield from (["netns", "add", space] for space in self.spaces)
        yield ["link", "add", "cable", "netns", alpha, "type", "veth", "peer", "name", "cable", "netns", beta]
        for number, space in enumerate(self.spaces, 1):
            yield ["-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "cable"]
            yield ["-n", space, "link", "set", "lo", "up"]
            yield ["-n", space, "link", "set", "cable", "up"]

    def cable(self, state: str) -> None:
        assert ip("-n", self.spaces[0], "link", "set", "cable", state).returncode == 0

    def start(self, *flags: str, beta: tuple[str, ...] = (), project: tuple[Path, Path] = (ROOT, ROOT)) -> list[Started]:
        """The same run on both hosts; ``beta``: flags of that host alone."""
        started = []
        for number, (name, space) in enumerate(zip(self.names, self.spaces, strict=True)):
            (self.folder / name).mkdir(exist_ok=True)
            before = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
            where = ["--nnodes", "2", "--node-rank", str(number), "--rdzv-endpoint", "10.77.0.1:29500"]
            own = [*where, *flags, *(beta if number else ())]
            started.append(Started(self.folder / name, own, before=before, project=project[number]))
        return started


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command: apt-get install iproute2")
    both = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        both.set_up()
        yield both
    finally:
        for space in both.spaces:
            ip("netns", "delete", space)


def first_error(run: Started) -> str:
    """The error that a run prints, as soon as it does."""
    return next((line for line in run.process.stderr if line.startswith("error: ")), "")


TRAIN = ["--name", "reference", "--config", "demo", "--device", "cpu", "--image_size", "64", "64", "--strides", *"111111", "--batch_size", "4"]
TRAIN += ["--workers", "0", "--eval_batch_size", "12", "--max_steps", "12", "--eval_every", "0", "--target", "null", "--log_every", "1"]
TRAIN += ["--checkpoint_every", "2", "--run_name", "run"]


@pytest.mark.long
def test_hosts_that_differ_are_told_before_anything_starts(hosts, demo_data, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(demo_data, other)
    annotations = other / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace("[", "[ ", 1))
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs", "data", "build", "tests"))
    with open(project / "reference" / "loss.py", "a") as file:
        file.write("# another version\n")
    both = hosts.start(*TRAIN, "--data_dir", str(demo_data), beta=("--data_dir", str(other), "--seed", "2"), project=(ROOT, project))
    for done in [one.wait_done() for one in both]:
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "the 2 nodes cannot train together:" in done.stderr
        assert "seed differs: 1 on alpha (node 0), 2 on beta (node 1)" in done.stderr
        for what in ("SHA-256 of annotations/instances_val2017.json", "file reference/loss.py"):
            assert f"{what} differs: " in done.stderr
        assert done.stderr.count(" differs: ") == 3
    assert not list(hosts.folder.rglob("run"))


@pytest.mark.long
def test_a_cut_cable_ends_both_sides_and_the_run_goes_on_to_the_same_weights(hosts, demo_data, tmp_path):
    flags = [*TRAIN, "--data_dir", str(demo_data), "--timeout", "20"]
    run = hosts.folder / "alpha" / "runs" / "run"
    both = hosts.start(*flags)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 4, both[0].process)
    hosts.cable("down")
    cut = time.monotonic()
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(first_error, both))
    assert time.monotonic() - cut < 20
    ended = [one.wait_done(60) for one in both]
    hosts.cable("up")
    for said, done, other in zip(errors, ended, ("beta (rank 1)", "alpha (rank 0)"), strict=True):
        assert other in said and f"--resume {hosts.folder}" in said and "on each node" in said
        assert done.returncode == LostProcess.code and "error:" not in done.stderr and "Traceback" not in done.stderr
    assert 4 <= checkpoint.read(checkpoint.listed(run)[0])["progress"]["step"] < 12
    assert not list((hosts.folder / "beta" / "runs" / "run").rglob("*.pt"))  # their disks are not one

    ended = [one.wait_done() for one in hosts.start("--resume", "runs/run")]
    assert [done.returncode for done in ended] == [0, 0], ended
    alone = Started(tmp_path, [*TRAIN, "--data_dir", str(demo_data), "--nproc", "2"]).wait_done()
    assert alone.returncode == 0, alone.stderr
    assert_same(run, tmp_path / "runs" / "run")

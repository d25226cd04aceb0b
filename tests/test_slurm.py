"""run.sub and run_with_docker.sh: what they refuse, what they pass to containers, and two nodes of a real Slurm."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base import checkpoint
from tests.conftest import ROOT, SMALL, losses
from tests.disturbed import steps_done, wait_for

RUN_SUB = ROOT / "nvidia" / "slurm" / "run.sub"
CONTAINERS = [name for name in ("nvidia", "iluvatar") if (ROOT / name / "docker").exists()]
OURS = ("NAME", "CONFIG", "DGXSYSTEM", "DATADIR", "LOGDIR", "NEXP", "CONT", "CLEAR_CACHES", "MASTER_ADDR", "MASTER_PORT")
TINY = [*SMALL, "--backbone", "resnet18", "--batch_size", "4", "--device", "cpu", "--target", "null", "--workers", "0", "--log_every", "1"]


def environment(**values: object) -> dict[str, str]:
    """This process's environment without what the scripts read, and with ``values``."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS and not name.startswith(("SLURM_JOB", "SBATCH"))}
    defaults = {"SSD_PYTHON": sys.executable, "IMAGE": sys.executable, "OMP_NUM_THREADS": "1", "CLEAR_CACHES": "0"}
    return kept | defaults | {name: str(value) for name, value in values.items()}


def call(command: list, folder: Path, **values: object) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment(**values), capture_output=True, text=True, timeout=500)


def program(path: Path, text: str) -> None:
    """A program of the outside, such as docker, that this machine may not have."""
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


def events(log: Path) -> dict[str, object]:
    """key → value of the last such event in a file with lines of MLPerf's log."""
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in log.read_text().splitlines() if line.startswith(":::MLLOG")]
    return {line["key"]: line["value"] for line in lines}


def results(text: str) -> list[str]:
    return re.findall(r"^RESULT,SINGLE_STAGE_DETECTOR,,\d+,reference,\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [AP]M$", text, re.MULTILINE)


# The configuration for sbatch


@pytest.mark.parametrize(
    "name, config, trials, said",
    [
        ("nvidia", "DGXA100", {}, "nvidia DGXA100 1 8 5 02:05:00"),
        ("nvidia", "DGXA100_multi_2x8x56", {"NEXP": 1}, "nvidia DGXA100_multi_2x8x56 2 8 1 00:15:00"),
        ("reference", "DGX1_32", {"NEXP": 5}, "reference DGX1_32 1 1 5 120:00:00"),
    ],
)
def test_a_configuration_is_sourced_as_the_submissions_scripts_were(name, config, trials, said):
    script = f"set -eu; source <({sys.executable} -m base config --name {name} --config {config} --shell)"
    done = call(["bash", "-c", f"{script}; echo $NAME $DGXSYSTEM $DGXNNODES $DGXNGPU $NEXP $WALLTIME"], ROOT, **trials)
    assert (done.stdout.strip(), done.stderr) == (said, "")


def test_it_needs_no_torch_and_a_number_of_trials():
    script = "import sys; from base.__main__ import main; code = main(sys.argv[1:]); sys.exit(code or 9 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", script, "config", "--config", "demo", "--shell"]
    assert call(command, ROOT).returncode == 0
    done = call(command, ROOT, NEXP="many")
    assert (done.returncode, done.stderr) == (2, "error: NEXP is 'many': a number of trials from 1 on\n")


# What is refused


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "CONFIG (or DGXSYSTEM) is not set"),
        ({"CONFIG": "DGX9"}, "backend nvidia has no configuration 'DGX9'"),
        ({"CONFIG": "demo", "DATADIR": "nowhere"}, "DATADIR=nowhere does not exist; prepare.py --data_dir"),
        ({"CONFIG": "demo", "CONT": "image"}, "this is no job of Slurm; run_with_docker.sh takes it"),
        ({"CONFIG": "DGXA100_multi_2x8x56", "NEXP": 1}, "wants 2 node(s) and there are 1: sbatch -N 2 -t 00:15:00 run.sub"),
    ],
)
def test_what_run_sub_refuses(tmp_path, values, said):
    done = call([RUN_SUB], tmp_path, **values)
    assert done.returncode == 2 and said in done.stderr and done.stderr.startswith("error: ") and not list(tmp_path.glob("results/*"))


def test_run_sub_far_from_the_project(tmp_path):
    copy = shutil.copy(RUN_SUB, tmp_path / "slurm_script")
    done = call(["bash", copy], tmp_path, CONFIG="demo")
    assert done.returncode == 2 and "SSD_ROOT=FOLDER names it" in done.stderr
    for place in ({"SSD_ROOT": ROOT}, {"SLURM_SUBMIT_DIR": ROOT}):
        done = call(["bash", copy], tmp_path, **place)
        assert done.returncode == 2 and "CONFIG (or DGXSYSTEM) is not set" in done.stderr


# Without Slurm


@pytest.mark.long
def test_run_sub_runs_here_without_slurm_goes_on_and_leaves_what_is_done(tmp_path, demo_data):
    logs, flags = tmp_path / "logs", [*TINY, "--max_steps", "24", "--eval_every", "0"]
    values = {"DATADIR": demo_data, "LOGDIR": logs, "DGXSYSTEM": "DGX1_32", "NEXP": 1}
    run = logs / "reference-DGX1_32_1"
    (run / "checkpoints").mkdir(parents=True)  # as one leaves it that fails before it begins
    with subprocess.Popen(["./run.sub", *flags], cwd=RUN_SUB.parent, env=environment(**values), stdout=subprocess.PIPE, text=True) as first:
        wait_for(lambda: steps_done(run), first, 300)
        first.send_signal(signal.SIGTERM)
        printed = first.communicate(timeout=300)[0]
    assert first.returncode == 143 and "trial 1 of 1 was stopped" in printed and checkpoint.listed(run)
    assert "DGX1_32 is a configuration of the reference, not of nvidia: NAME=reference" in printed

    done = call(["./run.sub", *flags], RUN_SUB.parent, **values)
    assert done.returncode == 0 and "trial 1 of 1 goes on" in done.stdout and [step for step, _ in losses(run)] == list(range(1, 25))
    (result,), log = results(done.stdout), max(logs.glob("*_1.log"))
    assert result == log.read_text().splitlines()[-1] and events(log)["cache_clear"] is False

    again = call([RUN_SUB, *flags], tmp_path, **values)
    assert again.returncode == 0 and f"trial 1 of 1 is done: {result}" in again.stdout and "begins" not in again.stdout


# Containers


SRUN = """printf '%s\\n' srun "$@" >>"$RECORD"
while [[ $1 == --* ]]; do shift; done
case "$*" in
    *run_training.sh\\ config*) SSD_PYTHON=$IMAGE exec bash "$ROOT/run_training.sh" "${@:3}" ;; # as inside the image
    *) exit 143 ;; # stopped at once
esac
"""


SCONTROL = """case "$1 $2" in
    "show hostnames") echo n1 && echo n2 ;;
    "show node") echo "   NodeAddr=10.0.0.1 NodeHostName=n1" ;;
esac
"""


def test_what_pyxis_is_given(tmp_path, demo_data):
    """The arguments only: this Slurm here has no Pyxis."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "srun", SRUN)
    program(tmp_path / "bin" / "scontrol", SCONTROL)
    values = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": tmp_path / "record", "ROOT": ROOT, "CONT": "registry/image:1"}
    values |= {"SLURM_JOB_ID": 12345, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[1-2]", "NEXP": 1, "NAME": "reference"}
    done = call([RUN_SUB, "--runs_dir", "a b"], tmp_path, CONFIG="DGX1_multinode", DATADIR=demo_data, LOGDIR="my logs", **values)
    assert done.returncode == 143, done.stderr
    first, second = (tmp_path / "record").read_text().removeprefix("srun\n").split("srun\n")
    container = [f"--container-image={values['CONT']}", f"--container-mounts={demo_data}:/data,{tmp_path}/my logs:/results"]
    assert first.splitlines()[:4] == ["--nodes=1", "--ntasks=1", *container]
    step = second.splitlines()
    assert step[:5] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"] and step[5:7] == container
    assert step[7:9] == ["bash", "-c"] and '--node-rank "$SLURM_NODEID"' in step[9] and step[10] == "/workspace/ssd/run_training.sh"
    flags = ["--name", "reference", "--config", "DGX1_multinode", "--runs_dir", "a b", "--seed", "1", "--runs_dir", "/results"]
    flags += ["--run_name", "reference-DGX1_multinode_1", "--trials", "1", "--data_dir", "/data"]
    assert step[11:] == [*flags, "--rdzv-endpoint", "10.0.0.1:22345", "--rdzv-id", "job-12345"]


DOCKER = """printf '%s\\n' docker "$@" >>"$RECORD"
while [[ $1 != "$CONT" ]]; do
    [[ $1 != --env ]] || given+=" $2 "
    [[ $1 != type=bind,* ]] || { source=${1#*source=} && mounts+=("${1##*target=}=${source%,target=*}"); }
    shift
done
shift
[[ $given == *" NEXP "* ]] || unset NEXP
for mount in "${mounts[@]}"; do set -- "${@/#${mount%%=*}/${mount#*=}}"; done
SSD_PYTHON=$IMAGE exec bash "$ROOT/run_training.sh" "$@" # the image's entry point
"""


@pytest.mark.parametrize("vendor", CONTAINERS)
def test_what_docker_is_given(tmp_path, demo_data, vendor):
    """A stand-in for docker records its arguments and runs the image's entry point here, with the mounted folders' own names."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "docker", DOCKER)
    data = tmp_path / "the data"
    data.symlink_to(demo_data)
    values = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": tmp_path / "record", "ROOT": ROOT, "CONT": "image:1", "NEXP": 1}
    values |= {"DATADIR": "the data", "LOGDIR": "my logs", "NAME": "reference", "CONFIG": "demo"}
    script, steps = ROOT / vendor / "docker" / "run_with_docker.sh", ["--max_steps", "1"]
    if vendor != CONTAINERS[0]:  # whole once
        steps = ["--batchsize", "1"]
    done = call([script, *TINY, *steps], tmp_path, **values, CLEAR_CACHES=int(vendor == CONTAINERS[0]))
    calls = [text.splitlines() for text in (tmp_path / "record").read_text().removeprefix("docker\n").split("docker\n")]
    for words in calls:
        assert words[:3] == ["run", "--rm", "--init"] and {"--ipc=host", "SSD_CACHES_CLEARED"} <= set(words)
        assert {"nvidia": ["--gpus", "all"], "iluvatar": ["--privileged"]}[vendor][0] in words
        assert f"type=bind,source={tmp_path}/my logs,target=/results" in words and f"type=bind,source={demo_data},target=/data" in words
    assert calls[0][calls[0].index("image:1") + 1] == "config"
    if vendor != CONTAINERS[0]:
        assert done.returncode == 2 and "unknown argument '--batchsize'" in done.stderr and len(calls) == 1
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"--data_dir", "/data", "--runs_dir", "/results"} <= set(calls[1])
    (result,), (log,) = results(done.stdout), (tmp_path / "my logs").glob("*_1.log")
    assert result in log.read_text() and events(log)["cache_clear"] is ("the caches are not cleared" not in done.stdout)


@pytest.mark.parametrize("vendor", CONTAINERS)
def test_an_image_is_made_by_prepare_and_runs_run_training(vendor):
    text = (ROOT / vendor / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    packages, prepare = (rest for word, rest in lines if word == "RUN")
    assert re.fullmatch(r"apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y [\w\s.+-]+ && rm -rf /var/lib/apt/lists/\*", packages)
    words = call(["bash", "-c", f'printf "%s\\n" {prepare}'], ROOT, PYTHON="/my python").stdout.splitlines()
    assert words == ["python3", "prepare.py", "--name", vendor, "--python", "/my python"]
    given = dict(lines)
    assert given["ENTRYPOINT"] == json.dumps(["bash", f"{given['WORKDIR']}/run_training.sh"]) and given["COPY"] == ". ."
    assert f"project={given['WORKDIR']} " in (ROOT / "base" / "trials.sh").read_text()
    assert f"BASH_ENV={given['WORKDIR']}/{vendor}/config/environment_variables.sh" in given["ENV"]


# Two nodes


CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES
"""


def ranks_of(run: Path) -> list[int]:
    """The processes of a run's ranks, which are told its folder."""
    found, told = [], json.dumps({"folder": str(run)})[1:-1].encode()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(command.parent.name)] * (told in command.read_bytes())
        except OSError:
            continue
    return found


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of two nodes on this machine, on the loopback interface; $SLURM_CONF names it. → a function that runs its commands."""
    found = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("munged", "slurmctld", "slurmd")}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"{' '.join(missing)} not found: apt-get install slurm-wlm munge")
    folder, listening = tmp_path / "slurm", [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    for part in ("state", "n1", "n2"):
        (folder / part).mkdir(parents=True)
    conf = CONF.format(host=socket.gethostname().partition(".")[0], ports=ports, user=getpass.getuser(), folder=folder)
    (folder / "slurm.conf").write_text(conf)
    (folder / "key").touch(mode=0o600)
    (folder / "key").write_bytes(os.urandom(1024))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = {"socket": "munge.socket", "key-file": "key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
    commands = [[found["munged"], "--foreground", "--force", *(f"--{flag}={folder / name}" for flag, name in munge.items())]]
    commands += [[found["slurmctld"], "-D"], *([found["slurmd"], "-D", "-N", node] for node in ("n1", "n2"))]
    started = []

    def ask(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else f"{command[0]}: {done.stderr}"

    try:
        for command in commands:
            with open(folder / f"{Path(command[0]).name}-{command[-1].rpartition('/')[2]}.out", "w") as out:
                started.append(subprocess.Popen(command, stdout=out, stderr=out))
            wait_for(lambda: (folder / "munge.socket").exists(), seconds=60, told=lambda: "munged made no socket")
        wait_for(lambda: ask("sinfo", "-h", "-o", "%D %t") == "2 idle", pause=0.1, told=lambda: ask("sinfo", "-N", "-l"))
        yield ask
    finally:
        if len(started) == len(commands):
            ask("scancel", "--user", getpass.getuser())
            end = time.monotonic() + 60
            while ask("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.5)
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)


@pytest.mark.long
def test_a_job_at_its_time_limit_saves_and_the_next_one_goes_on(cluster, tmp_path, demo_data):
    """Two nodes, two trials: the second is still training when the time is over."""
    logs = tmp_path / "my logs"
    values = {"NAME": "reference", "CONFIG": "demo", "DATADIR": demo_data, "LOGDIR": logs, "NEXP": 2}
    runs = [logs / f"reference-demo_{trial}" for trial in (1, 2)]

    def submit(nodes: int) -> tuple[str, Path]:
        """→ the job, and the file that it prints to."""
        flags = [*TINY, "--nodes", "2", "--epochs", "2", "--eval_every", "0"]
        done = call(["sbatch", "--parsable", "-N", nodes, "-t", "30", RUN_SUB, *flags], tmp_path, **values)
        assert done.returncode == 0, done.stderr
        job = done.stdout.strip()
        return job, tmp_path / f"slurm-{job}.out"

    def until(job: tuple[str, Path], condition) -> None:
        wait_for(condition, seconds=400, pause=0.1, told=lambda: job[1].read_text() if job[1].exists() else cluster("squeue", "-l"))

    def over(job: tuple[str, Path]) -> str:
        """What the job printed, once it has ended."""
        until(job, lambda: re.search("JobState=(COMPLETED|FAILED|TIMEOUT|CANCELLED)", cluster("scontrol", "show", "job", job[0])))
        return job[1].read_text()

    assert "demo wants 2 node(s) and there are 1: sbatch -N 2 -t" in over(submit(1))

    job = submit(2)
    until(job, lambda: (runs[1] / "metrics.jsonl").exists() and losses(runs[1]))
    ranks = ranks_of(runs[1])
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # however fast this machine is, they are not done before the time is over
    hours, minutes, _ = map(int, re.search(r"RunTime=(\d+):(\d+):(\d+)", cluster("scontrol", "show", "job", job[0])).groups())
    cluster("scontrol", "update", f"JobId={job[0]}", f"TimeLimit={60 * hours + minutes + 2}")  # Slurm warns the tasks two minutes before
    until(job, lambda: "CANCELLED" in job[1].read_text())
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    printed = over(job)
    assert len(ranks) == 2 and "trial 2 of 2 was stopped" in printed and "ExitCode=143:0" in cluster("scontrol", "show", "job", job[0])
    saved = checkpoint.read(checkpoint.listed(runs[1])[0])["progress"]["step"]
    assert 0 < saved < len(losses(runs[0])) and not (runs[1] / "result.txt").exists()
    (first,) = results(printed)
    untouched = (runs[0] / "metrics.jsonl").stat().st_mtime_ns

    printed = over(submit(2))
    assert f"trial 1 of 2 is done: {first}" in printed and "trial 2 of 2 goes on" in printed
    assert f"resumed from step-{saved:09}.pt: {saved} steps done" in printed
    _, second = results(printed.replace("is done: ", "is done:\n"))
    assert second == (runs[1] / "result.txt").read_text().strip() and (runs[0] / "metrics.jsonl").stat().st_mtime_ns == untouched
    assert [events(run / "mlperf.log")["seed"] for run in runs] == [1, 2]
    for trial, run in enumerate(runs, 1):
        assert [step for step, _ in losses(run)] == list(range(1, len(losses(runs[0])) + 1))
        log = max(logs.glob(f"*_{trial}.log"))
        assert events(log) == events(run / "mlperf.log") and log.read_text().splitlines()[-1].startswith("RESULT,")

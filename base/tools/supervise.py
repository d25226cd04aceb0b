"""Starting the ranks with torchrun, saying why they ended, and starting them again when one was lost (``max_restarts``)."""

import contextlib
import gc
import json
import logging
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from base.config import Config
from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STOPPED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
UNMET = 76  # exit code if nodes do not find each other
MEETING = 600  # seconds that nodes try to meet again, beyond those that one of them may need to notice
WAITING = "waiting for the other ranks"
# Function of base/ → what a rank was doing whose stack has it innermost
PHASES = {
    "next_batch": "waiting for the loader's next batch",
    "sums": WAITING,
    "gathered": WAITING,
    "_broadcast": WAITING,
    "lost": WAITING,
    "join": "meeting the other ranks",
    "set_up": "building the run's components",
    "latest": "reading a checkpoint",
    "write": "writing a checkpoint",
    "settle": "waiting for the device to finish a step",
    "train_epoch": "in a training step",
    "detect": "detecting in the validation images",
    "judged": "computing the figures of an evaluation",
    "result": "waiting for the evaluation in the background",
    "main": "starting or ending",
}


def supervise(command: Callable[[int], list[str]], config: Config, folder: Path) -> int:
    """Runs torchrun until the run has ended for good, and returns its exit code. ``command``: of the first start (0), the second, …

    What a person has to put right, and a request to stop, end it at once.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    attempt, began, everywhere = 0, time.monotonic(), " on each node" * (config.nodes > 1)
    try:
        while True:
            gc.collect()  # the store of the attempt before, whose port this one needs
            code, why = torchrun(command(attempt), config)
            if code == UNMET and attempt and time.monotonic() < began + config.timeout + MEETING:
                time.sleep(1)  # another node may still be in the attempt before: no restart is used up, all nodes count alike
                continue
            if code in (0, *STOPPED):
                return code
            if code == UserError.code:
                note(folder, f"error: {why}")  # its rank has printed it
                return code
            left = 0 if code == UNMET else config.max_restarts - attempt
            why, line, stack = why.partition("\n")
            if left > 0:
                text = f"{why}; starting again from the latest checkpoint ({left} restart{'s' * (left > 1)} left){line}{stack}"
            else:
                text = f"error: {why}; go on with: bash run_training.sh --resume {folder}{everywhere}{line}{stack}"
            print(text, file=sys.stderr, flush=True)
            note(folder, text)
            if left <= 0:
                return code
            attempt, began = attempt + 1, time.monotonic()
    except SignalException as asked:  # torchrun's handlers stay, so also between two attempts
        return 128 + asked.sigval


def torchrun(command: list[str], config: Config) -> tuple[int, str]:
    """Runs torchrun in this process → (exit code of the run, why it is not 0)."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.devices)))
    # Idle OpenMP threads wait actively some 50 µs instead of milliseconds: beside other work on the same cores that is 2 to 3 times faster.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds for a step and a checkpoint after SIGTERM
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # ranks say themselves what went wrong
    with tempfile.TemporaryDirectory(prefix="ssd-notes-") as notes:
        os.environ |= {"SSD_LAUNCHER": str(os.getpid()), "SSD_NOTES": notes}
        try:
            run.run(run.parse_args(command))
        except ChildFailedError as error:
            return verdict(Path(notes), [(rank, failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()])
        except (DistError, RendezvousError) as error:
            calls = {call.name for call in traceback.extract_tb(error.__traceback__)}
            if "_invoke_run" in calls and "_rendezvous" not in calls:  # torchrun's agent: between meeting and the end
                return 1, f"{platform.node()} lost the other nodes: {error}"
            return UNMET, f"{platform.node()} did not meet the other nodes: {error}"
    return 0, ""


def verdict(notes: Path, failures: list[tuple[int, int, int]]) -> tuple[int, str]:
    """What ended a run → (exit code, reason), from the ranks' notes and (rank, exit code, seconds) of those that failed, the first first."""
    texts = [path.read_text(encoding="utf-8") for path in _by_rank(notes, "error")]
    errors = [tuple(json.loads(text)) for text in texts if text]  # empty: the disk is full
    errors += [(code, f"rank {rank} ended with an error, see above") for rank, code, _ in failures if code == UserError.code]
    if final := [error for error in errors if error[0] == UserError.code]:
        return final[0]
    host = platform.node()
    if stuck := hangs(notes):
        first, *others = stuck
        also = f"; so did {', '.join(f'rank {hang.rank} while {hang.phase}' for hang in others)}" if others else ""
        if frozen := [f"rank {rank}" for rank, code, _ in failures if code == -signal.SIGKILL]:  # by torchrun, half a minute after SIGTERM
            also += f"; {', '.join(frozen)} did not answer at all"
        what = f"rank {first.rank} on {host} made no progress for {first.limit} (--timeout) while {first.phase}{also}"
        return 1, f"{what}\nThe stack of rank {first.rank}, innermost call first:\n{first.stack}"
    _, _, began = failures[0]
    killed = [(rank, code) for rank, code, when in failures if code < 0 and when <= began + 1]  # not by torchrun, later
    if killed:
        rank, code = min(killed, key=lambda one: one[1] == -signal.SIGTERM)
        return 128 - code, f"rank {rank} on {host} was killed by signal {-code}"
    if errors:
        return errors[0]
    rank, code, _ = failures[0]
    return code, f"rank {rank} on {host} ended with exit code {code}"


class Hang(NamedTuple):
    """A rank that its watchdog ended."""

    rank: int
    limit: str  # h:mm:ss
    phase: str
    waiting: bool  # for the others or the device: another rank may be the cause
    stack: str  # of the main thread, innermost call first


def hangs(notes: Path) -> list[Hang]:
    """The ranks that a watchdog ended, those first that waited for no other."""
    found = []
    for path in _by_rank(notes, "stack"):
        if text := path.read_text(encoding="utf-8", errors="replace"):
            stack = text.rpartition("hread 0x")[2].partition("\n")[2].rstrip()  # the main thread comes last
            names = re.findall(rf'File "{re.escape(str(ROOT / "base"))}/[^"]*", line \d+ in (\S+)', stack)
            phase = next((PHASES[name] for name in names if name in PHASES), "outside of the training loop")
            if phase != WAITING and re.search(r"all_reduce|distributed_c10d", stack):
                phase = f"{WAITING} {phase}"
            limit = text.partition("(")[2].partition(")")[0]  # Timeout (0:30:00)!
            found.append(Hang(int(path.stem), limit, phase, phase.startswith(WAITING) or "the device" in phase, stack))
    return sorted(found, key=lambda hang: hang.waiting)


def _by_rank(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"*.{kind}"), key=lambda path: int(path.stem))


def note(folder: Path, text: str) -> None:
    """A line in the run's log.txt, if this machine has it."""
    from base.records import log_line

    if (folder / "log.txt").exists():
        with contextlib.suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:  # such as on a full disk: it is said anyway
            file.write(log_line(text) + "\n")

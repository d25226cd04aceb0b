"""Kills runs again and again, and holds what they end with to runs that nobody disturbed: python -m tests.soak --kills 20 --seed 1

Each run trains a tiny model on two ranks. A kill (SIGKILL) comes at a moment of `MOMENTS` or at a random time; it hits a random rank or
the launcher. A lost rank is made up for by --max-restarts, a lost launcher by --resume, at once, while its ranks may still be ending.
The run after it has the remaining kills, until all have been dealt.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from base import checkpoint
from data_sets.demo_data import generate
from tests.conftest import ROOT
from tests.disturbed import assert_same, rank_pids

KEEP = 2
FLAGS = [
    "--name", "reference", "--config", "demo", "--device", "cpu", "--nproc", "2", "--image_size", "64", "64", "--strides", *["1"] * 6,
    "--batch_size", "4", "--eval_batch_size", "4", "--workers", "0", "--epochs", "4", "--eval_every", "1", "--target", "null",
    "--learning_rate", "0.003", "--log_every", "1", "--checkpoint_every", "1", "--keep_checkpoints", str(KEEP), "--telemetry_seconds", "0",
    "--timeout", "300",
]  # fmt: skip


def has(pattern: str) -> Callable[[Path], bool]:
    return lambda run: any(run.glob(pattern))


def evaluating(run: Path) -> bool:
    text = (run / "mlperf.log").read_text() if (run / "mlperf.log").exists() else ""
    return text.count('"eval_start"') > text.count('"eval_stop"')


# Moment → whether it is there. Those that last for a thousandth of a second are polled for.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "while a checkpoint is written": has("checkpoints/.step-*.tmp"),
    "while best.pt is written": has("checkpoints/.best.pt*.tmp"),
    "between a checkpoint's rename and the removal of the oldest": lambda run: len(checkpoint.listed(run)) > KEEP,
    "during an evaluation": evaluating,
    "during an evaluation in the background": has(".detections.npz"),
    "at start-up": lambda run: True,
    "at a random time": lambda run: bool(checkpoint.listed(run)),
}


def plan(kills: int, draw: random.Random) -> list[tuple[str, str]]:
    """(moment, victim) of each kill: every moment as often, one victim in four is the launcher."""
    moments = [moment for _, moment in zip(range(kills), list(MOMENTS) * kills, strict=False)]
    victims = ["launcher" if number % 4 == 3 else "rank" for number in range(kills)]
    draw.shuffle(moments)
    draw.shuffle(victims)
    return list(zip(moments, victims, strict=True))


def begin(folder: Path, flags: list[str]) -> subprocess.Popen:
    """Starts the launcher; what it and its ranks say goes to folder/said, as the ranks outlive a launcher that is killed."""
    environment = {**os.environ, "SSD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with open(folder / "said", "a") as said:
        return subprocess.Popen(["bash", str(ROOT / "run_training.sh"), *flags], env=environment, stdout=said, stderr=said, cwd=folder)


def disturb(folder: Path, flags: list[str], kills: list[tuple[str, str]], draw: random.Random, seconds: float, say=print) -> int:
    """Trains in ``folder``/run, deals the kills in turn while it lasts, and sees it to its end: → how many were dealt."""
    run, dealt = folder / "run", 0
    start = [*flags, "--runs_dir", str(folder), "--run_name", "run", "--max-restarts", "100"]
    process, end = begin(folder, start), time.monotonic() + seconds
    known: set[int] = set()  # ranks that a kill has ended already, with the others of their start
    wanted, since, delay = None, 0.0, 0.0
    while (code := process.poll()) is None or code == -signal.SIGKILL:
        if time.monotonic() > end:
            raise TimeoutError(f"{run} has not ended in {seconds:.0f} s:\n{(folder / 'said').read_text()}")
        if code is not None:  # the launcher was killed
            if (run / "environment.json").exists():
                process = begin(folder, ["--resume", str(run), "--max-restarts", "100"])
            else:  # it had not begun: when its ranks have noticed, it starts anew
                while any(Path(f"/proc/{pid}").exists() for pid in known):
                    time.sleep(0.1)
                shutil.rmtree(run, ignore_errors=True)
                process = begin(folder, start)
            continue
        ranks = [pid for pid in rank_pids(process.pid) if pid not in known] if wanted is None and dealt < len(kills) else []
        if wanted is None and len(ranks) == 2:
            wanted, since = ranks, time.monotonic()
            delay = draw.uniform(0, 5) if kills[dealt][0] == "at start-up" else draw.uniform(0, 2) if "random" in kills[dealt][0] else 0.0
        if wanted is None:
            time.sleep(0.02)
            continue
        moment, victim = kills[dealt]
        if time.monotonic() < since + delay or not MOMENTS[moment](run):
            time.sleep(0.0005)
            continue
        hit = process.pid if victim == "launcher" else draw.choice(wanted)
        os.kill(hit, signal.SIGKILL)
        dealt += 1
        say(f"  {victim} killed {moment}, with {[path.name for path in checkpoint.listed(run)][:1] or 'no checkpoint'}", flush=True)
        known, wanted = known | set(wanted), None
    assert code == 0, f"the run ended with {code}:\n{(folder / 'said').read_text()}"
    return dealt


def soak(folder: Path, kills: int, seed: int, most: int = 5, seconds: float = 900, say=print) -> int:
    """Deals all kills, at most ``most`` to a run, evaluating in the foreground and in the background in turn: → how many runs it took.

    Raises AssertionError if a run ends with anything else than its undisturbed twin.
    """
    draw = random.Random(seed)
    generate(folder / "data", train=24, val=8, size=64, seed=5)
    ways = [[*FLAGS, "--data_dir", str(folder / "data")]]
    ways.append([*ways[0], "--evaluate_in_background"])
    twins = []
    for number, way in enumerate(ways):
        twin = folder / f"undisturbed-{number}"
        twin.mkdir()
        disturb(twin, way, [], draw, seconds)
        twins.append(twin / "run")
    left, runs = plan(kills, draw), 0
    while left:
        number = runs % 2
        mine = [kill for kill in left if number or "background" not in kill[0]][:most]
        place = folder / f"disturbed-{runs}"
        place.mkdir()
        say(f"run {runs}, evaluating in the {('foreground', 'background')[number]}", flush=True)
        done = disturb(place, ways[number], mine, draw, seconds, say)
        for kill in mine:
            left.remove(kill)
        left += mine[done:][1:] + mine[done:][:1]  # the one whose moment did not come waits longest for its next chance
        assert_same(place / "run", twins[number])
        shutil.rmtree(place)
        runs += 1
        assert runs <= kills + 2, f"moments that do not come: {left}"
    return runs


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        runs = soak(Path(folder), flags.kills, flags.seed)
    print(f"{flags.kills} kills in {runs} runs: every one ended with the weights of its undisturbed twin")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The runs of a submission: what their folders tell, whether they belong together, and their result."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf_logging.benchmark_meta import get_result_file_counts
from mlperf_logging.compliance_checker.mlp_parser import parse_file

from base.config import Config, read_run
from base.errors import UserError

RULESET = "1.0.0"  # what formats/mlperf.py writes
RUNS = get_result_file_counts("training")["ssd"]  # 5
ALLOWED_FAILURES = 1  # without the target: counted as the slowest, which is dropped
MAY_DIFFER = ("seed", "runs_dir")  # keys of the configuration
FACTS = ("commit", "system", "cpu", "cores", "memory_gib", "device", "accelerator", "python", "packages", "backend", "components")
ONCE = ("run_start", "run_stop", "seed", "global_batch_size", "cache_clear", "submission_org")


@dataclass(frozen=True)
class Run:
    """A finished run. ``facts`` is its environment.json, ``log`` the text of its mlperf.log."""

    folder: Path
    config: Config
    facts: dict[str, Any]
    log: str
    reached: bool  # the target
    minutes: float  # from MLPerf's run_start to its run_stop
    epochs: int  # until the last evaluation
    cache_cleared: bool


def read(folder: Path) -> Run:
    """Reads a run's folder. Raises UserError if it is none, has not finished, or its records are damaged."""
    for name in ("config.yaml", "environment.json", "mlperf.log"):
        if not (folder / name).is_file():
            stage = "; a run in stages is none of MLPerf's" if (folder / "stage-1").is_dir() else ""
            raise UserError(f"{folder} is no finished run's folder: it has no {name}{stage}")
    path = folder / "mlperf.log"
    try:
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        log = path.read_bytes().decode()  # line ends as they are
        events, unread = parse_file(str(path), ruleset=RULESET)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: environment.json or mlperf.log cannot be read ({error!r}); take the files as the run left them") from error
    if unread:
        raise UserError(f"{path}: {unread[0][0][:80]!r} is no line of an MLPerf log ({unread[0][1]}); take the file as the run left it")
    if lacking := [name for name in FACTS if name not in facts]:
        raise UserError(f"{folder / 'environment.json'} does not tell {', '.join(lacking)}; take the folder that the run's first machine wrote")
    found = {key: [event for event in events if event.key == key] for key in (*ONCE, "eval_accuracy")}
    if not found["run_stop"]:
        raise UserError(f"{folder} has not finished (mlperf.log has no run_stop); bash run_training.sh --resume {folder} goes on with it")
    if wrong := [key for key in ONCE if len(found[key]) != 1]:
        raise UserError(f"{path} has {len(found[wrong[0]])} lines of {wrong[0]}, and should have one; take the file as the run left it")
    start, stop = found["run_start"][0], found["run_stop"][0]
    try:
        epochs = max((event.value["metadata"]["epoch_num"] for event in found["eval_accuracy"] if 0 <= event.value["value"] <= 1), default=0)
        reached = stop.value["metadata"]["status"] == "success"
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: an eval_accuracy or run_stop is not as a run writes it ({error!r}); take the file as the run left it") from error
    minutes, cleared = (stop.timestamp - start.timestamp) / 6e4, found["cache_clear"][0].value["value"] is True
    return Run(folder, read_run(folder / "config.yaml"), facts, log, reached, minutes, epochs, cleared)


def check_together(runs: Sequence[Run], incomplete: bool) -> None:
    """Raises UserError unless these are the runs of one result."""
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice; every result is a run of its own")
    if len(runs) > RUNS or (len(runs) < RUNS and not incomplete):
        fix = "take the first ones, in the order in which they ran" if len(runs) > RUNS else "add runs, or --incomplete writes an unofficial folder"
        raise UserError(f"MLPerf wants {RUNS} runs of ssd, and {len(runs)} are given; {fix}")
    for other in runs[1:]:
        if differences := differences_of(runs[0], other):
            raise UserError(f"the runs {runs[0].folder} and {other.folder} may differ in their seed only, and differ in {'; '.join(differences)}")
    failed = [run for run in runs if not run.reached]
    if len(failed) > ALLOWED_FAILURES or len(failed) == len(runs):
        names = ", ".join(str(run.folder) for run in failed)
        raise UserError(f"the target was not reached by {names}; MLPerf allows {ALLOWED_FAILURES} of {RUNS} runs to fail, as it drops the slowest")


def differences_of(first: Run, other: Run) -> list[str]:
    """Keys in which two runs differ, with their values: of the configuration, and of the environment but for the machine's name."""
    sides = [(run.config.model_dump(mode="json"), _flat(run.facts)) for run in (first, other)]
    found = []
    for (mine, its), ignored in zip(zip(*sides, strict=True), (MAY_DIFFER, ("host",)), strict=True):
        for key in dict.fromkeys((*mine, *its)):
            if key not in ignored and mine.get(key) != its.get(key):
                found.append(f"{key}: {mine.get(key)!r} and {its.get(key)!r}")
    return found


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """One level of nested facts spread out, so that a difference names the package and not all of them."""
    flat = {}
    for key, value in facts.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


@dataclass(frozen=True)
class Score:
    """Minutes. ``mean`` is MLPerf's Olympic mean, None of fewer than three runs; ``fastest``, ``slowest``: places of the runs that it drops."""

    mean: float | None
    median: float
    least: float
    most: float
    fastest: int | None = None
    slowest: int | None = None


def score(runs: Sequence[Run]) -> Score:
    """The result: fastest and slowest run are dropped; one without the target is the slowest. Median and spread are of those with it."""
    reached = [run.minutes for run in runs if run.reached]
    spread = (statistics.median(reached), min(reached), max(reached))
    if len(runs) < 3:
        return Score(None, *spread)
    order = sorted(range(len(runs)), key=lambda place: (not runs[place].reached, runs[place].minutes))
    mean = statistics.fmean(runs[place].minutes for place in order[1:-1])
    return Score(mean, *spread, order[0], order[-1])

"""The figures of a run: each with its value, for comparison, and its text, which says why where it is not measured."""

import re
import statistics
from typing import NamedTuple

from base.records import minutes
from planning.formulas import CONVERGENCE, epochs_to_target
from planning.scale import COCO
from report.folder import RunFolder, is_number

NOT_MEASURED = "not measured"
STRETCH = 10  # steps at least between two records whose times give a rate: the last of an epoch is recorded a step early
OFFICIAL = "from MLPerf's run_start to run_stop, breaks included"
LOOP = "from the first batch on: steps, evaluations and checkpoints"
PARTS = {"transfer": "copy to the device", "matching": "matching", "forward": "forward pass", "loss": "loss", "backward": "backward pass",
         "all_reduce": "all-reduce", "optimizer": "optimizer", "rest": "rest of the step"}  # fmt: skip
ALWAYS = ("forward", "backward", "optimizer")  # these are named, measured or not
WHY_NO_ENERGY = re.compile(r"\benergy +not measured \((.*)\)")  # the closing table in log.txt


class Figure(NamedTuple):
    value: float | None
    text: str


def unknown(why: str = "") -> Figure:
    return Figure(None, f"{NOT_MEASURED} ({why})" if why else NOT_MEASURED)


def state(run: RunFolder) -> str:
    """How far a run has come, in a few words."""
    if run.end is None:
        return "no end is recorded: it still runs, was stopped or broke off"
    if (target := run.values.get("target")) is None:
        return "finished; there is no target"
    return f"finished; target {target} {'reached' if run.end.get('reached') is True else 'not reached'}"


def epoch_of_target(run: RunFolder) -> int | None:
    """The epoch after which the target was first reached."""
    target = run.values.get("target")
    if not is_number(target):
        return None
    return next((line["epoch"] for line in run.lines["evaluation"] if line["AP"] >= target), None)


def mlperf_seconds(run: RunFolder) -> float | None:
    """MLPerf's result: from run_start to a run_stop with success, by the log's own clock, pauses included."""
    times = {event["key"]: event for event in run.events}
    start, stop = times.get("run_start"), times.get("run_stop")
    metadata = stop.get("metadata") if stop else None
    if start is None or not isinstance(metadata, dict) or metadata.get("status") != "success":
        return None
    return (stop["time_ms"] - start["time_ms"]) / 1e3


def figures(run: RunFolder) -> dict[str, Figure]:
    """The summary, by name. Rates and times are those that the run recorded itself, on its first rank."""
    train, evaluations, end = run.lines["train"], run.lines["evaluation"], run.end
    found = {}
    best = max(evaluations, key=lambda line: line["AP"], default=None)
    found["mAP"] = Figure(best["AP"], f"{best['AP']:.4f} after epoch {best['epoch']}") if best else unknown("no evaluation yet")
    found["AP50"] = Figure(best["AP50"], f"{best['AP50']:.4f}") if best else unknown("no evaluation yet")
    epoch = epoch_of_target(run)
    reached = end is not None and end.get("reached") is True and epoch is not None
    why = "there is no target" if run.values.get("target") is None else "the target was not reached" if epoch is None else "the run has no end"
    found["time to target"] = Figure(end["seconds"], f"{minutes(end['seconds'])} {LOOP}") if reached else unknown(why)
    official = mlperf_seconds(run)
    text = f"{official:,.1f} s {OFFICIAL}" if official is not None else ""
    found["time to target by MLPerf's log"] = Figure(official, text) if text else unknown("" if reached else why)
    found["epochs to target"] = Figure(epoch, f"{epoch}") if epoch is not None else unknown(why)
    if train:
        rate, step = train[-1]["images_per_second"], train[-1]["step"]
        found["images/s"] = Figure(rate, f"{rate:,.1f} in training, up to step {step:,}")
    else:
        found["images/s"] = unknown("no step is recorded")
    for name, key, bounds in (
        ("images/s, raw", "images_per_second_raw", OFFICIAL),
        ("images/s, without evaluation and checkpoints", "images_per_second_training", "of the whole training loop, its wait for data included"),
        ("images/s, pure compute", "images_per_second_compute", "of the steps alone, from a batch in memory to the new weights"),
    ):
        value = end.get(key) if end else None
        found[name] = Figure(value, f"{value:,.1f} {bounds}") if is_number(value) else unknown("not recorded" if end else "the run has no end")
    no_energy = next((told[1] for line in reversed(run.log) if (told := WHY_NO_ENERGY.search(line))), "no reason is recorded")
    for name, key, text, why in (
        ("images per joule", "images_per_joule", "{:.4g}", no_energy),
        ("energy of training", "joules", "{:,.0f} J", ""),
        ("power in training", "power_watts", "{:,.1f} W", ""),
    ):
        value = end.get(key) if end else None
        found[name] = Figure(value, text.format(value)) if is_number(value) else unknown(why if end else "the run has no end")
    memory = [line["memory_bytes"] for line in run.lines["telemetry"] if is_number(line.get("memory_bytes"))]
    found["memory"] = Figure(max(memory), f"{max(memory) / 2**30:.2f} GiB at most, of one rank") if any(memory) else unknown("no sensor told it")
    steps = end["steps"] if end else train[-1]["step"] if train else None
    found["steps"] = Figure(steps, f"{steps:,}") if steps is not None else unknown()
    found["time"] = Figure(end["seconds"], f"{minutes(end['seconds'])} {LOOP}") if end else unknown("the run has no end")
    return found


def parts_of_time(run: RunFolder) -> list[tuple[str, Figure]]:
    """Where the time went, in seconds, up to the latest checkpoint. What is not recorded is said to be not measured."""
    evaluations, end = run.lines["evaluation"], run.end
    known = {"step", "train_seconds"} <= run.progress.keys()
    training, done = (run.progress["train_seconds"], run.progress["step"]) if known else (None, 0)
    behind = run.config is not None and run.config.evaluate_in_background
    keys = ["detection_seconds" if behind and line["step"] != (end or {}).get("steps") else "seconds" for line in evaluations]  # the last one waits
    held = [line[key] for line, key in zip(evaluations, keys, strict=True) if is_number(line.get(key))]
    rest = end["seconds"] - training - sum(held) if end and training is not None and done == end["steps"] else None

    def seconds(value: float | None, why: str) -> Figure:
        return unknown(why) if value is None else Figure(value, f"{value:,.1f} s")

    rows = [(f"training, {done:,} steps" if known else "training", seconds(training, "no checkpoint tells it"))]
    rows.append(("  of it waiting for data", waiting(run, done)))
    rows += [(f"  of it {PARTS[part]}", figure) for part, figure in parts_of_a_step(run, done).items()]
    rows.append(("evaluation" + " (detection; the rest ran beside training)" * behind, seconds(sum(held) if held else None, "no evaluation yet")))
    rows.append(("checkpoints and the rest", seconds(rest, "the run has no checkpoint of its last step" if end else "the run has no end")))
    return rows


def waiting(run: RunFolder, done: int) -> Figure:
    """How long the first rank waited for its loader: the sum over all steps, in old runs the mean of those recorded times the steps ``done``."""
    waits = [line["data_seconds"] for line in run.lines["train"]]
    if done and "data_seconds" in run.progress:
        wait = run.progress["data_seconds"]
        return Figure(wait, f"{wait:,.1f} s, {wait / done * 1e3:,.2f} ms a step")
    if not waits:
        return unknown("no step is recorded")
    wait = statistics.fmean(waits) * (done or run.lines["train"][-1]["step"])
    return Figure(wait, f"{wait:,.1f} s, {statistics.fmean(waits) * 1e3:,.2f} ms a step (mean of {len(waits):,} recorded steps)")


def parts_of_a_step(run: RunFolder, done: int) -> dict[str, Figure]:
    """Parts of the steps on the first rank's device: the mean of those that were measured, times the steps ``done``."""
    lines, found = run.lines["parts"], {}
    why = "its step tells no parts" if lines else "not recorded"
    for part in PARTS:
        some = [line for line in lines if is_number(line.get(f"{part}_seconds"))]
        measured = sum(line["steps"] for line in some)
        if measured and done:
            mean = sum(line[f"{part}_seconds"] * line["steps"] for line in some) / measured
            found[part] = Figure(mean * done, f"{mean * done:,.1f} s, {mean * 1e3:,.2f} ms a step (mean of {measured:,} steps)")
        elif part in ALWAYS:
            found[part] = unknown(why)
    return found


def rates(run: RunFolder) -> tuple[list[int], list[float]]:
    """Steps, and images/s over the stretch before each: STRETCH steps or more of one epoch without a checkpoint between them."""
    batch, every = (run.config.global_batch, run.config.checkpoint_every or 1 << 62) if run.config else (0, 1)
    steps, values, began = [], [], None
    for line in run.lines["train"]:
        if began is None or (began["epoch"], began["step"] // every) != (line["epoch"], line["step"] // every):
            began = line
        elif line["step"] - began["step"] >= STRETCH and line["time"] > began["time"] and batch:
            steps.append(line["step"])
            values.append((line["step"] - began["step"]) * batch / (line["time"] - began["time"]))
            began = line
    return steps, values


def convergence(run: RunFolder) -> tuple[str, str, str, str]:
    """A row: global batch, epochs to the target here, MLPerf's reference convergence points, and how they compare."""
    here = epoch_of_target(run)
    if run.config is None:
        return NOT_MEASURED, NOT_MEASURED, "not known", "the configuration cannot be read"
    batch, text = run.config.global_batch, f"{here}" if here is not None else NOT_MEASURED
    ends = epochs_to_target(batch)
    if ends is None:
        return f"{batch:,}", text, "none", f"MLPerf's points are for global batches of {min(CONVERGENCE):,} to {max(CONVERGENCE):,}"
    span = "–".join(dict.fromkeys(f"{end:.0f}" for end in ends))
    images = next((event.get("value") for event in run.events if event["key"] == "train_samples"), None)
    if images != COCO or run.config.target != 0.23:
        return f"{batch:,}", text, span, f"not comparable: they are of COCO 2017's {COCO:,} images and target 0.23"
    if here is None:
        return f"{batch:,}", text, span, "the target was not reached"
    low, high = ends
    told = "fewer epochs" if here < low else "more epochs" if here > high else "within"
    return f"{batch:,}", text, span, told if low <= here <= high else f"{told}: {here / (high if here > high else low) - 1:+.1%}"

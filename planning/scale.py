"""``python -m base scale --from RUN``: images/s and the time of epochs on more devices, from a run on one; or ``--check`` on this machine.

The step comes from RUN's records, the bytes from its configuration, and the link from flags or, by default, from two processes of this
machine. Predictions stand beside what was published of other hardware. docs/scaling.md has the formulas, and what is left out.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from base import checkpoint
from base.backend import backend_folder, list_backends, load_backend
from base.config import Config, read_run, validate
from base.distributed import device_type, devices_here
from base.errors import UserError
from base.schedule import evaluates_after
from base.tools.launch import spelled
from planning import averaging
from planning.formulas import Link, Network, Work, epochs_to_target

DEVICES = tuple(1 << power for power in range(11))  # 1 … 1024
COCO = 117_266  # training images with boxes: those of the published results
AGREEMENTS, AGREEMENT = 2, 24  # small sums over the ranks' hosts in every step of `base.train`, and the bytes of one


@dataclass(frozen=True)
class Measured:
    """What a run's records tell of it."""

    config: Config
    backend: str
    device: str
    classes: int  # background is one
    images: int  # of an epoch
    step: float  # seconds, the median of ``spans`` stretches between two records
    spans: int
    waited: float  # seconds of a step that went to waiting for the loader, the median
    detection: float  # seconds of an evaluation that detect
    figures: float  # and that compute the figures


def measured(run: Path) -> Measured:
    """Reads a run's folder. Raises UserError if it is none, was on several devices, or is too short."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "mlperf.log"):
        if not (run / name).is_file():
            raise UserError(f"{run} is no finished run's folder: it has no {name}")
    config, facts = read_run(run / "config.yaml"), json.loads((run / "environment.json").read_text(encoding="utf-8"))
    if config.world_size > 1:
        raise UserError(f"{run} ran on {config.world_size} devices; scale needs the step of one: train with --devices 1, for some 100 steps")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    every, spans = config.checkpoint_every or 1 << 62, []
    for a, b in zip(lines, lines[1:], strict=False):  # stretches without evaluation, checkpoint or change of epoch
        if a["kind"] == b["kind"] == "train" and a["epoch"] == b["epoch"] and a["step"] // every == b["step"] // every:
            spans.append((b["time"] - a["time"]) / (b["step"] - a["step"]))
    spans = [span for span in spans if span > 0]  # records have the wall clock, which may have been set back
    if not spans:
        raise UserError(f"{run / 'metrics.jsonl'} has no two records of one epoch; train for more steps, or with a smaller --log_every")
    waits = [line["data_seconds"] for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    detection = [line["detection_seconds"] for line in evaluations if "detection_seconds" in line]
    both = statistics.median([line["seconds"] for line in evaluations] or [0.0])
    detects = statistics.median(detection or [0.0])
    events = [json.loads(line.partition(" ")[2]) for line in (run / "mlperf.log").read_text(encoding="utf-8").splitlines()]
    images = next(event["value"] for event in events if event["key"] == "train_samples")
    classes = len(checkpoint.read(checkpoint.found_in(run))["categories"]["ids"]) + 1
    step, waited = statistics.median(spans), statistics.median(waits)
    figures = 0.0 if config.evaluate_in_background else both - detects
    return Measured(config, facts["backend"], facts["device"], classes, images, step, len(spans), waited, detects, figures)


def published() -> list[dict]:
    """What the backends' folders hold of published results, in ``published.csv``: numbers as such, None where there is none."""
    rows = []
    for name in list_backends():
        if (path := backend_folder(name) / "published.csv").is_file():
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    texts = {key: row.pop(key) for key in ("system", "software")}
                    rows.append(texts | {key: float(value) if value else None for key, value in row.items()})
    return rows


def predicted(run: Measured, work: Work, network: Network, devices: int, batch: int, loader: float | None, host: float | None) -> dict:
    """One row: a step, an epoch and the way to mAP 0.23 on so many devices with ``batch`` images each.

    ``loader``: images/s of a node's, ``host``: seconds of a message between two hosts; None leaves them out.
    """
    step, global_batch = work.on(devices, network, batch), devices * batch
    if loader:
        step = max(step, min(devices, network.devices_per_node or devices) * batch / loader)
    if host and devices > 1:
        agreed = AGREEMENTS * Link(host, float("inf")).ring(devices, AGREEMENT)
        step = step + agreed if run.device == "cpu" else max(step, agreed)  # an accelerator works meanwhile
    rate, steps = global_batch / step, run.images // global_batch
    needed = epochs_to_target(global_batch) if run.images == COCO else None
    alone = work.batch / work.seconds
    evaluation = run.detection / devices + run.figures
    row = {"devices": devices, "global_batch": global_batch, "step_seconds": step, "images_per_second": rate, "efficiency": rate / devices / alone}
    row |= {"epoch_seconds": steps * step if steps else None, "evaluation_seconds": evaluation, "epochs": needed, "minutes": None}
    if needed and steps:
        row["minutes"] = tuple((epochs * steps * step + evaluations(run.config, epochs) * evaluation) / 60 for epochs in needed)
    return row


def evaluations(config: Config, epochs: float) -> int:
    """How many evaluations there are until the one after ``epochs``."""
    return sum(evaluates_after(config, epoch) for epoch in range(1, round(epochs) + 1))


def span(ends: tuple[float, float] | None, form: str) -> str:
    """What lies between two figures, or that it is not known."""
    return "not known" if ends is None else "–".join(dict.fromkeys(format(end, form) for end in ends))


def table(rows: list[dict], points: list[dict]) -> str:
    """Predictions and published points by the number of devices, the predictions first."""
    head = ("devices", "", "global batch", "images/s", "a device", "efficiency", "s an epoch", "epochs", "minutes to 0.23")
    cells = [head]
    for devices in sorted({row["devices"] for row in (*rows, *points)}):
        for row in (row for row in rows if row["devices"] == devices):
            rate, epoch = row["images_per_second"], row["epoch_seconds"]
            own = (f"{row['efficiency']:.1%}", f"{epoch:,.1f}" if epoch else "too few", span(row["epochs"], ".0f"), span(row["minutes"], ",.2f"))
            cells.append((str(devices), "predicted", f"{row['global_batch']:,}", f"{rate:,.1f}", f"{rate / devices:,.1f}", *own))
        for row in (row for row in points if row["devices"] == devices):
            rate, minutes = row["images_per_second"], row["minutes"]
            theirs = ("", f"{COCO / rate:,.1f}", f"{row['epochs']:.0f}", f"{minutes:.2f}" if minutes else "not known")
            what = f"published: {row['system']}, {row['software']}"
            cells.append((f"{devices:.0f}", what, f"{row['global_batch']:,.0f}", f"{rate:,.0f}", f"{rate / devices:,.0f}", *theirs))
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    form = "  ".join(f"{{:{'<' if column == 1 else '>'}{width}}}" for column, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in cells)


def check_table(rows: list[dict]) -> str:
    """The rows of `planning.averaging.check`."""
    lines = [f"{'processes':>9}  {'buckets':>7}  {'link':>22}  {'alone, ms':>9}  {'predicted, ms':>13}  {'measured, ms':>12}  predicted / measured"]
    for row in rows:
        link = f"{row['latency'] * 1e6:.0f} µs, {row['bandwidth'] / 1e9:.2f} GB/s" if row["bandwidth"] else "none"
        bucket = f"{row['bucket_mb']} MiB" if row["bucket_mb"] else "one"
        times = f"{row['alone'] * 1e3:9.1f}  {row['predicted'] * 1e3:13.1f}  {row['measured'] * 1e3:12.1f}"
        lines.append(f"{row['processes']:>9}  {bucket:>7}  {link:>22}  {times}  {row['predicted'] / row['measured']:.2f}")
    return "\n".join(lines)


def network_of(flags: argparse.Namespace, run: Measured) -> tuple[Network, str]:
    """The network that the flags describe, or that of two processes on this machine, and where it is from."""
    given = [flags.latency, flags.bandwidth]
    if None in given and any(value is not None for value in given):
        raise UserError("a link is --latency and --bandwidth together; leave out both to measure it on this machine")
    between, nodes = None, [flags.devices_per_node, flags.node_latency, flags.node_bandwidth]
    if None in nodes and any(value is not None for value in nodes):
        raise UserError("several nodes are --devices_per_node, --node_latency and --node_bandwidth together")
    if flags.devices_per_node:
        between = Link(flags.node_latency * 1e-6, flags.node_bandwidth * 1e9)
    if flags.latency is not None:
        return Network(Link(flags.latency * 1e-6, flags.bandwidth * 1e9), flags.devices_per_node, between), "as given"
    kind = device_type(run.device)
    if devices_here(kind) in (0, 1):
        raise UserError(
            f"the link between {kind} devices cannot be measured here, with {devices_here(kind)}; pass --latency (µs) and --bandwidth (GB/s)"
        )
    group = "gloo" if kind == "cpu" else load_backend(run.backend).distributed
    return Network(averaging.link(kind, group), flags.devices_per_node, between), "measured between two processes of this machine"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="run", type=Path, metavar="RUN", help="folder of a run on one device, some 100 steps long")
    what.add_argument("--check", action="store_true", help="predict and measure steps of 1, 2 and 4 processes on this machine (Gloo)")
    parser.add_argument("--devices", type=whole(1), nargs="+", default=list(DEVICES), metavar="N", help="how many (default: 1, 2, 4 … 1024)")
    parser.add_argument("--global_batch", type=whole(1), metavar="G", help="keep the global batch; by default each device keeps its own")
    parser.add_argument("--images", type=whole(1), metavar="N", help="training images of an epoch, such as 117266 (default: as in RUN)")
    parser.add_argument("--latency", type=number, metavar="US", help="of a message between two devices, in µs")
    parser.add_argument("--bandwidth", type=number, metavar="GBS", help="what a device sends and at the same time receives, in GB/s")
    parser.add_argument("--devices_per_node", type=whole(1), metavar="D", help="beyond them a second link begins")
    parser.add_argument("--node_latency", type=number, metavar="US", help="of a message between two nodes, in µs")
    parser.add_argument("--node_bandwidth", type=number, metavar="GBS", help="of a node with all its cards, in GB/s")
    parser.add_argument("--host_latency", type=number, metavar="US", help="of a message between two hosts' processes, in µs (default: left out)")
    parser.add_argument("--loader", type=number, metavar="R", help="images/s that the loaders of a node give (default: no limit)")
    parser.add_argument("--backward", type=share, default=averaging.BACKWARD, help="the backward pass's part of a step (default: %(default).3f)")
    for key in ("gradient_bucket_mb", "norm_ranks"):
        parser.add_argument(f"--{key}", type=whole(0), metavar="N", help="as in training (default: as in RUN)")
    parser.add_argument("--gradient_compression", choices=("none", "bf16", "fp16"), help="as in training (default: as in RUN)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE")
    flags = parser.parse_args([spelled(argument) for argument in arguments])
    return check(flags) if flags.check else plan(flags)


def whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return whole_number


def number(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError
    return float(text)


def check(flags: argparse.Namespace) -> int:
    """Exit code 1 if a prediction is wrong by more than `averaging.ACCURACY`."""
    rows = averaging.check()
    print(check_table(rows))
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(1 / averaging.ACCURACY < row["predicted"] / row["measured"] < averaging.ACCURACY for row in rows) else 1


def plan(flags: argparse.Namespace) -> int:
    run = measured(flags.run)
    run = replace(run, images=flags.images or run.images)
    keys = ("gradient_bucket_mb", "gradient_compression", "norm_ranks")
    changed = {key: getattr(flags, key) for key in keys if getattr(flags, key) is not None}
    config = run.config.model_copy(update=changed)
    for count in flags.devices if config.norm_ranks > 1 else ():
        if count > 1:
            validate({"devices": count, "norm_ranks": config.norm_ranks}, {"norm_ranks": "--norm_ranks", "devices": "--devices"})
    network, source = network_of(flags, run)
    detector = {"num_classes": run.classes, "image_size": config.image_size, "strides": config.strides, "backbone": config.backbone}
    sent = (config.gradient_bucket_mb, config.gradient_compression)
    options = {"parts": config.gradient_accumulation, "norm_ranks": config.norm_ranks}
    work = averaging.work(detector, run.step, config.batch_size, *sent, flags.backward, **options)
    host = flags.host_latency and flags.host_latency * 1e-6
    counts = [n for n in sorted(set(flags.devices)) if not flags.global_batch or flags.global_batch % n == 0]
    if not counts:
        raise UserError(f"--global_batch {flags.global_batch} cannot be shared out over any of --devices {' '.join(map(str, flags.devices))}")
    batches = [flags.global_batch // n if flags.global_batch else config.batch_size for n in counts]
    rows = [predicted(run, work, network, n, batch, flags.loader, host) for n, batch in zip(counts, batches, strict=True)]
    points, total = published(), sum(size for _, size in work.buckets)
    inside = f"{network.inside.latency * 1e6:.3g} µs, {network.inside.bandwidth / 1e9:.3g} GB/s"
    judging = f"{run.detection:.1f} s detecting, shared out over the devices; {run.figures:.1f} s for the figures, not shared out"
    if not run.detection + run.figures:
        judging = "none in the records: all times are of training alone"
    step = f"{run.step * 1e3:.1f} ms a step of {config.batch_size} images (median of {run.spans} stretches)"
    print(
        f"one device  {step}, of it {run.waited / run.step:.0%} waiting for the loader; backend {run.backend}, {run.device}\n"
        f"gradients   {total / 1e6:.1f} MB in {len(work.buckets)} bucket(s); the backward pass is {flags.backward:.3f} of a step\n"
        f"link        {inside}, {source}\n"
        f"evaluation  {judging}\n"
    )
    print(table(rows, points))
    print(
        f"\nPublished points are of other hardware and software, by others, on COCO's {COCO:,} images; their images/s include evaluation.\n"
        f"A predicted epoch is of {run.images:,} images. Epochs to mAP 0.23, known for COCO only, are MLPerf's reference convergence points for\n"
        "global batches from 1024 to 4096, with straight lines between them."
    )
    if flags.json:
        content = {"measured": {**asdict(run), "config": str(flags.run / "config.yaml")}, "work": asdict(work), "network": asdict(network)}
        flags.json.write_text(json.dumps({**content, "predicted": rows, "published": points}, indent=1) + "\n", encoding="utf-8")
    return 0

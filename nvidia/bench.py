"""Kernels against PyTorch eager and their floor, training steps and whole training from JPEG files, in one run on one GPU.

``bash nvidia/bench.sh`` runs the tests and then this, and writes ``nvidia/results/<gpu>.md``. Times are of the device, between two
events around several calls; every case runs once in each round. Kernels are called from a CUDA graph, as the training step calls them:
launched one by one from Python, they would wait for it. What cannot be captured, as it waits for the host, is launched, and marked *.
A floor is the bytes that a kernel must move over the bandwidth of a copy, measured in the same run. What cannot be measured reads "not
measured", and why.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import triton
from base.backends.nvidia.dali import version
from base.backends.nvidia.decoder import decode
from base.backends.nvidia.jitter import jitter, plain_jitter
from base.backends.nvidia.loss import multibox_loss
from base.backends.nvidia.matcher import match
from base.backends.nvidia.model import FusedSSD
from base.backends.nvidia.norm import norm_relu
from base.backends.nvidia.pool import max_pool
from base.backends.nvidia.prologue import prologue
from base.backends.nvidia.stem import stem
from base.backends.nvidia.step import GraphedStep, build_optimizer, precision
from base.backends.reference import decoder, loss, matcher, optimizer, step
from base.backends.reference.model import SSD
from torch.nn import functional
from triton.errors import TritonError

from base.contracts import Batch, Predictions
from base.errors import UserError
from measuring.figures import machine
from measuring.photographs import make
from measuring.ssd300 import CLASSES, SIZE, STRIDES, gflop, truth

ROUNDS, BEFORE = 7, 5  # measured calls, and those before: they compile, choose algorithms, capture
TRIED = 2, 1  # the same on a CPU, where it is only to be seen that it works
ASKED = {"step": 4500, "over eager": 1.5, "over reference": 5, "end to end": 0.85, "floor": 0.7}  # on one H200
LOADERS = {"native": "base.backends.cpu.loader", "dali": "base.backends.nvidia.dali", "reference": "base.backends.reference.loader"}
DECODER = "decoder (eager: one image, times the batch)"  # the reference takes too long for a whole one
FAILURES = (ImportError, OSError, RuntimeError, ValueError, subprocess.SubprocessError, TritonError, UserError)  # of a case, not of the bench
THIS = "this backend"
Case = Callable[[], object] | str  # what is measured, or why it cannot be
Times = dict[str, list[float] | str]  # seconds of each round, or why there are none


def reason(error: Exception) -> str:
    """An error in a line of a table."""
    return " ".join(str(error).replace("|", "/").split())[:200] or type(error).__name__


def waits(case: Callable[[], object]) -> bool:
    """Whether a case waits for the host. To try a capture would tell too, but one that fails leaves torch's allocator in disorder."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        case()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(case: Callable[[], object], repeats: int) -> Callable[[], object]:
    """A CUDA graph of so many calls of a case that has been called before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            case()
    return graph.replay


def seconds(cases: dict[str, Case], device: torch.device, least: float = 0.02, launched: set[str] | None = None) -> Times:
    """Seconds a call of each case, ROUNDS of them, interleaved; each is repeated for ``least`` seconds.

    With a set ``launched``, cases are called from a CUDA graph, and the names of those that cannot be are added to it.
    """

    def once(case: Callable[[], object], repeats: int) -> float:
        if device.type != "cuda":
            began = time.perf_counter()
            for _ in range(repeats):
                case()
            return (time.perf_counter() - began) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            case()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    rounds, before = (ROUNDS, BEFORE) if device.type == "cuda" else TRIED
    graphs: dict[str, Callable[[], object]] = {}
    found: Times = {name: case if isinstance(case, str) else [] for name, case in cases.items()}
    repeats = {}
    for name, case in cases.items():
        if isinstance(case, str):
            continue
        try:
            for _ in range(before):
                case()
            count = max(1, min(1000, round(least / max(once(case, 1), 1e-6))))
            if launched is not None and device.type == "cuda":
                if waits(case):
                    launched.add(name)
                else:
                    graphs[name] = captured(case, count)
                    graphs[name]()
            repeats[name] = count
        except FAILURES as error:
            found[name] = reason(error)
    for _ in range(rounds):
        for name, count in list(repeats.items()):
            try:
                found[name].append(once(graphs[name], 1) / count if name in graphs else once(cases[name], count))
            except FAILURES as error:
                found[name] = reason(error)
                del repeats[name]
    return found


def shown(times: list[float] | str, scale: float = 1e3) -> str:
    """Median and spread, by default in milliseconds; or why there are none."""
    if isinstance(times, str):
        return f"not measured ({times})"
    return f"{median(times) * scale:.3g} ({min(times) * scale:.3g} … {max(times) * scale:.3g})"


def ratio(above: list[float] | float | str, below: list[float] | str) -> str:
    """Of medians, where both are measured."""
    if isinstance(above, str) or isinstance(below, str):
        return ""
    return f"{(median(above) if isinstance(above, list) else above) / median(below):.3g}"


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of ``size`` bytes reads and writes."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / median(seconds({"copy": lambda: b.copy_(a)}, device)["copy"])


def operations(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product."""
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / median(seconds({"product": lambda: a @ a}, device)["product"])


def kernels(device: torch.device, images: int, rate: float) -> tuple[list[str], dict[str, Times]]:
    """Rows of the table of kernels, and their times."""
    dtype, boxes = precision(device), SSD(num_classes=2, image_size=SIZE, strides=STRIDES, backbone="resnet18").default_boxes.to(device)
    wide, count = torch.empty((), dtype=dtype).element_size(), len(boxes)
    pictures = torch.randint(0, 256, (images, *SIZE, 3), dtype=torch.uint8, device=device)
    given = tuple(t.to(device) for t in truth(images, 7))
    targets = matcher.match(*given, boxes)  # the kernels are only asked where they are timed
    offsets, logits = (torch.randn(images, count, n, device=device, dtype=dtype).requires_grad_() for n in (4, CLASSES))
    predictions = Predictions(offsets, logits)
    spiky = Predictions(offsets.detach(), logits.detach() * 2)
    single = Predictions(*(t[:1] for t in spiky))
    threshold = 0.05 if device.type == "cuda" else 0.9  # a CPU would take minutes
    norm = torch.nn.BatchNorm2d(256).to(device)
    x, shortcut, slope = (
        torch.randn(images, 256, 38, 38, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_() for _ in range(3)
    )

    draws = torch.rand(images, 4).double() * 0.1 + 0.95, torch.rand(images, 4).argsort(1)

    def plain_norm():
        return torch.relu_(norm(x) + shortcut)

    def backward(result, inputs, slope=None):
        torch.autograd.grad(result, inputs, slope)

    weight = torch.randn(64, 3, 7, 7, device=device).requires_grad_()
    normal = prologue(pictures, dtype)
    wide_map = torch.randn(images, 64, *(side // 2 for side in SIZE), device=device, dtype=dtype)
    wide_map = wide_map.to(memory_format=torch.channels_last).requires_grad_()

    def first(convolve: Callable):
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            y = convolve(normal, weight)
        torch.autograd.grad(y, weight, y.detach())  # an image needs no gradient

    def pooled(pool: Callable):
        y = pool(wide_map)
        torch.autograd.grad(y, wide_map, y.detach())

    cases = {  # name: (this backend, eager, bytes)
        "prologue": (lambda: prologue(pictures, dtype), lambda: step.normalise(pictures).to(dtype), pictures.numel() * (1 + wide)),
        "colour jitter": (lambda: jitter(pictures, *draws), lambda: plain_jitter(pictures, *draws), 3 * pictures.numel()),  # it reads twice
        "matcher": (lambda: match(*given, boxes), lambda: matcher.match(*given, boxes), images * count * 24),
        "loss, forward and backward": (
            lambda: backward(multibox_loss(predictions, targets), list(predictions)),
            lambda: backward(loss.multibox_loss(predictions, targets), list(predictions)),
            images * count * (2 * CLASSES + 4) * wide,
        ),
        "first convolution, forward and backward": (
            lambda: first(stem),
            lambda: first(lambda x, w: functional.conv2d(x, w, stride=2, padding=3)),
            2 * (normal.numel() + wide_map.numel()) * wide,
        ),
        "pooling, forward and backward": (
            lambda: pooled(max_pool),
            lambda: pooled(lambda x: functional.max_pool2d(x, 3, 2, 1)),
            (2 * wide_map.numel() + wide_map.numel() // 2) * wide + wide_map.numel() // 2,
        ),
        DECODER: (lambda: decode(spiky, boxes, threshold), lambda: decoder.decode(single, boxes, threshold), images * count * CLASSES * wide),
        "norm + add + ReLU, forward and backward": (
            lambda: backward(norm_relu(norm, x, shortcut, True), [x, shortcut, norm.weight, norm.bias], slope),
            lambda: backward(plain_norm(), [x, shortcut, norm.weight, norm.bias], slope),
            11 * x.numel() * wide,
        ),
    }
    rows = [f"| kernel, {images} images | ms | eager, ms | eager / this | floor, ms | floor / this |", "| --- | --- | --- | --- | --- | --- |"]
    raw = {}
    for name, (ours, eager, size) in cases.items():
        launched: set[str] = set()
        times = raw[name] = seconds({"this": ours, "eager": eager}, device, launched=launched)
        own, other = (shown(times[case]) + " *" * (case in launched) for case in ("this", "eager"))
        if name == DECODER and not isinstance(times["eager"], str):
            times = {**times, "eager": [t * images for t in times["eager"]]}
            other = shown(times["eager"]) + " *" * ("eager" in launched)
        floor = size / rate
        columns = own, other, ratio(times["eager"], times["this"]), f"{floor * 1e3:.3g}", ratio(floor, times["this"])
        rows.append(f"| {name} | {' | '.join(columns)} |")
    rows += ["", "*: launched, not called from a graph, as it waits for the host. Inputs that fit the cache stay in it from call to call."]
    return rows, raw


class EagerStep(step.TrainStep):
    """What a person writes first: autocast and channels-last, here with this backend's matcher and loss."""

    memory_format = torch.channels_last

    def precision(self, device: torch.device) -> torch.dtype:
        return precision(device)


class StepWithoutGraph(GraphedStep):
    """This backend's step as it is before the capture."""

    def __call__(self, batch: Batch, learning_rate: float) -> torch.Tensor:
        self.steps = 0
        return super().__call__(batch, learning_rate)


def steps(device: torch.device, size: int, images: int, backbone: str) -> dict[str, Callable[[Batch], object] | str]:
    """name → a training step on a batch, or why there is none."""
    built: dict[str, Callable[[Batch], object] | str] = {}
    makers = {
        "reference": (SSD, optimizer.build_optimizer, step.TrainStep, matcher.match, loss.multibox_loss),
        "eager AMP, channels-last": (SSD, optimizer.build_optimizer, EagerStep, match, multibox_loss),
        THIS: (FusedSSD, build_optimizer, GraphedStep, match, multibox_loss),
        f"{THIS} without graph": (FusedSSD, build_optimizer, StepWithoutGraph, match, multibox_loss),
    }
    for name, (model, optimise, kind, matches, losses) in makers.items():
        torch.manual_seed(0)
        try:
            net = model(num_classes=CLASSES, image_size=(size, size), strides=STRIDES, backbone=backbone).to(device)
            sgd = optimise(net.parameters(), momentum=0.9, weight_decay=5e-4)
            train = kind(model=net, optimizer=sgd, matcher=matches, loss=losses, device=device)
        except FAILURES as error:
            built[name] = reason(error)
        else:
            built[name] = lambda batch, train=train: train(batch, 1e-3)
    return built


def profile(train: Callable[[], object], calls: int = 3) -> list[str]:
    """What a step is made of: milliseconds and calls a step of every kernel on the device, the longest first."""
    found: dict[str, list[float]] = {}
    with torch.profiler.profile() as recorded:
        for _ in range(calls):
            train()
        torch.cuda.synchronize()
    for event in recorded.events():
        if event.device_type is torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time / 1e3 / calls)
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))
    total = sum(map(sum, found.values()))
    return [f"{total:8.3f} ms a step"] + [f"{sum(times):8.3f} ms {len(times) / calls:6.1f} × {name[:200]}" for name, times in longest]


def random_batch(images: int, size: int, device: torch.device) -> Batch:
    pictures = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)
    return Batch(*(t.to(device) for t in (pictures, *truth(images, 7), torch.arange(images), torch.full((images, 2), size))))


def from_files(train: Callable[[Batch], object], folder: Path, name: str, images: int, size: int, workers: int, device: torch.device) -> list[float]:
    """Images a second of training from JPEG files, epochs of 60 steps with their start; the first is not counted."""
    loaders = importlib.import_module(LOADERS[name])
    given = {"annotation_file": folder / "annotations.json", "image_dir": folder / "images", "image_size": (size, size), "seed": 1}
    loader = loaders.train_loader(**given, batch_size=images, workers=workers)
    rates = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        began = time.perf_counter()
        for batch in loader:
            result = train(batch)
        result.item()
        rates.append(len(loader) * images / (time.perf_counter() - began))
    return rates[1:]


def save(file: Path | None, lines: list[str], raw: dict) -> None:
    """The tables, and beside them the raw times."""
    if file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        file.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base.backends.nvidia.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: only to see that it works, on little work")
    parser.add_argument("--batch", type=int, default=128, help="images of a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=16, help="threads of the loader (default: %(default)s)")
    parser.add_argument("--profile", type=Path, default=None, help="text file for the kernels of a step of this backend, on a GPU")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file; the raw times go beside it as .json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    small = device.type != "cuda"
    if small:
        card, images, size, backbone, workers = "cpu", 2, 300, "resnet18", 1
    elif not torch.cuda.is_available():
        print("error: no CUDA device here; --device cpu shows only that the bench works", file=sys.stderr)
        return 2
    else:
        card, images, size, backbone, workers = torch.cuda.get_device_name(device), options.batch, 300, "resnet34", options.workers
    about = {**machine(), "gpu": card, "torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    about["dali"] = version() or "not installed"
    rate, flops = bandwidth(device, 1 << (24 if small else 30)), operations(device, 256 if small else 8192, precision(device))
    lines = [f"# {card}", "", *(f"- {name}: {value}" for name, value in about.items())]
    lines += [f"- copy: {rate / 1e9:,.0f} GB/s", f"- matrix product, {precision(device)}: {flops / 1e12:,.1f} TFLOP/s", ""]
    rows, raw = kernels(device, images, rate)
    lines += [*rows, ""]
    print("\n".join(lines), flush=True)
    save(options.out, lines, {"about": about, "seconds": raw})  # whatever becomes of the rest

    trains = steps(device, size, images, backbone)
    batch = random_batch(images, size, device)
    cases = {name: train if isinstance(train, str) else lambda train=train: train(batch) for name, train in trains.items()}
    times = raw["step"] = seconds(cases, device, least=0.5)
    table = [f"| training step, batch {images}, {backbone} | images/s | this / it |", "| --- | --- | --- |"]
    for name, each in times.items():
        table.append(f"| {name} | {shown(each if isinstance(each, str) else [images / t for t in each], 1)} | {ratio(each, times[THIS])} |")
    if not small:  # what a larger batch brings
        train, larger = steps(device, size, 2 * images, backbone)[THIS], random_batch(2 * images, size, device)
        each = raw["step, twice the batch"] = seconds({THIS: train if isinstance(train, str) else lambda: train(larger)}, device, least=0.5)
        rates = each[THIS] if isinstance(each[THIS], str) else [2 * images / t for t in each[THIS]]
        table.append(f"| {THIS}, batch {2 * images} | {shown(rates, 1)} | |")
        each_image = gflop({"num_classes": CLASSES, "image_size": SIZE, "strides": STRIDES, "backbone": backbone})
        table.append(f"| the matrix product's rate, at {each_image:.4g} GFLOP an image | {shown([flops / each_image / 1e9], 1)} | |")
    asked = ", ".join(f"{name} {value}" for name, value in ASKED.items())

    def say(*rows: str) -> None:
        """Prints rows of the second table, and saves all that there is, whatever becomes of the rest."""
        print("\n".join(rows), flush=True)
        lines.extend(rows)
        save(options.out, [*lines, "", f"Asked of one H200: {asked}."], {"about": about, "seconds": raw})

    say(*table)
    if options.profile and not small and callable(cases[THIS]):
        options.profile.write_text("\n".join(profile(cases[THIS])) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as place:
        folder = Path(place)
        make(folder, 4 if small else 128, times=1 if small else max(1, 60 * images // 128))
        for name in LOADERS:
            if name == "reference" and any("files" in case for case in raw):
                continue  # it stands in where no other works
            row = f"from JPEG files, {name} loader, {workers} threads"
            try:
                if isinstance(times[THIS], str):
                    raise UserError(f"{THIS} was not measured")
                rates = from_files(trains[THIS], folder, name, images, size, workers, device)
            except FAILURES as error:
                say(f"| {row} | not measured ({reason(error)}) | |")
                continue
            raw[f"from files, {name}"] = {"images/s": rates}
            say(f"| {row} | {shown(rates, 1)} | {ratio(images / median(times[THIS]), rates)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

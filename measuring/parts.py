"""The components of several backends, measured side by side: interleaved, in one process, medians with spread.

Each part's function says in its docstring what is timed. Ratios are to the backend ``reference``, to what the machine allows
(`measuring.work` says what a part needs of it), and to the peers: what a backend's ``peers.py`` measures itself beside, in the same
rounds. It has a function for a part, which takes the part's work and returns name → callable, or name → why it is not measured;
AT_LEAST and AT_MOST say what the backend is to reach, beside a peer, "ceiling", or nothing ("").

Quick, all is smaller, and there are neither peers nor bounds.
"""

import importlib
import importlib.util
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from measuring.figures import Figure, Log
from measuring.ssd300 import SSD300
from measuring.timing import Cases, Times, interleaved, ratio
from measuring.work import (
    WORKERS,
    Case,
    Photographs,
    decoder_case,
    demo_model,
    epochs,
    evaluator_case,
    loader_case,
    loss_case,
    matcher_case,
    step_case,
    train_cases,
)

IMAGES = 32  # of a batch, as in MLPerf's reference
LEAST = 0.05  # seconds that a case is repeated for in each round
QUICK = 5  # rounds


def peers_of(name: str) -> ModuleType | None:
    """A backend's ``peers.py``, if it has one."""
    module = f"base.backends.{name}.peers"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def bound(kind: str, name: str, part: str, *keys: str) -> float | None:
    """What a backend's peers.py asks of a figure, if anything; ``kind`` is AT_LEAST or AT_MOST."""
    found = getattr(peers_of(name), kind, {}).get(part, {})
    for key in keys:
        found = found.get(key, {})
    return found or None


def compared(part: str, cases: dict[str, Case], rounds: int, warm_up: bool = True, quick: bool = False) -> list[Figure]:
    """Rates of all cases' backends, of their peers and of what the machine allows, all of it in the same rounds.

    ``cases``: what is timed → its work. After the rates of a case come each backend's ratios to its peers.
    """
    timed: Cases = {}
    peers: dict[str, dict[str, Callable | str]] = {}
    for label, case in cases.items():
        peers[label] = {}
        for name in [] if quick else case.own:
            peers[label] |= getattr(peers_of(name), part, lambda given: {})(case.given)
        timed |= {said(name, label): call for name, call in {**case.own, **peers[label]}.items() if callable(call)}
        timed |= {by.name: by.run for limit in case.limits for by in limit.by}
    seconds = interleaved(timed, rounds, warm_up, LEAST)
    return [figure for label, case in cases.items() for figure in figures_of(part, label, case, peers[label], seconds, quick)]


def said(name: str, label: str) -> str:
    return f"{name}, {label}" if label else name


def allowed(case: Case, seconds: Times) -> tuple[str, list[float]]:
    """The machine's limit that binds, in words, and the seconds of each round that it leaves for a call of the case."""
    limits = []
    for limit in case.limits:
        need = limit.need * case.amount
        ways = {by.name: [s * need / by.amount for s in seconds[by.name]] for by in limit.by}
        fastest = min(ways, key=lambda name: statistics.median(ways[name]))
        limits.append((f"{limit.how}, {fastest}", ways[fastest]))
    return max(limits, key=lambda limit: statistics.median(limit[1]))


def figures_of(part: str, label: str, case: Case, peers: dict, seconds: Times, quick: bool) -> list[Figure]:
    how, ceiling = allowed(case, seconds)
    plain = seconds.get(said("reference", label))

    def rate(name: str, runs: list[float], least: float | None) -> Figure:
        rates = sorted(case.amount / s for s in runs)
        spread = rates[0], rates[-1]
        ratios = {"reference": ratio(plain, runs) if plain else None, "ceiling": ratio(ceiling, runs)}
        return Figure(name, statistics.median(rates), case.unit, runs=len(runs), spread=spread, least=least, **ratios)

    def asked(name: str, of: str) -> float | None:
        return None if quick or name not in case.own else bound("AT_LEAST", name, part, label, of)

    others = {name: seconds[said(name, label)] for name, peer in peers.items() if callable(peer)}
    mine = {name: seconds[said(name, label)] for name in case.own}
    figures = [rate(said(name, label), runs, asked(name, "")) for name, runs in {**mine, **others}.items()]
    figures += [Figure(said(name, label), None, case.unit, note=why) for name, why in peers.items() if isinstance(why, str)]
    figures.append(rate(said("ceiling", label) + f" ({how})", ceiling, None))
    for name in case.own:
        beside = {} if name == "reference" else {**others, "ceiling": ceiling}
        for other, runs in beside.items():
            least = asked(name, other)
            if least or other != "ceiling":
                figures.append(Figure(said(f"{name} / {other}", label), ratio(runs, mine[name]), "×", least=least))
    return figures


def memory(process: int | str, entry: str) -> float:
    """An entry of /proc/PROCESS/status in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024 / 1e6


def children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def of_reference(sizes: dict[str, float], name: str) -> float | None:
    """A size as a multiple of the reference's, if that has one."""
    return sizes[name] / sizes["reference"] if sizes.get("reference") else None


def loader(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """Training batches of 32 at 300×300 from 256 photographs, 2 workers, an epoch of 1,024 samples each; start-up and first epochs not counted.
    The ceiling is decoding the whole pictures on as many threads, by the fastest decoder at hand; who decodes only what a crop
    shows may be above it. Before that, each loader makes 10,000 samples: the memory of a worker is the resident memory of the
    largest process, or what threads add to this one, each; its growth is that from 2,000 samples on."""
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        count, times, batch = (32, 4, 16) if quick else (256, 4, IMAGES)
        log(f"making {count} photographs")
        data, loaders, figures = Photographs(Path(folder), count, times), {}, []
        sizes: dict[str, dict[str, float]] = {"memory a worker": {}, "its growth": {}}
        for name in names:
            before, older, found = memory("self", "VmRSS"), children(), []
            loaders[name] = data.loader(name, batch)
            if quick:
                continue
            log(f"10,000 samples by {name}")
            epoch = epochs(loaders[name])
            for most in (2_000, 10_000):
                for _ in range(len(found) * 2_000, most, data.count):
                    epoch()
                mine = children() - older
                found.append(max(memory(pid, "VmRSS") for pid in mine) if mine else (memory("self", "VmRSS") - before) / WORKERS)
            sizes["memory a worker"][name], sizes["its growth"][name] = found[1], found[1] - found[0]
        for what, found in sizes.items():
            for name, size in found.items():
                most = bound("AT_MOST", name, "loader", what)
                figures.append(Figure(f"{name}, {what}", size, "MB", most, reference=of_reference(found, name)))
        log("timing")
        return figures + compared("loader", {"": loader_case(loaders, data, batch)}, QUICK if quick else 7, quick=quick)


def matcher(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """Matching a batch of 32 images to 8,732 default boxes: 7 boxes an image, then 500.
    The ceiling is copying as many bytes as boxes and labels take that come in and targets that go out."""
    figures = []
    for boxes, rounds in ((7, QUICK),) if quick else ((7, 15), (500, 5)):
        figures += compared("matcher", {f"{boxes} boxes": matcher_case(names, 8 if quick else IMAGES, boxes)}, rounds, quick=quick)
    return figures


def loss(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """Loss forward and backward, batch 32, 8,732 default boxes, 81 classes, 7 boxes an image; float32 and bfloat16 logits. Then
    the resident memory at its peak, above that before, as a multiple of the logits' bytes: gradients are part of it.
    The ceiling is copying as many bytes as predictions, targets and gradients take."""
    figures = []
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        label, case = str(dtype).removeprefix("torch."), loss_case(names, 4 if quick else IMAGES, dtype=dtype)
        figures += compared("loss", {label: case}, QUICK if quick else 9, quick=quick)
        extra, logits = {}, case.given.logits
        for name in [] if quick else names:
            logits.grad = case.given.offsets.grad = None
            before = memory("self", "VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            case.own[name]()
            extra[name] = (memory("self", "VmHWM") - before) * 1e6 / (logits.numel() * logits.element_size())
        for name, size in extra.items():
            most = bound("AT_MOST", name, "loss", "extra memory")
            figures.append(Figure(f"{name}, extra memory / logits, {label}", size, "×", most, reference=of_reference(extra, name)))
    return figures


def decoder(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """Decoding 16 images: crowded (some 150 default boxes above the threshold in each of 80 classes), then with all 8,732 default
    boxes above the threshold (0.005) in all 80 classes. The ceiling is copying as many bytes as the predictions take."""
    crowded, everything = ("crowded", 2.4, 0.05), ("all above the threshold", 0.1, 0.005)
    figures = []
    for label, spread, threshold in (crowded,) if quick else (crowded, everything):
        log(label)
        case = decoder_case(names, 2 if quick else 16, spread=spread, threshold=threshold)
        figures += compared("decoder", {label: case}, QUICK if quick else 3, quick=quick)
    return figures


def evaluator(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """COCO's 12 figures of 5,000 images with 7 boxes and 200 detections each, update and compute together, without warm-up.
    The ceiling is sorting as many scores once, which every evaluator has to do; reading and matching come on top of it."""
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        case = evaluator_case(names, 100 if quick else 5_000, Path(folder))
        if "reference" in names and not quick:
            log("three rounds; the reference takes a minute and more in each")
        return compared("evaluator", {"": case}, 3, warm_up=quick, quick=quick)


def step(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """A whole training step of SSD300-ResNet34 on batch 32, 81 classes. The ceiling is the machine's rate of convolutions (3×3, 256 → 256
    channels at 38×38, bf16 or float32, whichever is faster) over the operations of the model's, forward and backward."""
    if not quick:
        log("three rounds; the reference takes half a minute in each")
    case = step_case(names, 4 if quick else IMAGES, demo_model() if quick else SSD300)
    return compared("step", {"": case}, QUICK if quick else 3, quick=quick)


def train(log: Log, names: list[str], quick: bool = False) -> list[Figure]:
    """Training from JPEG files, the backend's loader with 2 workers and its step: SSD300-ResNet34 on 24 photographs in batches of 8, and the
    demo's model on 128 in batches of 16, from the first batch asked for to the last step done. Beside it, in the same rounds, the
    loader alone and the step alone on a batch in memory. The ceiling is decoding or convolutions, whichever allows fewer images."""
    figures = []
    work = {"SSD300-ResNet34": (SSD300, 24, 8), "the demo's model": (demo_model(), 128, 16)}
    if quick:
        work = {"the demo's model": (demo_model(), 16, 8)}
    for label, (model, images, batch) in work.items():
        log(f"{label}, three rounds")
        with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
            data = Photographs(Path(folder), images)
            cases = train_cases(names, data, batch, model)
            found = compared("train", {said(label, what): case for what, case in cases.items()}, 3, quick=quick)
        rates = {figure.name: figure.value for figure in found}
        for name, alone in itertools.product(names, ("loader alone", "step alone")):
            share = rates[said(name, label)] / rates[said(name, said(label, alone))]
            found.append(Figure(f"{name} / its {alone}, {label}", share, "×"))
        figures += found
    return figures

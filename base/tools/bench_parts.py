"""The components of several backends, measured side by side: interleaved, in one process, medians with spread.

Each part's function says in its docstring what is timed. Ratios are to the backend ``reference``, and to the peers: what a
backend's ``peers.py`` measures itself beside, in the same rounds. It has a function for a part, which takes the part's work
and returns name → callable, or name → why it is not measured; AT_LEAST and AT_MOST say what the backend is to reach.
"""

import importlib
import importlib.util
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image

from base.backend import load_backend
from base.contracts import Batch, Detections, Predictions
from base.tools.bench import Figure
from data_sets.index import AnnotationIndex
from data_sets.photographs import make

CLASSES, SIZE, STRIDES = 81, (300, 300), (1, 1, 2, 2, 2, 1)
STEP_GFLOP = 94.75  # SSD300-R34, 81 classes, forward and backward of one image, a multiply-add counts 2
WORKERS, PHOTOGRAPHS, TIMES = 2, 256, 4
IMAGES = 32  # of a batch, as in MLPerf's reference
Cases = dict[str, Callable[[], object]]


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


def interleaved(cases: Cases, rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each case, one after the other in every round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + warm_up):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(
    part: str,
    case: str,
    own: Cases,
    work: SimpleNamespace,
    amount: float,
    unit: str,
    rounds: int,
    ceilings: Cases | None = None,
    warm_up: bool = True,
) -> list[Figure]:
    """Rates (``amount`` a second) of the backends in ``own``, of their peers and of ceilings; each backend's ratios to all others."""
    peers: dict[str, Callable | str] = {}
    for name in own:
        peers |= getattr(peers_of(name), part, lambda work: {})(work)
    others = {name: peer for name, peer in peers.items() if callable(peer)} | (ceilings or {})
    seconds = interleaved({**own, **others}, rounds, warm_up)
    rates = {name: sorted(amount / s for s in runs) for name, runs in seconds.items()}
    middles = {name: statistics.median(runs) for name, runs in rates.items()}
    more = f", {case}" if case else ""

    def rate(name: str, runs: list[float]) -> Figure:
        least = bound("AT_LEAST", name, part, case, "") if name in own else None
        return Figure(name + more, middles[name], unit, runs=len(runs), spread=(runs[0], runs[-1]), least=least)

    figures = [rate(name, runs) for name, runs in rates.items()]
    figures += [Figure(name + more, None, unit, note=why) for name, why in peers.items() if isinstance(why, str)]
    for name in own:
        for other in ["reference", *others] if name != "reference" else []:
            if other in middles:
                least = bound("AT_LEAST", name, part, case, other)
                figures.append(Figure(f"{name} / {other}{more}", middles[name] / middles[other], "×", least=least))
    return figures


def memory(process: int | str, entry: str) -> float:
    """An entry of /proc/PROCESS/status in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024 / 1e6


def children() -> set[int]:
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def loader(log, names: list[str]) -> list[Figure]:
    """Training batches of 32 at 300×300 from 256 photographs, 2 workers, an epoch of 1,024 samples each; start-up and first epochs not counted.
    Beside them the decoding alone of the whole pictures on as many threads. Before that, each loader makes 10,000 samples: the
    memory of a worker is the resident memory of the largest process, or what threads add to this one, each; its growth is that
    from 2,000 samples on."""
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        log(f"making {PHOTOGRAPHS} photographs")
        annotations = make(Path(folder), PHOTOGRAPHS, times=TIMES)
        images = Path(folder, "images")
        given = {"annotation_file": annotations, "image_dir": images, "image_size": SIZE, "batch_size": IMAGES, "workers": WORKERS, "seed": 1}
        epochs, loaders, figures = itertools.count(), {}, []

        def epoch(name: str) -> None:
            loaders[name].set_epoch(next(epochs))
            for _ in loaders[name]:
                pass

        for name in names:
            log(f"10,000 samples by {name}")
            before, older, sizes = memory("self", "VmRSS"), children(), []
            loaders[name] = load_backend(name).train_loader(**given)
            for most in (2_000, 10_000):
                for _ in range(len(sizes) * 2_000, most, PHOTOGRAPHS * TIMES):
                    epoch(name)
                mine = children() - older
                sizes.append(max(memory(pid, "VmRSS") for pid in mine) if mine else (memory("self", "VmRSS") - before) / WORKERS)
            for what, size in (("memory a worker", sizes[1]), ("its growth", sizes[1] - sizes[0])):
                figures.append(Figure(f"{name}, {what}", size, "MB", bound("AT_MOST", name, "loader", what)))

        files = [path.read_bytes() for path in sorted(images.iterdir())] * TIMES
        index = AnnotationIndex.open(annotations)
        work = SimpleNamespace(index=index, folder=images, annotations=annotations, files=files, default_boxes=_default_boxes())

        def whole() -> None:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(lambda data: np.asarray(Image.open(io.BytesIO(data))), files))

        own: Cases = {name: lambda name=name: epoch(name) for name in names}
        return figures + compared("loader", "", own, work, PHOTOGRAPHS * TIMES, "images/s", 7, {"decoding alone, PIL": whole})


def truth(images: int, boxes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random boxes (N, M, 4) ltrb and labels (N, M) each time."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(images, boxes, 2, generator=generator) * 0.8
    size = 0.02 + torch.rand(images, boxes, 2, generator=generator) * 0.18
    return torch.cat([corner, corner + size], -1), torch.randint(1, CLASSES, (images, boxes), generator=generator)


def _default_boxes():
    return load_backend("reference").model(num_classes=2, image_size=SIZE, strides=STRIDES, backbone="resnet18").default_boxes


def matcher(log, names: list[str]) -> list[Figure]:
    """Matching a batch of 32 images to 8,732 default boxes: 7 boxes an image, then 500."""
    defaults, figures = _default_boxes(), []
    for count, rounds in ((7, 30), (500, 5)):
        boxes, labels = truth(IMAGES, count)
        found = {name: load_backend(name).matcher for name in names}
        own: Cases = {name: lambda match=match, boxes=boxes, labels=labels: match(boxes, labels, defaults) for name, match in found.items()}
        figures += compared("matcher", f"{count} boxes", own, SimpleNamespace(boxes=boxes, labels=labels), IMAGES, "images/s", rounds)
    return figures


def loss(log, names: list[str]) -> list[Figure]:
    """Loss forward and backward, batch 32, 8,732 default boxes, 81 classes, 7 boxes an image; float32 and bfloat16 logits. Then
    the resident memory at its peak, above that before, as a multiple of the logits' bytes: gradients are part of it."""
    defaults, figures = _default_boxes(), []
    boxes, labels = truth(IMAGES, 7)
    targets = load_backend("reference").matcher(boxes, labels, defaults)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(IMAGES, len(defaults), CLASSES).to(dtype).requires_grad_()
        offsets = torch.randn(IMAGES, len(defaults), 4).to(dtype).requires_grad_()

        def both(name: str, offsets=offsets, logits=logits) -> None:
            logits.grad = offsets.grad = None
            load_backend(name).loss(Predictions(offsets, logits), targets).backward()

        case = str(dtype).removeprefix("torch.")
        work = SimpleNamespace(boxes=boxes, labels=labels, offsets=offsets, logits=logits)
        figures += compared("loss", case, {name: lambda name=name, both=both: both(name) for name in names}, work, 1, "steps/s", 9)
        for name in names:
            logits.grad = offsets.grad = None
            before = memory("self", "VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            both(name)
            extra = (memory("self", "VmHWM") - before) * 1e6 / (logits.numel() * logits.element_size())
            figures.append(Figure(f"{name}, extra memory / logits, {case}", extra, "×", bound("AT_MOST", name, "loss", "extra memory")))
    return figures


def decoder(log, names: list[str]) -> list[Figure]:
    """Decoding 16 images: crowded (some 150 default boxes above the threshold in each of 80 classes), then with all 8,732 default
    boxes above the threshold (0.005) in all 80 classes."""
    defaults, figures = _default_boxes(), []
    found = {name: load_backend(name).decoder for name in names}
    for case, spread, threshold in (("crowded", 2.4, 0.05), ("all above the threshold", 0.1, 0.005)):
        generator = torch.Generator().manual_seed(2)
        logits = torch.randn(16, len(defaults), CLASSES, generator=generator) * spread
        predictions = Predictions(torch.randn(16, len(defaults), 4, generator=generator), logits)
        own: Cases = {name: lambda decode=decode, p=predictions, t=threshold: decode(p, defaults, t) for name, decode in found.items()}
        work = SimpleNamespace(predictions=predictions, score_threshold=threshold)
        figures += compared("decoder", case, own, work, 16, "images/s", 3)
    return figures


def evaluator(log, names: list[str]) -> list[Figure]:
    """COCO's 12 figures of 5,000 images with 7 boxes and 200 detections each, update and compute together, without warm-up."""
    count = 5_000
    rng = np.random.default_rng(3)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, count + 1)]
    truth = [
        {"id": n, "image_id": n % count + 1, "category_id": int(rng.integers(1, 81)), "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
        for n, box in enumerate(np.concatenate([rng.random((7 * count, 2)) * 300, rng.uniform(10, 180, (7 * count, 2))], 1).tolist(), 1)
    ]
    dataset = {"images": images, "annotations": truth, "categories": [{"id": i, "name": str(i)} for i in range(1, 81)]}
    corner = torch.rand(count, 200, 2) * 0.6
    boxes = torch.cat([corner, corner + 0.02 + torch.rand(count, 200, 2) * 0.3], -1)
    labels, scores = torch.randint(1, 81, (count, 200)), torch.rand(count, 200).sort(descending=True)[0]
    detections = [Detections(b, c, s) for b, c, s in zip(boxes, labels, scores, strict=True)]
    ids = torch.arange(1, count + 1)
    pixels = boxes.double() * torch.tensor([640, 480, 640, 480])
    columns = ids[:, None].expand(-1, 200), pixels[..., 0], pixels[..., 1], *(pixels[..., 2:] - pixels[..., :2]).unbind(-1), scores, labels
    results = torch.stack([c.double().flatten() for c in columns], 1).numpy()
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(dataset))

        def run(name: str) -> None:
            judge = load_backend(name).evaluator(file)
            judge.update(ids, torch.tensor([[480, 640]] * count), detections)
            judge.compute()

        own: Cases = {name: lambda name=name: run(name) for name in names}
        log("three rounds; the reference takes a minute and more in each")
        return compared("evaluator", "", own, SimpleNamespace(truth=dataset, found=results), count, "images/s", 3, warm_up=False)


def step(log, names: list[str]) -> list[Figure]:
    """A whole training step of SSD300-ResNet34 on batch 32, 81 classes, and beside it the machine's convolution rate
    (3×3, 256 → 256 channels at 38×38, batch 32, bf16 and float32), as the images/s that it would allow."""
    images = torch.randint(0, 256, (IMAGES, *SIZE, 3), dtype=torch.uint8)
    batch = Batch(images, *truth(IMAGES, 7), torch.arange(IMAGES), torch.full((IMAGES, 2), 300))
    log("three rounds; the reference takes half a minute in each")
    own: Cases = {}
    for name in names:
        backend = load_backend(name)
        torch.manual_seed(0)
        model = backend.model(num_classes=CLASSES, image_size=SIZE, strides=STRIDES, backbone="resnet34")
        optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        parts = {"matcher": backend.matcher, "loss": backend.loss, "device": torch.device("cpu")}
        train = backend.step(model=model, optimizer=optimizer, **parts)
        own[name] = lambda train=train: train(batch, 1e-3)
    return compared("step", "", own, SimpleNamespace(batch=batch), IMAGES, "images/s", 3, convolutions())


def convolutions() -> Cases:
    """Convolutions of as many operations as a batch's training takes."""
    operations = 2 * IMAGES * 38 * 38 * 256 * 256 * 9
    repeats = round(IMAGES * STEP_GFLOP * 1e9 / operations)

    def run(dtype: torch.dtype) -> None:
        with torch.no_grad():
            x = torch.randn(IMAGES, 256, 38, 38, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
            for _ in range(repeats):
                torch.nn.functional.conv2d(x, w, padding=1)

    return {f"ceiling by {str(d).removeprefix('torch.')} convolution": lambda d=d: run(d) for d in (torch.bfloat16, torch.float32)}

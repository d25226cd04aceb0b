"""The components of several backends, measured side by side: interleaved, in one process, medians with spread.

Each part's first function says in its docstring what is timed. Ratios are to the backend ``reference``, in the same run.
"""

import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from base.backend import load_backend
from base.contracts import Batch, Detections, Predictions
from base.tools.bench import Figure
from base.tools.photographs import make

CLASSES, SIZE, STRIDES = 81, (300, 300), (1, 1, 2, 2, 2, 1)
STEP_GFLOP = 94.75  # SSD300-R34, 81 classes, forward and backward of one image, a multiply-add counts 2
Cases = dict[str, Callable[[], None]]


def interleaved(cases: Cases, rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, one after the other in every round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(seconds: dict[str, list[float]], amount: float, unit: str, reference: str = "reference") -> list[Figure]:
    """amount / seconds (a rate) of each case, and its ratio to the reference's median."""
    rates = {name: sorted(amount / s for s in runs) for name, runs in seconds.items()}
    figures = []
    for name, runs in rates.items():
        middle = statistics.median(runs)
        figures.append(Figure(name, middle, unit, runs=len(runs), spread=(runs[0], runs[-1])))
        if name != reference and reference in rates:
            figures.append(Figure(f"{name} / {reference}", middle / statistics.median(rates[reference]), "×"))
    return figures


def loader(log, names: list[str]) -> list[Figure]:
    """Training batches at 300×300 from 256 photographs, 2 workers, one epoch each; start-up and first epoch not counted.
    Beside them the decoding alone of the whole pictures on as many threads."""
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        log("making 256 photographs")
        annotations = make(Path(folder), 256)
        given = {"annotation_file": annotations, "image_dir": Path(folder, "images"), "image_size": SIZE, "batch_size": 32, "workers": 2, "seed": 1}
        loaders = {name: load_backend(name).train_loader(**given) for name in names}
        epochs = dict.fromkeys(names, 0)

        def epoch(name: str) -> None:
            epochs[name] += 1
            loaders[name].set_epoch(epochs[name])
            for _ in loaders[name]:
                pass

        files = [path.read_bytes() for path in sorted(Path(folder, "images").iterdir())]
        cases: Cases = {name: lambda name=name: epoch(name) for name in names}
        cases.update(decoding(files))
        return compared(interleaved(cases, rounds=5), 256, "images/s")


def decoding(files: list[bytes]) -> Cases:
    """Whole-picture decoding on two threads, with PIL and, where it is installed, simplejpeg."""
    decoders = {"decode alone, PIL": lambda data: np.asarray(Image.open(io.BytesIO(data)))}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        decoders["decode alone, simplejpeg"] = simplejpeg.decode_jpeg

    def run(decoder) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(decoder, files))

    return {name: lambda decoder=decoder: run(decoder) for name, decoder in decoders.items()}


def _truth(images: int, boxes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(images, boxes, 2, generator=generator) * 0.8
    size = 0.02 + torch.rand(images, boxes, 2, generator=generator) * 0.18
    return torch.cat([corner, corner + size], -1), torch.randint(1, CLASSES, (images, boxes), generator=generator)


def _default_boxes():
    return load_backend("reference").model(num_classes=2, image_size=SIZE, strides=STRIDES, backbone="resnet18").default_boxes


def matcher(log, names: list[str]) -> list[Figure]:
    """Matching a batch of 32 images to 8,732 default boxes: 7 boxes an image, then 500."""
    defaults, figures = _default_boxes(), []
    for boxes, rounds in ((7, 30), (500, 3)):
        truth = _truth(32, boxes)
        found = {name: load_backend(name).matcher for name in names}
        cases = {f"{name}, {boxes} boxes": lambda match=match, truth=truth: match(*truth, defaults) for name, match in found.items()}
        figures += compared(interleaved(cases, rounds), 32, "images/s", f"reference, {boxes} boxes")
    return figures


def loss(log, names: list[str]) -> list[Figure]:
    """Loss forward and backward, batch 32, 8,732 default boxes, 81 classes, 7 boxes an image; float32 and bfloat16 logits."""
    defaults, figures = _default_boxes(), []
    targets = load_backend("reference").matcher(*_truth(32, 7), defaults)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(32, len(defaults), CLASSES).to(dtype).requires_grad_()
        offsets = torch.randn(32, len(defaults), 4).to(dtype).requires_grad_()

        def both(name: str, offsets=offsets, logits=logits) -> None:
            logits.grad = offsets.grad = None
            load_backend(name).loss(Predictions(offsets, logits), targets).backward()

        kind = str(dtype).removeprefix("torch.")
        cases = {f"{name}, {kind}": lambda name=name, both=both: both(name) for name in names}
        figures += compared(interleaved(cases, 9), 1, "steps/s", f"reference, {kind}")
    return figures


def decoder(log, names: list[str]) -> list[Figure]:
    """Decoding 4 crowded images (about 150 classes-times-boxes candidates an image above the threshold in each of 80 classes)."""
    defaults = _default_boxes()
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, len(defaults), CLASSES, generator=generator) * 2.4
    predictions = Predictions(torch.randn(4, len(defaults), 4, generator=generator), logits)
    found = {name: load_backend(name).decoder for name in names}
    cases = {name: lambda decode=decode: decode(predictions, defaults) for name, decode in found.items()}
    return compared(interleaved(cases, 3), 4, "images/s")


def evaluator(log, names: list[str]) -> list[Figure]:
    """COCO's 12 figures of 1,000 images with 7 boxes and 200 detections each, update and compute together."""
    rng = np.random.default_rng(3)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, 1001)]
    truth = [
        {"id": n, "image_id": n % 1000 + 1, "category_id": int(rng.integers(1, 81)), "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
        for n, box in enumerate(np.concatenate([rng.random((7000, 2)) * 300, rng.uniform(10, 180, (7000, 2))], 1).tolist(), 1)
    ]
    corner = torch.rand(1000, 200, 2) * 0.6
    boxes = torch.cat([corner, corner + 0.02 + torch.rand(1000, 200, 2) * 0.3], -1)
    labels, scores = torch.randint(1, 81, (1000, 200)), torch.rand(1000, 200).sort(descending=True)[0]
    detections = [Detections(b, c, s) for b, c, s in zip(boxes, labels, scores, strict=True)]
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps({"images": images, "annotations": truth, "categories": [{"id": i, "name": str(i)} for i in range(1, 81)]}))

        def run(name: str) -> None:
            judge = load_backend(name).evaluator(file)
            judge.update(torch.arange(1, 1001), torch.tensor([[480, 640]] * 1000), detections)
            judge.compute()

        return compared(interleaved({name: lambda name=name: run(name) for name in names}, 3), 1000, "images/s")


def step(log, names: list[str]) -> list[Figure]:
    """A whole training step of SSD300-ResNet34 on batch 4, 81 classes, and beside it the machine's convolution rate
    (3×3, 256 → 256 channels at 38×38, batch 4, bf16 and float32), as the images/s that it would allow."""
    truth = _truth(4, 7)
    images = torch.randint(0, 256, (4, *SIZE, 3), dtype=torch.uint8)
    batch = Batch(images, *truth, torch.arange(4), torch.full((4, 2), 300))
    cases: Cases = {}
    for name in names:
        backend = load_backend(name)
        torch.manual_seed(0)
        model = backend.model(num_classes=CLASSES, image_size=SIZE, strides=STRIDES, backbone="resnet34")
        optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        parts = {"matcher": backend.matcher, "loss": backend.loss, "device": torch.device("cpu")}
        train = backend.step(model=model, optimizer=optimizer, **parts)
        cases[name] = lambda train=train: train(batch, 1e-3)
    seconds = interleaved({**cases, **convolutions()}, 5)
    ceilings = {name: seconds.pop(name) for name in list(seconds) if name.startswith("ceiling")}
    figures = compared(seconds, 4, "images/s")
    return figures + compared(ceilings, 4, "images/s", "none")


def convolutions() -> Cases:
    """Convolutions of as many operations as four images' training takes, scaled down to one second's worth."""
    operations = 2 * 4 * 38 * 38 * 256 * 256 * 9
    repeats = round(4 * STEP_GFLOP * 1e9 / operations)

    def run(dtype: torch.dtype) -> None:
        with torch.no_grad():
            x = torch.randn(4, 256, 38, 38, dtype=dtype).to(memory_format=torch.channels_last)
            w = torch.randn(256, 256, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
            for _ in range(repeats):
                torch.nn.functional.conv2d(x, w, padding=1)

    return {f"ceiling by {str(d).removeprefix('torch.')} convolution": lambda d=d: run(d) for d in (torch.bfloat16, torch.float32)}

"""The work of each part, ready to be timed: what several backends do with the same input, and what it takes of the machine.

What a piece of work needs at least: of bytes each input read and each output written once; of operations those of the
convolutions, forward and backward, a multiply-add counting 2.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from base.backend import load_backend
from base.backends import backend_folder
from base.boxes import DefaultBoxes
from base.config import Config, resolve
from base.contracts import Batch, Detections, Predictions
from data_sets.index import AnnotationIndex
from measuring.ceilings import Limit, convolutions, copying, decoding, sorting
from measuring.photographs import make
from measuring.ssd300 import CLASSES, SIZE, STRIDES, gflop, truth
from measuring.timing import Cases

TARGET_BYTES = 4 * 4 + 8  # of a default box: float32 offsets, an int64 label
WORKERS = 2


@dataclass(frozen=True)
class Case:
    """What each backend does in a call: ``amount`` of ``unit``; ``given`` is what a backend's peers get."""

    own: Cases
    amount: float
    unit: str
    limits: tuple[Limit, ...]
    given: SimpleNamespace = field(default_factory=SimpleNamespace)


def demo() -> Config:
    """The configuration of the embedded demo."""
    return resolve(backend_folder("reference"), "demo").config


def demo_model() -> dict:
    """Arguments of the demo's model (`base.contracts.MakeModel`), with COCO's classes."""
    config = demo()
    return {"num_classes": CLASSES, "image_size": config.image_size, "strides": config.strides, "backbone": config.backbone}


@cache
def default_boxes(side: int = SIZE[0]) -> DefaultBoxes:
    return load_backend("reference").model(num_classes=2, image_size=(side, side), strides=STRIDES, backbone="resnet18").default_boxes


def by_copying(size: float, what: str) -> tuple[Limit, ...]:
    return (Limit(copying(), size / 1e9, f"{size / 1e6:,.3g} MB {what}"),)


def by_convolving(model: dict) -> Limit:
    operations = gflop(model)
    return Limit(convolutions(), operations, f"{operations:,.4g} GFLOP an image")


def matcher_case(names: Sequence[str], images: int, boxes: int, side: int = SIZE[0]) -> Case:
    defaults, (ltrb, labels) = default_boxes(side), truth(images, boxes)
    own: Cases = {name: partial(load_backend(name).matcher, ltrb, labels, defaults) for name in names}
    limits = by_copying((len(defaults) + boxes) * TARGET_BYTES, "an image")
    return Case(own, images, "images/s", limits, SimpleNamespace(boxes=ltrb, labels=labels))


def loss_case(names: Sequence[str], images: int, classes: int = CLASSES, side: int = SIZE[0], dtype: torch.dtype = torch.float32) -> Case:
    defaults, (boxes, labels) = default_boxes(side), truth(images, 7)
    labels = (labels - 1) % (classes - 1) + 1
    targets = load_backend("reference").matcher(boxes, labels, defaults)
    offsets, logits = (torch.randn(images, len(defaults), n).to(dtype).requires_grad_() for n in (4, classes))

    def both(judge: Callable) -> None:
        logits.grad = offsets.grad = None
        judge(Predictions(offsets, logits), targets).backward()

    own: Cases = {name: partial(both, load_backend(name).loss) for name in names}
    size = images * len(defaults) * (2 * (4 + classes) * dtype.itemsize + TARGET_BYTES)
    given = SimpleNamespace(boxes=boxes, labels=labels, offsets=offsets, logits=logits)
    return Case(own, 1, "steps/s", by_copying(size, "a step"), given)


def decoder_case(
    names: Sequence[str], images: int, classes: int = CLASSES, side: int = SIZE[0], spread: float = 2.4, threshold: float = 0.05
) -> Case:
    """Random logits with a standard deviation of ``spread``."""
    defaults, generator = default_boxes(side), torch.Generator().manual_seed(2)
    logits = torch.randn(images, len(defaults), classes, generator=generator) * spread
    predictions = Predictions(torch.randn(images, len(defaults), 4, generator=generator), logits)
    own: Cases = {name: partial(load_backend(name).decoder, predictions, defaults, threshold) for name in names}
    limits = by_copying(len(defaults) * (4 + classes) * 4, "an image, read")
    return Case(own, images, "images/s", limits, SimpleNamespace(predictions=predictions, score_threshold=threshold))


def evaluator_case(names: Sequence[str], images: int, folder: Path, found: int = 200) -> Case:
    """``found`` detections and 7 boxes an image; the annotation file, ``folder/truth.json``, is read in each call."""
    rng = np.random.default_rng(3)
    pictures = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, images + 1)]
    boxes = np.concatenate([rng.random((7 * images, 2)) * 300, rng.uniform(10, 180, (7 * images, 2))], 1).tolist()
    true = [
        {"id": n, "image_id": n % images + 1, "category_id": int(rng.integers(1, 81)), "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
        for n, box in enumerate(boxes, 1)
    ]
    dataset = {"images": pictures, "annotations": true, "categories": [{"id": i, "name": str(i)} for i in range(1, 81)]}
    corner = torch.rand(images, found, 2) * 0.6
    ltrb = torch.cat([corner, corner + 0.02 + torch.rand(images, found, 2) * 0.3], -1)
    labels, scores = torch.randint(1, 81, (images, found)), torch.rand(images, found).sort(descending=True)[0]
    detections = [Detections(b, c, s) for b, c, s in zip(ltrb, labels, scores, strict=True)]
    ids, sizes = torch.arange(1, images + 1), torch.tensor([[480, 640]] * images)
    pixels = ltrb.double() * torch.tensor([640, 480, 640, 480])
    columns = ids[:, None].expand(-1, found), pixels[..., 0], pixels[..., 1], *(pixels[..., 2:] - pixels[..., :2]).unbind(-1), scores, labels
    file = folder / "truth.json"
    file.write_text(json.dumps(dataset))

    def run(name: str) -> None:
        judge = load_backend(name).evaluator(file)
        judge.update(ids, sizes, detections)
        judge.compute()

    given = SimpleNamespace(truth=dataset, found=torch.stack([c.double().flatten() for c in columns], 1).numpy())
    limits = (Limit(sorting(), found / 1e6, f"{found} scores an image in order"),)
    return Case({name: partial(run, name) for name in names}, images, "images/s", limits, given)


class Photographs:
    """``count`` made-up photographs in ``folder``, each of them ``times`` images of the data set."""

    def __init__(self, folder: Path, count: int, times: int = 1):
        self.annotations, self.images, self.count = make(folder, count, times=times), folder / "images", count * times
        self.files = [path.read_bytes() for path in sorted(self.images.iterdir())]

    def loader(self, name: str, batch: int, size: tuple[int, int] = SIZE, workers: int = WORKERS):
        """A backend's training loader of them."""
        given = {"annotation_file": self.annotations, "image_dir": self.images, "image_size": size}
        return load_backend(name).train_loader(**given, batch_size=batch, workers=workers, seed=1)


def epochs(loader, each: Callable[[Batch], object] = lambda batch: None) -> Callable[[], None]:
    """A call that goes through the next epoch of a loader, and does ``each`` with every batch."""
    numbers = itertools.count()

    def run() -> None:
        loader.set_epoch(next(numbers))
        for batch in loader:
            each(batch)

    return run


def loader_case(loaders: dict, data: Photographs, batch: int, workers: int = WORKERS) -> Case:
    """An epoch of each of ``loaders``, name → what ``data.loader`` gave."""
    limits = (Limit(decoding(data.files, workers), 1.0, "a whole picture an image"),)
    given = SimpleNamespace(folder=data.images, annotations=data.annotations, index=AnnotationIndex.open(data.annotations))
    given.files, given.default_boxes = data.files * (data.count // len(data.files)), default_boxes()
    own: Cases = {name: epochs(loader) for name, loader in loaders.items()}
    return Case(own, data.count // batch * batch, "images/s", limits, given)


def batch_of(images: int, size: tuple[int, int], classes: int = CLASSES) -> Batch:
    """Random pixels with 7 boxes an image."""
    boxes, labels = truth(images, 7)
    pixels = torch.randint(0, 256, (images, *size, 3), dtype=torch.uint8)
    return Batch(pixels, boxes, (labels - 1) % (classes - 1) + 1, torch.arange(images), torch.full((images, 2), 300))


def training_step(name: str, model: dict) -> Callable[[Batch], object]:
    """A backend's training step on the CPU, with a model of its own."""
    backend = load_backend(name)
    torch.manual_seed(0)
    ssd = backend.model(**model)
    optimizer = backend.optimizer(ssd.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=ssd, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=torch.device("cpu"))
    return lambda batch: step(batch, 1e-3)


def step_case(names: Sequence[str], images: int, model: dict) -> Case:
    batch = batch_of(images, model["image_size"], model["num_classes"])
    own: Cases = {name: partial(training_step(name, model), batch) for name in names}
    return Case(own, images, "images/s", (by_convolving(model),), SimpleNamespace(batch=batch))


def train_cases(names: Sequence[str], data: Photographs, batch: int, model: dict) -> dict[str, Case]:
    """Whole training from JPEG files, an epoch in a call, and alone: loader and step."""
    size, images = model["image_size"], data.count // batch * batch
    loaders = {name: data.loader(name, batch, size) for name in names}
    alone, step = loader_case(loaders, data, batch), step_case(names, batch, model)
    whole: Cases = {name: epochs(loaders[name], training_step(name, model)) for name in names}
    return {"": Case(whole, images, "images/s", (*alone.limits, *step.limits)), "loader alone": alone, "step alone": step}

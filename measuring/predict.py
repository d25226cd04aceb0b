"""`python -m base predict` beside the model's forward pass alone."""

import os
import tempfile
from itertools import cycle
from pathlib import Path

import torch

from base import checkpoint
from base.backend import load_backend
from base.checkpoint import Progress
from base.config import Config, validate
from base.tools.detector import Detector, coco_categories, open_checkpoint
from base.tools.predict import find, predict
from data_sets.demo_data import generate
from measuring.ceilings import Ceiling, Limit
from measuring.figures import Figure, Log
from measuring.parts import IMAGES, compared
from measuring.work import Case, demo

PICTURES, ROUNDS = 1_000, 3
PART = f"""predict, {PICTURES:,} JPEGs of the demo, batches of {IMAGES}, in {ROUNDS} parts: SSD300-ResNet34 with 81 classes, and the demo's model
  predict  from the list of files to every picture drawn and written, some ten boxes each; opening the checkpoint is not timed
  forward  as many images through the model, from uint8 images in memory to logits"""


def random_weights(config: Config, folder: Path) -> Path:
    """A checkpoint of untrained weights: what is timed does not depend on what they know."""
    backend, categories = load_backend("reference"), coco_categories()
    torch.manual_seed(1)
    model = backend.model(num_classes=81, image_size=config.image_size, strides=config.strides, backbone=config.backbone)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=0.0)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device="cpu")
    path = folder / f"{config.backbone}.pt"
    checkpoint.write(path, checkpoint.pack(config, Progress(), categories, model, optimizer, step, []))
    return path


def ten_boxes(detector: Detector, images: torch.Tensor) -> float:
    """A score that some ten default boxes and classes of an image are above."""
    scores = detector.step.predict(images).logits.float().softmax(-1)[..., 1:]
    return scores.flatten(1).topk(10).values[:, -1].mean().item()


def measure(log: Log, names: list[str]) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as scratch:
        folder = Path(scratch)
        log(f"drawing {PICTURES:,} pictures")
        generate(folder / "demo", PICTURES, 3, 160, 1)
        files = find([folder / "demo" / "train2017"])
        parts = [dict(list(files.items())[number::ROUNDS]) for number in range(ROUNDS)]
        for case, config in (("SSD300-ResNet34", Config()), ("the demo's model", demo())):
            path = random_weights(validate({**config.model_dump(mode="json"), "data_dir": None}, {}), folder)
            for name in names:
                log(f"{case} by {name}")
                detector = open_checkpoint(path, name, "cpu", workers=len(os.sched_getaffinity(0)), eval_batch_size=IMAGES)
                batch = torch.randint(0, 256, (IMAGES, *config.image_size, 3), dtype=torch.uint8)
                score, left = ten_boxes(detector, batch), cycle(parts)

                def detect(detector=detector, score=score, left=left) -> None:
                    predict(detector, next(left), folder / "out", score, quiet=True)

                def forward(detector=detector, batch=batch) -> None:
                    for first in range(0, len(parts[0]), IMAGES):
                        detector.step.predict(batch[: len(parts[0]) - first])

                limit = Limit((Ceiling(name, "images", len(parts[0]), forward),), 1.0, "the forward pass alone")
                figures += compared("predict", {case: Case({name: detect}, len(parts[0]), "images/s", (limit,))}, ROUNDS)
    return figures

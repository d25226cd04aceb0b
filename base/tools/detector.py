"""A checkpoint made ready to detect: what `evaluate`, `predict` and `export` start from."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from base import checkpoint
from base.backend import Backend, load_backend
from base.backends import DEFAULT_BACKEND
from base.config import Config, validate
from base.contracts import Step
from base.distributed import device_for

CHECKPOINT = "a run's folder (its best), a file of its folder checkpoints/, or one of the MLPerf reference"


@dataclass(frozen=True)
class Detector:
    """``category_ids`` and ``names`` are those of labels 1, 2, …, as the data set that it was trained on has them."""

    backend: Backend
    config: Config
    model: torch.nn.Module
    step: Step
    device: torch.device
    category_ids: list[int]
    names: list[str]


def flags_of_a_detector(parser: argparse.ArgumentParser) -> None:
    """The flags that every tool has which starts from a checkpoint."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT)
    parser.add_argument("--name", default=DEFAULT_BACKEND, help="backend (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device type (default: what the backend asks for)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of the loader (default: 2)")


def coco_categories() -> dict[str, list]:
    """COCO's 80 classes as MLPerf's checkpoints have them, by the numbers 1 … 90 of the annotations; torchvision lists them."""
    named = enumerate(SSD300_VGG16_Weights.COCO_V1.meta["categories"])
    ids, names = zip(*((number, name) for number, name in named if name not in ("__background__", "N/A")), strict=True)
    return {"ids": list(ids), "names": list(names)}


def open_checkpoint(path: Path, name: str, device: str = "auto", **changes) -> Detector:
    """The model of a checkpoint or a run (`base.checkpoint.found_in`) on backend ``name``; ``changes`` to its configuration.

    Raises UserError if the file cannot be read or belongs to another model, or this machine lacks the device.
    """
    path = checkpoint.found_in(path)
    state, content = checkpoint.read_weights(path)
    stored = content["config"] if content else Config().model_dump(mode="json")  # MLPerf's is SSD300-ResNet34 on COCO
    config = validate({**stored, "device": device, "nodes": 1, "devices": 1, "norm_ranks": 1, "use": {}, **changes}, {})
    categories = content["categories"] if content else coco_categories()
    backend = load_backend(name)
    place = torch.device(device_for(backend, device))
    model = backend.model(
        num_classes=len(categories["ids"]) + 1, image_size=config.image_size, strides=config.strides, backbone=config.backbone
    )
    checkpoint.load_weights(model, state, path)
    model.to(place)
    step = backend.step(model=model, optimizer=None, matcher=backend.matcher, loss=backend.loss, device=place)
    return Detector(backend, config, model, step, place, list(categories["ids"]), list(categories["names"]))

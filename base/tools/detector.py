"""A checkpoint made ready to detect: what `evaluate`, `predict`, `export` and `report` start from."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import SSD300_VGG16_Weights

from base import checkpoint
from base.backend import Backend, load_backend
from base.backends import DEFAULT_BACKEND
from base.config import Config, validate
from base.contracts import Evaluator, Step
from base.distributed import Ranks, one_device
from base.errors import UserError
from base.evaluate import detect, judged, make_eval_loader
from data_sets import layout
from data_sets.index import AnnotationIndex

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
    parser.add_argument("--device", default="auto", help="torch device, such as cpu or cuda:1 (default: what the backend asks for)")
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
    alone = {"device": device.partition(":")[0], "nodes": 1, "devices": 1, "device_ids": (), "norm_ranks": 1, "use": {}}
    config = validate({**stored, **alone, **changes}, {})
    categories = content["categories"] if content else coco_categories()
    backend = load_backend(name)
    place = one_device(backend, device)
    model = backend.model(num_classes=len(categories["ids"]) + 1, image_size=config.image_size, strides=config.strides, backbone=config.backbone)
    checkpoint.load_weights(model, state, path)
    model.to(place)
    step = backend.step(model=model, optimizer=None, matcher=backend.matcher, loss=backend.loss, device=place)
    return Detector(backend, config, model, step, place, list(categories["ids"]), list(categories["names"]))


def flags_of_data(parser: argparse.ArgumentParser, purpose: str) -> None:
    """The flags for `on_data`."""
    parser.add_argument("--data_dir", "--data-dir", default=None, help=f"data folder{purpose} (default: the one it was trained on)")
    layout.flags(parser, "val")


def on_data(detector: Detector, flags: argparse.Namespace) -> Detector:
    """With the validation part of the data set that the flags name, or that it was trained on.

    Raises UserError if there is none, or its classes are others than the detector's.
    """
    config = detector.config
    folder = flags.data_dir or config.data_dir
    if not folder:
        raise UserError(f"{flags.checkpoint} does not say which data it was trained on; pass --data_dir")
    own = {key: getattr(config, key) for key in layout.COCO_2017}
    paths, found = layout.find(Path(folder), own, layout.stated(flags), ("val",))
    if found:
        print(f"data found in {folder}: {found}", flush=True)
    config = validate({**config.model_dump(mode="json"), "data_dir": str(folder), **paths}, {})
    index = AnnotationIndex.open(config.path("val_annotations"))
    known = dict(zip(detector.category_ids, detector.names, strict=True))
    here = dict(zip(index.category_ids.tolist(), index.category_names, strict=True))
    if known != here:
        key = min(key for key in known.keys() | here.keys() if known.get(key) != here.get(key))
        raise UserError(
            f"{flags.checkpoint} knows {len(known)} classes and {index.annotation_file} has {len(here)}, not the same: category {key} is "
            f"{known.get(key, 'missing')!r} in the checkpoint and {here.get(key, 'missing')!r} in the data; evaluate it on data of its own classes"
        )
    return replace(detector, config=config)


def evaluated(detector: Detector) -> tuple[dict[str, np.ndarray], Evaluator]:
    """What it detects on its validation images, as `base.evaluate.detect` gives it, and the evaluator that has seen it."""
    backend, config, ranks = detector.backend, detector.config, Ranks(0, 1, detector.device)
    loader = make_eval_loader(backend, config, ranks)
    arrays, _ = detect(backend, config, ranks, detector.step, detector.model.default_boxes, loader, lambda: False)
    return arrays, judged(backend, config.path("val_annotations"), arrays)

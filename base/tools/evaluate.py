"""``python -m base evaluate --checkpoint C --data_dir D``: the 12 COCO figures of a checkpoint."""

import argparse
from pathlib import Path

import torch

from base import checkpoint
from base.backend import load_backend
from base.backends import DEFAULT_BACKEND
from base.config import Config, validate
from base.contracts import FIGURES
from base.distributed import Ranks, check_cards, device_names, device_type, devices_here
from base.errors import UserError
from base.evaluate import detect, figures, make_eval_loader
from base.index import AnnotationIndex


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file of a run's folder checkpoints/, or one of the MLPerf reference")
    parser.add_argument("--data_dir", "--data-dir", default=None, help="data folder (default: the one it was trained on)")
    parser.add_argument("--name", default=DEFAULT_BACKEND, help="backend (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device type (default: what the backend asks for)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of the loader (default: 2)")
    flags = parser.parse_args(arguments)
    state, content = checkpoint.read_weights(flags.checkpoint)
    stored = content["config"] if content else Config().model_dump(mode="json")  # MLPerf's is SSD300-ResNet34
    given = {"workers": flags.workers, "device": flags.device, "nodes": 1, "devices": 1, "use": {}}
    config = validate({**stored, **given, "data_dir": flags.data_dir or stored["data_dir"]}, {})
    if not config.data_dir:
        raise UserError(f"{flags.checkpoint} does not say which data it was trained on; pass --data_dir")
    backend = load_backend(flags.name)
    kind = device_type(config.device if config.device != "auto" else backend.device)
    if devices_here(kind) == 0:
        raise UserError(f"this machine has no {kind} device; use --device cpu")
    check_cards(backend, device_names(kind))
    ids = AnnotationIndex.open(config.path("val_annotations")).category_ids.tolist()
    if content and ids != content["categories"]["ids"]:
        raise UserError(f"{flags.checkpoint} knows categories {content['categories']['ids']}, the data set has {ids}")
    model = backend.model(num_classes=len(ids) + 1, image_size=config.image_size, strides=config.strides, backbone=config.backbone)
    checkpoint.load_weights(model, state, flags.checkpoint)
    device = torch.device(kind)
    model.to(device)
    step = backend.step(model=model, optimizer=None, matcher=backend.matcher, loss=backend.loss, device=device)
    ranks = Ranks(0, 1, device)
    arrays, _ = detect(backend, config, ranks, step, model.default_boxes, make_eval_loader(backend, config, ranks), lambda: False)
    found = figures(backend, config.path("val_annotations"), arrays)
    print("\n".join(f"{name:>6}  {found[name]:.4f}" for name in FIGURES))
    return 0

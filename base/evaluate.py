"""Evaluation over ranks: every image once, detections gathered on the first rank, figures from the backend's evaluator."""

from collections.abc import Callable

import numpy as np
import torch

from base.backend import Backend
from base.config import Config
from base.contracts import Detections, Loader, Step
from base.distributed import AgreedError, Ranks
from base.errors import UserError


def make_eval_loader(backend: Backend, config: Config, ranks: Ranks) -> Loader:
    """The evaluation loader of one rank."""
    return backend.eval_loader(
        annotation_file=config.path("val_annotations"),
        image_dir=config.path("val_images"),
        image_size=config.image_size,
        batch_size=config.eval_batch_size,
        workers=config.workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
        skip_bad_images=config.skip_bad_images,
    )


def evaluate(
    backend: Backend, config: Config, ranks: Ranks, step: Step, default_boxes, loader: Loader, stopped: Callable[[], bool]
) -> tuple[dict[str, float] | None, dict[str, str]]:
    """The 12 figures and the images that could not be read, on every rank; no figures if any rank was asked to stop.

    Raises AgreedError on every rank if one of them could not read an image.
    """
    failure, ids, sizes, found = "", [], [], []
    try:
        for batch in loader:
            if stopped():
                break
            predictions = step.predict(batch.images)
            detections = backend.decoder(predictions, default_boxes, config.score_threshold, config.iou_threshold, config.max_detections)
            ids.append(batch.image_ids.numpy())
            sizes.append(batch.sizes.numpy())
            found += [(d.boxes.float().cpu().numpy(), d.labels.cpu().numpy(), d.scores.float().cpu().numpy()) for d in detections]
    except UserError as error:
        failure = str(error)
    mine = (failure, stopped(), ids, sizes, found, getattr(loader, "bad_images", {}))
    everyone = ranks.gathered(mine)
    if failures := [failure for failure, *_ in everyone if failure]:
        raise AgreedError(failures[0])
    if any(stop for _, stop, *_ in everyone):
        return None, {}
    bad = {path: why for rank in everyone for path, why in rank[5].items()}
    check_bad_images(bad, sum(len(part) for rank in everyone for part in rank[2]) + len(bad))
    figures = _figures(backend, config, everyone) if ranks.is_first else None
    return ranks.gathered(figures)[0], bad


def _figures(backend: Backend, config: Config, everyone: list) -> dict[str, float]:
    evaluator = backend.evaluator(config.path("val_annotations"))
    for _, _, ids, sizes, found, _ in everyone:
        if ids:
            detections = [Detections(torch.from_numpy(b), torch.from_numpy(c), torch.from_numpy(s)) for b, c, s in found]
            evaluator.update(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(sizes)), detections)
    return evaluator.compute()


def check_bad_images(bad: dict[str, str], images: int) -> None:
    """Refuses to go on once more than 1 % of the images could not be read."""
    if len(bad) > 0.01 * images:
        path, reason = next(iter(bad.items()))
        raise AgreedError(f"{len(bad)} of {images} images cannot be read, more than 1 %; the first: {path}: {reason}")

"""Evaluation over ranks: every image once, detections gathered on the first rank, figures from the backend's evaluator."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from base.backend import Backend, load_backend
from base.config import Config
from base.contracts import Detections, Evaluator, Loader, Step
from base.distributed import AgreedError, Ranks
from base.errors import LostProcess, UserError


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


def detect(
    backend: Backend, config: Config, ranks: Ranks, step: Step, default_boxes, loader: Loader, stopped: Callable[[], bool]
) -> tuple[dict[str, np.ndarray] | None, dict[str, str]]:
    """Every rank's detections, on every rank, as flat arrays for `figures`; and the images that could not be read.

    No arrays if any rank was asked to stop. Raises AgreedError on every rank if one of them could not read an image.
    """
    failure, ids, sizes, found = None, [], [], []
    try:
        for batch in loader:
            if stopped():
                break
            ranks.alive()
            predictions = step.predict(batch.images)
            found += backend.decoder(predictions, default_boxes, config.score_threshold, config.iou_threshold, config.max_detections)
            ids.append(batch.image_ids.cpu())
            sizes.append(batch.sizes.cpu())
    except UserError as error:
        failure = error
    everyone = ranks.gathered((failure, stopped(), flat(ids, sizes, found), loader.bad_images))
    if failures := [failure for failure, *_ in everyone if failure]:
        raise AgreedError(str(failures[0]), failures[0].code)
    if any(stop for _, stop, *_ in everyone):
        return None, {}
    bad = {path: why for *_, rank in everyone for path, why in rank.items()}
    arrays = {key: np.concatenate([part[key] for _, _, part, _ in everyone]) for key in everyone[0][2]}
    check_bad_images(bad, len(arrays["ids"]) + len(bad))
    return arrays, bad


def flat(ids: list[torch.Tensor], sizes: list[torch.Tensor], found: list[Detections]) -> dict[str, np.ndarray]:
    """Detections of N images as arrays: ids (N), sizes (N, 2), counts (N), and boxes (D, 4), labels (D), scores (D) of all."""
    columns = {name: [getattr(image, name).cpu() for image in found] for name in Detections._fields}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    joined = {name: torch.cat([empty[name], *parts]).numpy() for name, parts in columns.items()}
    whole = torch.cat([torch.zeros(0, dtype=torch.long), *ids]).numpy(), torch.cat([torch.zeros(0, 2, dtype=torch.long), *sizes]).numpy()
    return {"ids": whole[0], "sizes": whole[1], "counts": np.array([len(image.scores) for image in found], dtype=np.int64), **joined}


def figures(backend: Backend, annotation_file: str | Path, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """The 12 figures of detections as `detect` gathers them."""
    return judged(backend, annotation_file, arrays).compute()


def judged(backend: Backend, annotation_file: str | Path, arrays: dict[str, np.ndarray]) -> Evaluator:
    """The backend's evaluator, which has seen these detections."""
    parts = [torch.from_numpy(arrays[name]).split(arrays["counts"].tolist()) for name in Detections._fields]
    evaluator = backend.evaluator(annotation_file)
    evaluator.update(torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["sizes"]), [Detections(*image) for image in zip(*parts, strict=True)])
    return evaluator


class Background:
    """`figures` in a process of its own, while training goes on. It ends by itself, whatever becomes of this process."""

    def __init__(self, name: str, use: Mapping[str, str], annotation_file: Path, arrays: dict[str, np.ndarray], folder: Path):
        self.file = folder / ".detections.npz"
        try:
            np.savez(self.file, **arrays)
        except OSError as error:
            self.file.unlink(missing_ok=True)
            raise UserError(f"{self.file} cannot be written ({error.strerror}); make room, then --resume {folder}") from error
        # a session of its own, so that Ctrl-C and SIGTERM to the run leave it to finish
        command = [sys.executable, "-m", "base.evaluate", name, json.dumps(dict(use)), str(annotation_file), str(self.file)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def ready(self) -> bool:
        """Whether `result` would not have to wait."""
        return self.process.poll() is not None

    def result(self) -> dict[str, float]:
        """The 12 figures. Raises UserError if the process failed, LostProcess if it was killed."""
        out, err = self.process.communicate()
        self.file.unlink(missing_ok=True)
        if code := self.process.returncode:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}: {err.strip()[-2000:]}"
            raise (LostProcess if code < 0 else UserError)(f"the evaluation process {how}")
        return json.loads(out)


def check_bad_images(bad: dict[str, str], images: int) -> None:
    """Refuses to go on once more than 1 % of the images could not be read."""
    if len(bad) > 0.01 * images:
        path, reason = next(iter(bad.items()))
        raise AgreedError(f"{len(bad)} of {images} images cannot be read, more than 1 %; the first: {path}: {reason}")


def main(arguments: list[str]) -> int:
    """The process that `Background` starts."""
    name, use, annotation_file, file = arguments
    with np.load(file, allow_pickle=False) as arrays:
        print(json.dumps(figures(load_backend(name, json.loads(use)), annotation_file, dict(arrays))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

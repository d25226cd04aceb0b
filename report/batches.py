"""The first training batches of a run, as its model saw them: with their boxes and the default boxes that are matched to them."""

import argparse
import itertools
from pathlib import Path

import torch
from PIL import Image

from base.backend import load_backend
from base.contracts import Batch, Targets
from base.distributed import one_device
from base.errors import UserError
from data_sets import layout
from data_sets.coverage import model_boxes
from data_sets.index import AnnotationIndex
from pages.html import escape, jpeg, line_key
from pages.pictures import Box, colour, drawn_over
from pages.text import shown
from report.detected import listed, name_of
from report.folder import RunFolder

BATCHES, IMAGES = 2, 6  # images of each
SIDE, BYTES = 360, 60_000  # of a picture
MATCHED = 80  # default boxes drawn on one picture


def batch_section(run: RunFolder, flags: argparse.Namespace) -> str:
    """The first batches of the first rank. Raises UserError if configuration, backend, device or data are not there."""
    if run.config is None or run.backend is None:
        raise UserError("configuration and backend of the run are not known")
    config, folder = run.config, flags.data_dir or run.config.data_dir
    if not folder:
        raise UserError(f"{run.folder} does not say which data it was trained on; pass --data_dir")
    paths, _ = layout.find(Path(folder), {key: getattr(config, key) for key in layout.COCO_2017}, {}, ("train",))
    config = config.model_copy(update={"data_dir": str(folder), **paths})
    backend = load_backend(run.backend, config.use)
    device = one_device(backend, flags.device)
    index = AnnotationIndex.open(config.path("train_annotations"))
    defaults = model_boxes(config.image_size, config.strides)
    loader = backend.train_loader(
        annotation_file=config.path("train_annotations"), image_dir=config.path("train_images"), image_size=config.image_size,
        batch_size=config.batch_size, workers=flags.workers, seed=config.seed, world_size=config.world_size, max_samples=config.max_samples,
        skip_bad_images=config.skip_bad_images,
    )  # fmt: skip
    there, on_device, parts = defaults.ltrb, defaults.to(device), []
    for number, batch in enumerate(itertools.islice(loader, BATCHES), 1):
        targets = backend.matcher(batch.boxes.to(device), batch.labels.to(device), on_device)
        batch, targets = Batch(*(t.cpu() for t in batch)), Targets(*(t.cpu() for t in targets))
        figures = [_figure(batch, targets, there, index, image) for image in range(min(IMAGES, len(batch.images)))]
        of = f"the first {len(figures)} of {len(batch.images)} images" if len(figures) < len(batch.images) else f"{len(figures)} images"
        parts.append(f'<h3>Step {number}: {of}{" of the first rank" * (config.world_size > 1)}</h3><div class="pictures">{"".join(figures)}</div>')
    return (
        f"<p>Cropped, flipped, resized and coloured by the loader of {escape(backend.suppliers['train_loader'])}, matched by that of "
        f"{escape(backend.suppliers['matcher'])}, with the run's seed.</p>"
        f'<p class="legend">{line_key("mark", "box")}{line_key("mark thin", "default box that is matched to it")}</p>{"".join(parts)}'
    )


def _figure(batch: Batch, targets: Targets, defaults: torch.Tensor, index: AnnotationIndex, image: int) -> str:
    picture = Image.fromarray(batch.images[image].numpy())
    if max(picture.size) < SIDE:  # as the model sees it, pixel by pixel
        scale = SIDE // max(picture.size)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    address, w, h = jpeg(picture, SIDE, BYTES)
    size = torch.tensor((w, h, w, h))
    matched = targets.labels[image].nonzero().flatten()
    boxes = [
        Box(box, colour(label), kind="thin")
        for box, label in zip((defaults[matched] * size).tolist()[:MATCHED], targets.labels[image][matched].tolist(), strict=False)
    ]
    real = batch.labels[image] > 0
    labels = batch.labels[image][real].tolist()
    names = [name_of(index.category_names, label) for label in labels]
    boxes += [Box(box, colour(label), name) for box, label, name in zip((batch.boxes[image][real] * size).tolist(), labels, names, strict=True)]
    place = int(torch.searchsorted(torch.from_numpy(index.image_ids.copy()), batch.image_ids[image]))
    file = shown(index.file_name(place), 80)
    drawn = "" if len(matched) <= MATCHED else f", {MATCHED} of them drawn"
    told = f"{file}: {listed(names)}; {len(matched)} default boxes matched{drawn}"
    return f"<figure>{drawn_over(address, w, h, told, boxes)}<figcaption>{escape(told)}</figcaption></figure>"

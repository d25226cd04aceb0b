"""A run's checkpoint on its validation images: AP a class, precision and recall, and the images with the best and the worst detections."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from base.backends.reference.images import BadImage, read_rgb

from base import checkpoint
from base.boxes import iou
from base.errors import UserError
from base.tools.detector import evaluated, on_data, open_checkpoint
from data_sets.index import AnnotationIndex
from pages.charts import Line, line_chart
from pages.html import bar_chart, escape, jpeg, line_key, table
from pages.pictures import Box, colour, drawn_over
from pages.text import shown
from report.folder import RunFolder

EXAMPLES = 4  # of the best, and of the worst
SURE = 0.3  # score from which a detection is drawn and counted for them
OVERLAP = 0.5  # IoU from which it is right
SIDE, BYTES = 360, 60_000  # of a picture
BARS = 24  # classes in the chart
CURVES = 100  # classes whose curve is drawn
BOXES = 60  # on one picture


@dataclass(frozen=True, eq=False)
class Detected:
    """What a checkpoint finds on the validation images."""

    file: str  # of the checkpoint
    step: int | None
    device: str
    names: list[str]  # of labels 1, 2, …
    index: AnnotationIndex  # of the images that were looked at
    of: int  # so many validation images
    images: str  # folder
    arrays: dict[str, np.ndarray]  # as `base.evaluate.detect` gives them
    twelve: dict[str, float]
    curves: np.ndarray  # (10, 101, C - 1), as the evaluator gives them


def detected(run: RunFolder, flags: argparse.Namespace) -> Detected:
    """Runs the best checkpoint as `evaluate` does, on ``flags.images`` of the images or all.

    Raises UserError if checkpoint, backend, device or data are not there.
    """
    if run.backend is None:
        raise UserError("environment.json does not say which backend the run had")
    flags = argparse.Namespace(**vars(flags), checkpoint=checkpoint.found_in(run.folder))
    print(f"{run.name}: detecting on the validation images", file=sys.stderr, flush=True)
    found = on_data(open_checkpoint(flags.checkpoint, run.backend, flags.device, workers=flags.workers), flags)
    config = found.config
    everything = AnnotationIndex.open(config.path("val_annotations"))
    with tempfile.TemporaryDirectory(prefix="ssd-report-") as scratch:
        if flags.images and flags.images < len(everything):
            config = config.model_copy(update={"val_annotations": str(some_of(everything, flags.images, Path(scratch) / "some.json"))})
        index = AnnotationIndex.open(config.path("val_annotations"))
        arrays, evaluator = evaluated(replace(found, config=config))
    step = checkpoint.read(flags.checkpoint)["progress"]["step"]
    return Detected(
        flags.checkpoint.name, step, found.device.type, found.names, index, len(everything), str(config.path("val_images")), arrays,
        evaluator.compute(), evaluator.curves(),
    )  # fmt: skip


def some_of(index: AnnotationIndex, images: int, file: Path) -> Path:
    """Writes an annotation file of so many images, evenly spaced, with their boxes and all classes."""
    whole = index.to_coco()
    whole["images"] = [whole["images"][place] for place in np.linspace(0, len(index) - 1, images).round().astype(int)]
    ids = {image["id"] for image in whole["images"]}
    whole["annotations"] = [box for box in whole["annotations"] if box["image_id"] in ids]
    file.write_text(json.dumps(whole), encoding="utf-8")
    return file


def class_section(found: Detected) -> str:
    """AP a class, and the curves behind it."""
    rows = []
    for name, curve in zip(found.names, found.curves.transpose(2, 0, 1), strict=True):
        if (curve > -1).any():
            rows.append((shown(name, 40), float(curve.mean()), float(curve[0].mean()), curve[0]))
    absent = len(found.names) - len(rows)
    rows.sort(key=lambda row: -row[1])
    known = found.curves[:, :, (found.curves > -1).any((0, 1))]
    recall = np.linspace(0, 1, found.curves.shape[1])
    some = rows if len(rows) <= BARS else [*rows[: BARS // 2], *rows[-BARS // 2 :]]
    title = "AP a class" + ("" if len(rows) <= BARS else f": the {BARS // 2} best, then the {BARS // 2} worst")
    lines = [Line(name, recall, known[place].mean(1)) for place, name in ((0, "IoU 0.5"), (5, "IoU 0.75"))] if rows else []
    lines += [Line("mean of IoU 0.5 to 0.95", recall, known.mean((0, 2)))] if rows else []
    seen = len(found.arrays["ids"])
    some_only = f"{seen:,} of the {found.of:,}" if len(found.index) < found.of else f"all {seen:,}"
    step = "" if found.step is None else f" (step {found.step:,})"
    small = "".join(line_chart(name, [Line("IoU 0.5", recall, curve)], within=[0.0, 1.0]) for name, _, _, curve in rows[:CURVES])
    more = f", of the best {CURVES}" if len(rows) > CURVES else ""
    return (
        f"<p>{escape(found.file)}{step} on {some_only} validation images, on {found.device}: "
        f"mAP {found.twelve['AP']:.4f}, AP50 {found.twelve['AP50']:.4f}."
        f"{f' {absent:,} classes have no box in the ground truth.' if absent else ''}</p>"
        f'<div class="beside"><div>{table(["class", "AP", "AP50"], [(name, f"{ap:.4f}", f"{ap50:.4f}") for name, ap, ap50, _ in rows])}</div>'
        f"{bar_chart(title, [(name, [max(0.0, ap)], f'{ap:.4f}') for name, ap, _, _ in some])}"
        f"{line_chart('Precision by recall, mean over classes', lines, within=[0.0, 1.0])}</div>"
        f'<details><summary>Precision by recall of each class at IoU 0.5{more}</summary><div class="beside">{small}</div></details>'
    )


def agreement(found: Detected) -> list[tuple[float, float, int, np.ndarray]]:
    """Of each image with boxes: F1 of its detections from score SURE on, their mean score, its position in the index, which are right.

    A detection is right if it overlaps a box of its class that no surer one has taken by OVERLAP or more; crowd boxes are left out.
    """
    index, arrays = found.index, found.arrays
    ends = np.cumsum(arrays["counts"])
    rows = []
    for image_id, first, end in zip(arrays["ids"].tolist(), (ends - arrays["counts"]).tolist(), ends.tolist(), strict=True):
        image = int(np.searchsorted(index.image_ids, image_id))
        boxes, labels = truth_of(index, image)
        if not len(boxes):
            continue
        sure = np.flatnonzero(arrays["scores"][first:end] >= SURE) + first  # by falling score, as the decoder gives them
        right = np.zeros(len(sure), dtype=bool)
        if len(sure):
            overlaps = iou(torch.from_numpy(arrays["boxes"][sure]).float(), torch.from_numpy(boxes).float()).numpy()
            overlaps[arrays["labels"][sure][:, None] != labels] = 0
            for number in range(len(sure)):
                best = int(overlaps[number].argmax())
                right[number] = overlaps[number, best] >= OVERLAP
                if right[number]:
                    overlaps[:, best] = 0
        score = float(arrays["scores"][sure].mean()) if len(sure) else 0.0
        rows.append((2 * int(right.sum()) / (len(sure) + len(boxes)), score, image, np.stack([sure, right], 1)))
    return rows


def truth_of(index: AnnotationIndex, image: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ltrb in [0, 1] and labels of an image, without crowd."""
    boxes, labels = index.ltrb(image)
    single = ~index.crowd[index.first_box[image] : index.first_box[image + 1]]
    return boxes[single], labels[single]


def example_section(found: Detected) -> str:
    """The images with the best and the worst detections, beside the truth."""
    rows = agreement(found)
    best = sorted(rows, key=lambda row: (-row[0], -row[1], row[2]))[:EXAMPLES]
    taken = {row[2] for row in best}
    worst = sorted((row for row in rows if row[2] not in taken), key=lambda row: (row[0], -row[1], row[2]))[:EXAMPLES]
    parts = [
        f"<p>First the truth, then the detections with a score of {SURE} or more. Images are ranked by the F1 of these: a detection is right at an "
        f"IoU of {OVERLAP} or more with a box of its class. Among equals the surer come first.</p>",
        f'<p class="legend">{line_key("mark", "truth, and detections that are right")}{line_key("mark forced", "detections that are wrong")}</p>',
    ]
    for title, some in (("Best", best), ("Worst", worst)):
        figures = "".join(_example(found, *row) for row in some)
        parts.append(f"<h3>{title}</h3>" + (f'<div class="pairs">{figures}</div>' if figures else "<p>There is none.</p>"))
    return "".join(parts)


def _example(found: Detected, quality: float, _: float, image: int, sure: np.ndarray) -> str:
    index, arrays = found.index, found.arrays
    file = shown(index.file_name(image), 80)
    try:
        picture = read_rgb(f"{found.images}/{index.file_name(image)}", tuple(index.sizes[image].tolist()))
    except BadImage as error:
        return f"<p>{escape(file)} cannot be read: {escape(error.reason)}</p>"
    address, w, h = jpeg(picture, SIDE, BYTES)
    boxes, labels = truth_of(index, image)
    chosen, right = sure[:BOXES, 0], sure[:BOXES, 1].astype(bool)
    names = [name_of(found.names, label) for label in labels.tolist()]
    there = [Box(box, colour(label), name) for box, label, name in zip((boxes * (w, h, w, h)).tolist(), labels.tolist(), names, strict=True)]
    hits = zip((arrays["boxes"][chosen] * (w, h, w, h)).tolist(), arrays["labels"][chosen].tolist(), arrays["scores"][chosen], right, strict=True)
    marked = [Box(box, colour(label), f"{name_of(found.names, label)} {score:.2f}", "" if ok else "forced") for box, label, score, ok in hits]
    told = f"{int(sure[:, 1].sum())} of {len(sure)} detections right, truth has {len(boxes)}, F1 {quality:.2f}"
    left, right_side = (
        drawn_over(address, w, h, alt, some)
        for alt, some in ((f"{file}, truth: {listed(names)}", there[:BOXES]), (f"{file}, detected: {told}", list(reversed(marked))))
    )
    return f'<figure><div class="pair">{left}{right_side}</div><figcaption>{escape(f"{file}: {told}")}</figcaption></figure>'


def name_of(names: Sequence[str], label: int) -> str:
    return shown(names[label - 1], 24)


def listed(names: Sequence[str]) -> str:
    """Names with how often each occurs, for those who do not see the picture."""
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nothing"

"""Checks of both loaders and the evaluator, on drawn pictures whose colours tell where a crop lies."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from base.backend import Backend
from base.contracts import FIGURES, Batch, Detections, Evaluator
from conformance.parts import GOLDEN, LARGE, Found, Kit, NotChecked, golden, wrong
from data_sets.index import AnnotationIndex

SIZE = (96, 128)  # height and width of the samples
IMAGES, EMPTY = 43, 3  # pictures, of them without boxes
EPOCHS = 6  # whose samples the statistics are of


def pictures(kit: Kit) -> dict:
    """Draws the data set once → a loader's arguments. Red rises to the right and green downwards; boxes lie to the left."""
    folder, rng = kit.scratch / "pictures", kit.rng()
    if not folder.exists():
        folder.mkdir()
        images, annotations = [], []
        for number in range(IMAGES):
            width, height = rng.integers(90, 300, 2).tolist()
            key, name = 10 + 3 * number, f"{number}.{'png' if number % 9 == 8 else 'jpg'}"
            rough = Image.fromarray(rng.integers(0, 50, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
            pixels = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC), dtype=float) + (20, 20, 60)
            pixels[..., 0] += np.linspace(0, 160, width)
            pixels[..., 1] += np.linspace(0, 100, height)[:, None]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=92)
            images.append({"id": key, "file_name": name, "width": width, "height": height})
            for _ in range(0 if number < EMPTY else 500 if number == EMPTY else 1 + number % 5):
                x, y, w, h = (rng.uniform((0, 0, 0.05, 0.05), (0.25, 0.5, 0.35, 0.5)) * (width, height, width, height)).round(2).tolist()
                crowd = int(number % 7 == 4 and rng.random() < 0.4)
                entry = {"id": len(annotations) + 1, "image_id": key, "category_id": int(rng.choice([3, 7, 8])), "bbox": [x, y, w, h]}
                annotations.append({**entry, "area": w * h, "iscrowd": crowd})
        content = {"images": images, "annotations": annotations, "categories": [{"id": n, "name": str(n)} for n in (3, 7, 8)]}
        (folder / "annotations.json").write_text(json.dumps(content))
    return {"annotation_file": folder / "annotations.json", "image_dir": folder, "image_size": SIZE}


def on_host(loader) -> list[Batch]:
    return [Batch(*(field.cpu() for field in batch)) for batch in loader]


def ids(batches: list[Batch]) -> list[int]:
    return [key for batch in batches for key in batch.image_ids.tolist()]


def samples(batches: list[Batch]) -> dict[int, tuple]:
    """Image id → (pixels, boxes, labels, size), without padding."""
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    return {int(key): (image, boxes[labels > 0], labels[labels > 0], size) for image, boxes, labels, key, size in rows}


def unequal(got: list[Batch], want: list[Batch], first: int = 0) -> float:
    """Images that only one has, or whose sample is not the same from field ``first`` on: 0 pixels, 1 boxes and the rest."""
    got, want = samples(got), samples(want)
    return len(got.keys() ^ want.keys()) + sum(not all(map(torch.equal, got[key][first:], want[key][first:])) for key in got.keys() & want.keys())


def malformed(batches: list[Batch], size: tuple[int, int] = SIZE) -> float:
    """Facts about shapes, types and padding that `base.contracts.Batch` states and that do not hold."""
    count = 0.0
    for images, boxes, labels, keys, sizes in batches:
        n, m = labels.shape
        real = labels > 0
        some = boxes[real]
        count += wrong(
            images=images.dtype == torch.uint8 and images.shape == (n, *size, 3),
            boxes=boxes.dtype == torch.float32 and boxes.shape == (n, m, 4) and not boxes[~real].any(),
            labels=labels.dtype == torch.int64 and m >= 1 and bool((labels <= 3).all() and (real.int().diff(dim=1) <= 0).all()),
            ids=keys.dtype == torch.int64 and keys.shape == (n,),
            sizes=sizes.dtype == torch.int64 and sizes.shape == (n, 2),
            inside=bool((some >= 0).all() and (some <= 1).all() and (some[:, :2] < some[:, 2:]).all()),
        )
    return count


def pixel_errors(got: list[Batch], want: list[Batch]) -> tuple[float, float]:
    """→ mean difference of the worst image, and what one number of a thousand exceeds; in levels of 255."""
    got, want = samples(got), samples(want)
    gaps = torch.stack([(got[key][0].int() - want[key][0].int()).abs() for key in got.keys() & want.keys()])
    return gaps.double().mean((1, 2, 3)).max().item(), float(np.quantile(gaps.numpy(), 0.999))


def traits(batches: list[Batch]) -> np.ndarray:
    """Of each sample (S, 10): boxes kept, their mean width and height, how far they lie to where red is low, whether it is mirrored,
    how wide and how high a part of the picture it shows, and its mean red, green and blue."""
    rows = []
    for image, boxes, _, _ in samples(batches).values():
        halves, colour = image.double(), image.double().mean((0, 1))
        across = (halves[:, SIZE[1] // 2 :].mean((0, 1)) - halves[:, : SIZE[1] // 2].mean((0, 1)))[0].item()
        down = (halves[SIZE[0] // 2 :].mean((0, 1)) - halves[: SIZE[0] // 2].mean((0, 1)))[1].item()
        size, centre = (boxes[:, 2:] - boxes[:, :2]).mean(0).tolist(), (boxes[:, 0] + boxes[:, 2]).mean().item() / 2 - 0.5
        rows.append([min(len(boxes), 9), *size, centre * np.sign(across), across < 0, abs(across), down, *colour.tolist()])
    return np.array(rows)


TRAITS = ("boxes kept", "width of boxes", "height of boxes", "side of boxes", "mirrored", "width of crops", "height of crops", "red", "green", "blue")


def epochs_of(make: Callable, given: dict, epochs: int) -> list[list[Batch]]:
    loader, found = make(**given), []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found.append(on_host(loader))
    return found


def training_samples(kit: Kit) -> Found:
    given = {**pictures(kit), "batch_size": 8, "workers": 0, "seed": kit.seed}
    loader = kit.backend.train_loader(**given)
    own, plain = (epochs_of(backend.train_loader, given, EPOCHS) for backend in (kit.backend, kit.reference))
    yield "form of batches", sum(map(malformed, own)), 0
    counts = wrong(batches=all(len(epoch) == len(loader) == 5 for epoch in own), once=all(len(set(ids(e))) == 40 for e in own))
    yield "each image at most once, batches an epoch", counts + (ids(own[0]) == ids(own[1])), 0
    one, other = (np.concatenate([traits(epoch) for epoch in epochs]) for epochs in (own, plain))
    deviation = np.sqrt((one.var(0) + other.var(0)) / len(one)) + 1e-9
    for name, sigmas in zip(TRAITS, np.abs(one.mean(0) - other.mean(0)) / deviation, strict=True):
        yield f"{name}, mean of {len(one)} samples, in standard errors", sigmas, 4
    if hasattr(loader, "state_dict"):
        return  # its samples are not promised to be functions of seed, epoch and image id
    yield "order of images", sum(ids(a) != ids(b) for a, b in zip(own, plain, strict=True)), 0
    yield "boxes, labels and sizes", sum(unequal(a, b, first=1) for a, b in zip(own, plain, strict=True)), 0
    worst = [pixel_errors(a, b) for a, b in zip(own, plain, strict=True)]
    yield "pixels: mean of the worst image", max(mean for mean, _ in worst), 1.5  # contrast and saturation widen rounding by up to a half each
    yield "pixels: 99.9th percentile", max(most for _, most in worst), 10


def training_is_pure(kit: Kit) -> Found:
    """Neither workers, ranks nor a restart change a sample."""
    given = {**pictures(kit), "batch_size": 8, "workers": 0, "seed": kit.seed, "epoch": 3}
    make = kit.backend.train_loader
    loader = make(**given)
    if hasattr(loader, "state_dict"):
        raise NotChecked("the loader keeps a state, so its samples need not be functions of seed, epoch and image id")
    whole = on_host(loader)
    yield "two workers", unequal(on_host(make(**{**given, "workers": 2})), whole), 0
    parts = [on_host(make(**{**given, "batch_size": 4, "rank": rank, "world_size": 2})) for rank in (0, 1)]
    together = [[key for part in parts for key in part[n].image_ids.tolist()] for n in range(len(whole))]
    mixed = sum(mine != batch.image_ids.tolist() for mine, batch in zip(together, whole, strict=True))
    yield "two ranks", mixed + unequal([batch for part in parts for batch in part], whole), 0
    loader.set_epoch(3, 2)
    yield "a restart within an epoch", unequal(on_host(loader), whole[2:]), 0
    yield "the same seed again", unequal(on_host(make(**given)), whole), 0
    yield "another seed gives the same", unequal(on_host(make(**{**given, "seed": kit.seed + 1})), whole) < 20, 0


def evaluation_samples(kit: Kit) -> Found:
    given = {**pictures(kit), "batch_size": 4, "workers": 0}
    loader = kit.backend.eval_loader(**given)
    own, plain = on_host(loader), on_host(kit.reference.eval_loader(**given))
    yield "form of batches", malformed(own), 0
    yield "every image once, in order, ragged last batch", wrong(ids=ids(own) == ids(plain), batches=len(own) == len(loader) == 11), 0
    yield "boxes, labels and sizes", unequal(own, plain, first=1), 0
    mean, most = pixel_errors(own, plain)
    yield "pixels: mean of the worst image", mean, 1
    yield "pixels: 99.9th percentile", most, 3
    yield "the same again", unequal(on_host(loader), own), 0
    yield "two workers", unequal(on_host(kit.backend.eval_loader(**{**given, "workers": 2})), own), 0
    parts = [on_host(kit.backend.eval_loader(**given, rank=rank, world_size=2)) for rank in (0, 1)]
    twice = len(ids(parts[0]) + ids(parts[1])) - len(ids(own))
    yield "two ranks", abs(twice) + unequal([*parts[0], *parts[1]], own), 0


def of_large_images(slot: str, kit: Kit) -> Found:
    """The first batch of each size."""
    trains = slot == "train_loader"
    given = {**pictures(kit), "batch_size": 2, "workers": 0} | ({"seed": kit.seed} if trains else {})
    for name, (size, _) in LARGE.items():
        loaders = [getattr(backend, slot)(**{**given, "image_size": size}) for backend in (kit.backend, kit.reference)]
        own, plain = ([Batch(*(field.cpu() for field in next(iter(loader))))] for loader in loaders)
        yield f"{name}: form of batches", malformed(own, size), 0
        if trains and hasattr(loaders[0], "state_dict"):
            continue
        yield f"{name}: boxes, labels and sizes", unequal(own, plain, first=1), 0
        mean, most = pixel_errors(own, plain)
        yield f"{name}: pixels, mean of the worst image", mean, 1.5 if trains else 1
        yield f"{name}: pixels, 99.9th percentile", most, 10 if trains else 3


def training_samples_of_large_images(kit: Kit) -> Found:
    return of_large_images("train_loader", kit)


def evaluation_samples_of_large_images(kit: Kit) -> Found:
    return of_large_images("eval_loader", kit)


def judged(make: Callable, file: Path, batches: list[tuple]) -> Evaluator:
    evaluator = make(file)
    for batch in batches:
        evaluator.update(*batch)
    return evaluator


def figures_of(make: Callable, file: Path, batches: list[tuple]) -> dict[str, float]:
    return judged(make, file, batches).compute()


def figures_apart(got: dict, want: dict) -> float:
    return max(abs(got[name] - want[name]) for name in FIGURES) if tuple(got) == FIGURES else float("inf")


def golden_detections() -> tuple[torch.Tensor, torch.Tensor, list[Detections]]:
    truth, found = golden("coco_gt"), golden("coco_detections")
    label = {category["id"]: n for n, category in enumerate(truth["categories"], 1)}
    images = truth["images"]
    detections = []
    for image in images:
        mine = sorted((d for d in found if d["image_id"] == image["id"]), key=lambda d: -d["score"])
        boxes = torch.tensor([d["bbox"] for d in mine], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes /= torch.tensor([image["width"], image["height"]] * 2)
        labels = torch.tensor([label[d["category_id"]] for d in mine], dtype=torch.long)
        detections.append(Detections(boxes, labels, torch.tensor([d["score"] for d in mine], dtype=torch.float64)))
    return torch.tensor([i["id"] for i in images]), torch.tensor([[i["height"], i["width"]] for i in images]), detections


def coco_golden(kit: Kit) -> Found:
    ids, sizes, found = golden_detections()
    got = figures_of(kit.backend.evaluator, GOLDEN / "coco_gt.json", [(ids[:7], sizes[:7], found[:7]), (ids[7:], sizes[7:], found[7:])])
    yield "golden: 12 figures", figures_apart(got, golden("coco_stats")), 1e-9


def random_detections(kit: Kit, index: AnnotationIndex) -> list[tuple]:
    """Batches of one image: boxes near true ones, some of them found twice or called otherwise, and others that are not there."""
    rng, batches = kit.rng(), []
    for number, (key, size) in enumerate(zip(index.image_ids.tolist(), index.sizes.tolist(), strict=True)):
        boxes, labels = index.ltrb(number)
        keep = np.repeat(np.arange(len(boxes))[:40], 2)[rng.random(2 * min(40, len(boxes))) < 0.6]
        boxes = np.concatenate([boxes[keep] + rng.normal(0, 0.02, (len(keep), 4)), [[0.1, 0.6, 0.9, 0.95]]])
        labels = np.append(np.where(rng.random(len(keep)) < 0.8, labels[keep], 1), 2)
        scores = torch.from_numpy(rng.permutation(np.linspace(0.06, 0.98, len(labels)) + number * 1e-4)).sort(descending=True)
        detections = Detections(*(torch.from_numpy(a)[scores.indices].to(kit.device) for a in (boxes, labels)), scores.values.to(kit.device))
        batches.append((torch.tensor([key]), torch.tensor([size]), [detections]))
    return batches


def coco_random(kit: Kit) -> Found:
    file = pictures(kit)["annotation_file"]
    batches, make = random_detections(kit, AnnotationIndex.open(file)), kit.backend.evaluator
    want = figures_of(kit.reference.evaluator, file, batches)
    yield "random detections: 12 figures", figures_apart(figures_of(make, file, batches), want), 1e-9
    joined = tuple(torch.cat(column) for column in zip(*((key, size) for key, size, _ in batches), strict=True))
    one = (*joined, [found for *_, (found,) in batches])
    yield "another order, one update", max(figures_apart(figures_of(make, file, some), want) for some in (batches[::-1], [one])), 1e-9
    none = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    empty = [(*joined, [none] * len(batches))]
    curves = [judged(maker, file, batches).curves() for maker in (make, kit.reference.evaluator)]
    yield "precisions of each class", float(np.abs(np.subtract(*curves)).max()) if curves[0].shape == curves[1].shape else float("inf"), 1e-9
    yield "nothing found", figures_apart(figures_of(make, file, empty), figures_of(kit.reference.evaluator, file, empty)), 0


def timed_loader(slot: str, kit: Kit, backend: Backend) -> Callable:
    loader = getattr(backend, slot)(**pictures(kit), batch_size=8, workers=2, **({"seed": kit.seed} if slot == "train_loader" else {}))
    return lambda: [None for _ in loader]


def timed_evaluator(kit: Kit, backend: Backend) -> Callable:
    file = pictures(kit)["annotation_file"]
    batches = random_detections(kit, AnnotationIndex.open(file))
    return lambda: figures_of(backend.evaluator, file, batches)


CHECKS = {
    "train_loader": (training_samples, training_is_pure, training_samples_of_large_images),
    "eval_loader": (evaluation_samples, evaluation_samples_of_large_images),
    "evaluator": (coco_golden, coco_random),
}
SPEEDS = {**{slot: partial(timed_loader, slot) for slot in ("train_loader", "eval_loader")}, "evaluator": timed_evaluator}

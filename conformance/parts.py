"""Checks of matcher, loss and decoder: the golden data, and random inputs against the reference.

A check takes a `Kit` and yields (what is compared, worst error, tolerance); every tolerance of `verify` stands beside its check.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base.backends.reference.model import feature_sizes
from torch import Tensor

from base.backend import Backend
from base.boxes import DefaultBoxes, default_boxes, encode, iou, ltrb_to_xywh, xywh_to_ltrb
from base.contracts import Detections, Predictions, Targets

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
GOLDEN = FOLDER if FOLDER.is_dir() else None  # figures of the MLPerf reference and of pycocotools, in a checkout
COCO = ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))  # levels at 300×300: 8,732 default boxes
FEW = ((10, 10), (5, 5), (3, 3), (2, 2), (1, 1), (1, 1))  # 636, more than non-maximum suppression looks at in a class
LARGE = {"700×700": ((700, 700), (1, 1, 2, 2, 2, 1)), "800×1200": ((800, 1200), (2, 2, 2, 2, 1, 1)), "1200×1200": ((1200, 1200), (3, 3, 2, 2, 2, 2))}
CLASSES = 5
NEAR = 1e-6  # overlaps that are nearer than this to each other may be ordered either way
ROUNDING = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 2e-3}  # relative error of gradients, which come in the predictions' dtype
Found = Iterator[tuple[str, float, float]]


class NotChecked(Exception):
    """A check that cannot be made, and why; no failure."""


@dataclass(frozen=True)
class Kit:
    """What a check works with."""

    backend: Backend
    reference: Backend
    device: torch.device
    seed: int
    scratch: Path  # a folder for files
    use: dict[str, str]  # what made the backend, beside its name

    def rng(self) -> np.random.Generator:
        """The same random numbers for each check."""
        return np.random.default_rng(self.seed)

    def on(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """An array on the device; floating-point numbers as float32 unless said otherwise."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(self.device, dtype or (torch.float32 if tensor.is_floating_point() else tensor.dtype))


def golden(name: str) -> Any:
    """Golden data by its name."""
    file = GOLDEN / f"{name}.npz"
    return np.load(file) if file.exists() else json.loads((GOLDEN / f"{name}.json").read_text())


def boxes_on(kit: Kit, levels: tuple) -> DefaultBoxes:
    return default_boxes((300, 300), levels).to(kit.device)


def large_images(kit: Kit) -> Iterator[tuple[str, DefaultBoxes]]:
    """The sizes and strides that SSD-R34-Large was published with: 46,742, 25,276 and 15,130 default boxes."""
    for name, (size, strides) in LARGE.items():
        yield name, default_boxes(size, feature_sizes(size, strides)).to(kit.device)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where one of them only is not a number, or the shapes differ."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    same = (got == want) | (got.isnan() & want.isnan())
    return (got - want).abs().nan_to_num(math.inf).masked_fill(same, 0).max().item() if got.numel() else 0.0


def relative(got: Tensor, want: Tensor) -> float:
    """The length of the difference, relative to that of what is wanted."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    length = (got - want).norm().item()
    return length / (want.norm().item() or 1.0) if math.isfinite(length) else math.inf


def wrong(**facts: bool) -> float:
    """How many of the facts do not hold."""
    return float(sum(not fact for fact in facts.values()))


# Matcher


def random_truth(rng: np.random.Generator, images: int, boxes: int, smallest: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, M, 4) ltrb and labels (N, M); each image after the first has some less, down to none in the last of several."""
    corner = rng.uniform(0, 0.6, (images, boxes, 2))
    ltrb = np.concatenate([corner, corner + rng.uniform(smallest, 0.4, (images, boxes, 2))], 2)
    counts = np.linspace(boxes, 0, images, dtype=int)
    real = np.arange(boxes) < counts[:, None]
    return ltrb * real[..., None], rng.integers(1, CLASSES, (images, boxes)) * real


def settled(boxes: Tensor, labels: Tensor, defaults: DefaultBoxes) -> Tensor:
    """bool (N, A): default boxes whose match rounding cannot change."""
    overlaps = iou(boxes.double(), defaults.ltrb.double()).nan_to_num(-1).masked_fill(labels[..., None] == 0, -1)  # (N, M, A)
    best = overlaps.topk(min(2, overlaps.shape[1]), 1).values  # of each default box
    rivals = (overlaps > overlaps.amax(2, keepdim=True) - NEAR) & (overlaps >= 0)
    tied = (rivals & (rivals.sum(2, keepdim=True) > 1)).any(1)
    torn = (best[:, 0] - best[:, -1] < NEAR) & (overlaps.shape[1] > 1) & (best[:, 0] > 0.5)
    return ~(tied | torn | ((best[:, 0] - 0.5).abs() < NEAR))


def mismatched(kit: Kit, boxes: Tensor, labels: Tensor, defaults: DefaultBoxes) -> tuple[float, float]:
    """→ default boxes with another label than by the reference, and the largest difference of offsets."""
    got, want = (backend.matcher(boxes, labels, defaults) for backend in (kit.backend, kit.reference))
    if any((a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape) for a, b in zip(got, want, strict=True)):
        return math.inf, math.inf
    firm = settled(boxes, labels, defaults)
    agreed = firm & (got.labels == want.labels)
    return ((got.labels != want.labels) & firm).sum().item(), apart(got.offsets * agreed[..., None], want.offsets * agreed[..., None])


def matching_golden(kit: Kit) -> Found:
    data, defaults, wrong, offsets = golden("matching"), boxes_on(kit, COCO), 0, 0.0
    order = defaults.mlperf_order
    for case in range(10):
        boxes, labels = (kit.on(data[f"{case}_{name}"][None]) for name in ("boxes_ltrb", "labels"))
        found = kit.backend.matcher(boxes, labels, defaults)
        got, want = found.labels[0, order], torch.zeros_like(found.labels[0])
        place = kit.on(data[f"{case}_positive_anchor"])
        want[place] = kit.on(data[f"{case}_positive_label"]).long()
        wrong += (got != want).sum().item()
        exact = encode(xywh_to_ltrb(kit.on(data[f"{case}_positive_xywh"], torch.float64)), defaults.xywh[order][place].double())
        offsets = max(offsets, apart(found.offsets[0, order][place], exact), found.offsets[found.labels == 0].abs().sum().item())
    yield "golden: default boxes and labels", wrong, 0
    yield "golden: offsets", offsets, 1e-4


def matching_random(kit: Kit) -> Found:
    rng, defaults = kit.rng(), boxes_on(kit, COCO)
    cases = {"random: up to 7 boxes": (8, 7), "500 boxes": (2, 500), "batch of 1": (1, 3), "an image without boxes": (1, 1)}
    for name, (images, count) in cases.items():
        boxes, labels = map(kit.on, random_truth(rng, images, count))
        if name == "an image without boxes":
            boxes, labels = boxes * 0, labels * 0
        wrong, offsets = mismatched(kit, boxes, labels, defaults)
        yield f"{name}: default boxes and labels", wrong, 0
        yield f"{name}: offsets", offsets, 1e-4
    corner = rng.integers(0, 7, (4, 6, 2))  # on eighths IoUs are fractions of small numbers: many are equal, and exactly so
    boxes, labels = kit.on(np.concatenate([corner, rng.integers(corner + 1, 9)], 2) / 8), kit.on(rng.integers(1, CLASSES, (4, 6)))
    ltrb = boxes.view(-1, 4)
    eighths = DefaultBoxes(ltrb_to_xywh(ltrb), ltrb, kit.on(rng.permutation(24)), ((1, 24),))
    got, want = (backend.matcher(boxes, labels, eighths) for backend in (kit.backend, kit.reference))
    yield "equal overlaps", (got.labels != want.labels).sum().item(), 0
    again = kit.backend.matcher(boxes, labels, eighths)
    yield "the same bits again", apart(again.offsets, got.offsets) + apart(again.labels, got.labels), 0


def matching_of_large_images(kit: Kit) -> Found:
    rng = kit.rng()
    for name, defaults in large_images(kit):
        wrong, offsets = mismatched(kit, *map(kit.on, random_truth(rng, 3, 9)), defaults)
        yield f"{name}: default boxes and labels", wrong, 0
        yield f"{name}: offsets", offsets, 1e-4


# Loss


def with_slopes(loss: Callable, offsets: Tensor, logits: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by offsets and logits."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (offsets, logits)]
    value = loss(Predictions(*leaves), targets)
    return value.detach(), *torch.autograd.grad(value, leaves)


def from_mlperf(array: np.ndarray, order: Tensor) -> np.ndarray:
    """(N, K, A) in the MLPerf order → (N, A, K) in this project's order."""
    return array.astype(np.float32).transpose(0, 2, 1)[:, order.cpu().argsort().numpy()]


def loss_golden(kit: Kit) -> Found:
    data, defaults = golden("loss"), boxes_on(kit, COCO)
    offsets, logits = (kit.on(from_mlperf(data[key], defaults.mlperf_order)) for key in ("loc", "logits"))
    single = [kit.reference.matcher(kit.on(data[f"{i}_boxes_ltrb"][None]), kit.on(data[f"{i}_labels"][None]), defaults) for i in range(len(offsets))]
    targets = Targets(*(torch.cat(column) for column in zip(*single, strict=True)))
    loss, *slopes = with_slopes(kit.backend.loss, offsets, logits, targets)
    yield "golden: loss", abs(loss.item() / float(data["loss"]) - 1), 1e-4
    alone = [kit.backend.loss(Predictions(offsets[i : i + 1], logits[i : i + 1]), one).item() for i, one in enumerate(single)]
    each = np.abs(np.array(alone) - data["per_image"]) / np.maximum(data["per_image"], 1e-6)
    yield "golden: loss of each image", each.max(), 1e-4
    sums = [(slope.abs().sum((1, 2)), kit.on(data[key])) for slope, key in zip(slopes, ("grad_loc_abs_sum", "grad_logits_abs_sum"), strict=True)]
    yield "golden: gradients", max(relative(got, want) for got, want in sums), 1e-3
    there = (slopes[1].abs().sum(2) > 0).sum(1)
    yield "golden: default boxes with a gradient", apart(there, kit.on(data["grad_logits_nonzero_anchors"])), 0


def loss_case(kit: Kit, rng: np.random.Generator, share: float, images: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Targets]:
    """Random predictions and targets; ``share`` of the default boxes are positive, with several images none of the last."""
    labels = np.where(rng.random((images, count)) < share, rng.integers(1, CLASSES, (images, count)), 0)
    if images > 1:
        labels[-1] = 0
    offsets, logits = rng.normal(0, 1.5, (images, count, 4)), rng.normal(0, 2, (images, count, CLASSES))
    wanted = rng.normal(0, 1, (images, count, 4)) * (labels > 0)[..., None]
    return kit.on(offsets, dtype), kit.on(logits, dtype), Targets(kit.on(wanted), kit.on(labels))


def loss_random(kit: Kit) -> Found:
    """Shares of positives up to where three times as many negatives are not there."""
    rng = kit.rng()
    for name in kit.backend.dtypes:
        losses, slopes, empty, kinds = [], [], [], []
        for share, images, count in ((0.01, 4, 2000), (0.1, 3, 300), (0.3, 1, 300), (0.7, 2, 60), (0, 2, 60)):
            case = loss_case(kit, rng, share, images, count, getattr(torch, name))
            got, want = (with_slopes(backend.loss, *case) for backend in (kit.backend, kit.reference))
            losses.append(abs(got[0].item() - want[0].item()) / max(abs(want[0].item()), 1e-6))
            slopes += [relative(*pair) for pair in zip(got[1:], want[1:], strict=True)]
            empty += [slope[-1].abs().max().item() for slope in got[1:] if images > 1]
            kinds.append(wrong(slopes=all(slope.dtype is case[0].dtype for slope in got[1:]), scalar=got[0].shape == ()))
        yield f"{name}: loss", max(losses), 1e-4
        yield f"{name}: gradients", max(slopes), ROUNDING.get(name, 1e-2)
        yield f"{name}: gradients of an image without positives", max(empty), 0
        yield f"{name}: shape of the loss, dtype of gradients", sum(kinds), 0
        again = with_slopes(kit.backend.loss, *case), with_slopes(kit.backend.loss, *case)
        yield f"{name}: the same bits again", max(map(apart, *again)), 0
    offsets, logits, targets = loss_case(kit, rng, 0.2, 2, 60, torch.float32)
    hidden = 0.0
    for broken in (math.nan, math.inf):
        for which, positive in ((0, True), (1, True), (1, False)):
            values = [offsets.clone(), logits.clone()]
            values[which][0, (targets.labels[0] > 0).int().argsort(stable=True)[-1 if positive else 0], 0] = broken
            hidden += math.isfinite(kit.backend.loss(Predictions(*values), targets).item())
    yield "what is not finite is hidden", hidden, 0


def loss_of_large_images(kit: Kit) -> Found:
    rng = kit.rng()
    for name, defaults in large_images(kit):
        case = loss_case(kit, rng, 0.002, 2, len(defaults), torch.float32)
        got, want = (with_slopes(backend.loss, *case) for backend in (kit.backend, kit.reference))
        yield f"{name}: loss", abs(got[0].item() / want[0].item() - 1), 1e-4
        yield f"{name}: gradients", max(map(relative, got[1:], want[1:])), ROUNDING["float32"]


# Decoder


def difference(got: Detections, want: Detections) -> float:
    """The largest difference between detections of the same label that belong together, boxes counted a tenth; infinite if one is alone."""
    n, m = len(got.scores), len(want.scores)
    sound = got.boxes.shape == (n, 4) and got.labels.shape == (n,) and got.labels.dtype == torch.int64 and bool((got.scores.diff() <= 0).all())
    if n != m or not sound:
        return math.inf
    if n == 0:
        return 0.0
    (b, c, s), (wb, wc, ws) = ([column.cpu() for column in image] for image in (got, want))
    gap = torch.maximum((s.double()[:, None] - ws.double()).abs(), (b.double()[:, None] - wb.double()).abs().amax(2) / 10)
    gap = gap.nan_to_num(math.inf).masked_fill(c[:, None] != wc, math.inf)
    return max(gap.amin(0).max().item(), gap.amin(1).max().item())


def decoding_golden(kit: Kit) -> Found:
    defaults, data = boxes_on(kit, COCO), golden("decode")
    predictions = Predictions(*(kit.on(from_mlperf(data[key], defaults.mlperf_order)) for key in ("loc", "logits")))
    found = kit.backend.decoder(predictions, defaults, score_threshold=0.05, iou_threshold=0.5, max_detections=200)
    want = [Detections(*(kit.on(data[f"{i}_{name}"]) for name in ("boxes_ltrb", "labels", "scores"))) for i in range(4)]
    yield "golden: detections", max(map(difference, found, want)) if len(found) == 4 else math.inf, 1e-4


def predictions_of(rng: np.random.Generator, kit: Kit, defaults: DefaultBoxes, dtype: torch.dtype, images: int = 3) -> Predictions:
    shapes = (images, len(defaults), 4), (images, len(defaults), CLASSES)
    return Predictions(kit.on(rng.normal(0, 1, shapes[0]), dtype), kit.on(rng.normal(0, 2.5, shapes[1]), dtype))


def decoded_apart(kit: Kit, predictions: Predictions, defaults: DefaultBoxes, score: float, overlap: float, limit: int) -> float:
    """The largest difference from the reference. Images whose detections hang on rounding, by its own word, are not compared."""
    plain = kit.reference.decoder
    low, high = (plain(predictions, defaults, score * (1 + e), overlap * (1 + 10 * e), limit) for e in (-1e-6, 1e-6))
    firm = [difference(a, b) == 0 for a, b in zip(low, high, strict=True)]
    pairs = zip(*(backend.decoder(predictions, defaults, score, overlap, limit) for backend in (kit.backend, kit.reference)), strict=True)
    return max((difference(*pair) for pair, sure in zip(pairs, firm, strict=True) if sure), default=math.inf)


def decoding_random(kit: Kit) -> Found:
    rng, defaults, decode = kit.rng(), boxes_on(kit, FEW), kit.backend.decoder
    for name in kit.backend.dtypes:
        for score, overlap, limit in ((0.05, 0.5, 200), (0.3, 0.45, 5), (0.01, 1.1, 1000)):
            error = decoded_apart(kit, predictions_of(rng, kit, defaults, getattr(torch, name)), defaults, score, overlap, limit)
            yield f"{name}: score > {score}, IoU {overlap}, best {limit}", error, 1e-4
    predictions = predictions_of(rng, kit, defaults, torch.float32)
    together, again = decode(predictions, defaults), decode(predictions, defaults)
    yield "the same bits again", max(apart(a, b) for pair in zip(together, again, strict=True) for a, b in zip(*pair, strict=True)), 0
    alone = decode(Predictions(*(t[1:2] for t in predictions)), defaults)[0]
    yield "an image alone", difference(alone, together[1]), 1e-6
    predictions.logits[0], predictions.offsets[2, :, 2:] = math.nan, math.inf
    broken = decode(predictions, defaults)
    facts = {"none of no number": len(broken[0].scores) == 0, "few": len(broken[2].scores) <= 200, "same": difference(broken[1], together[1]) <= 1e-6}
    predictions.logits[1, :, 0] = 1e3  # surely background
    facts["nothing"] = len(decode(Predictions(*(t[1:2] for t in predictions)), defaults)[0].scores) == 0
    facts["no images"] = decode(Predictions(*(t[:0] for t in predictions)), defaults) == []
    yield "not finite, nothing to find, no images", wrong(**facts), 0


def decoding_of_large_images(kit: Kit) -> Found:
    rng = kit.rng()
    for name, defaults in large_images(kit):
        predictions = predictions_of(rng, kit, defaults, torch.float32)
        predictions.logits[..., 0] += 9  # background, as almost everywhere
        yield f"{name}: detections", decoded_apart(kit, predictions, defaults, 0.05, 0.5, 200), 1e-4


def timed_matcher(kit: Kit, backend: Backend) -> Callable:
    boxes, labels = map(kit.on, random_truth(kit.rng(), 8, 7))
    defaults = boxes_on(kit, COCO)
    return lambda: backend.matcher(boxes, labels, defaults)


def timed_loss(kit: Kit, backend: Backend) -> Callable:
    case = loss_case(kit, kit.rng(), 0.01, 8, 8732, torch.float32)
    return lambda: with_slopes(backend.loss, *case)


def timed_decoder(kit: Kit, backend: Backend) -> Callable:
    defaults = boxes_on(kit, FEW)
    predictions = predictions_of(kit.rng(), kit, defaults, torch.float32)
    return lambda: backend.decoder(predictions, defaults)


CHECKS = {
    "matcher": (matching_golden, matching_random, matching_of_large_images),
    "loss": (loss_golden, loss_random, loss_of_large_images),
    "decoder": (decoding_golden, decoding_random, decoding_of_large_images),
}
SPEEDS = {"matcher": timed_matcher, "loss": timed_loss, "decoder": timed_decoder}

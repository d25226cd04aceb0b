"""How the cost of a part grows with what it depends on: timed at several sizes, and the exponent fitted.

Of cost ≈ c · size^e, e is the slope of the line through log(size) and log(cost) by least squares, with its standard error.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from data_sets.index import AnnotationIndex
from measuring.figures import Log
from measuring.index import generate
from measuring.parts import LEAST
from measuring.timing import Cases, interleaved
from measuring.work import (
    Photographs,
    decoder_case,
    default_boxes,
    demo_model,
    evaluator_case,
    loader_case,
    loss_case,
    matcher_case,
    step_case,
)

ROUNDS, QUICK_SIZES, QUICK_ROUNDS = 5, 3, 2
SIDES = (300, 400, 500, 600)  # of images, with the strides of SSD300: 8,732 default boxes and more
EXPONENTS = {-1: "in inverse proportion", 0: "constant", 1: "linear", 2: "quadratic"}


@dataclass(frozen=True)
class Fit:
    """``exponent`` ± ``error`` (None: of two sizes), and ``last``, the exponent between the two largest sizes alone."""

    exponent: float
    error: float | None
    last: float


@dataclass(frozen=True)
class Growth:
    """A part's cost by one thing: seconds a call of each backend (of "all": what every backend does alike) at each size."""

    part: str
    what: str
    sizes: tuple[float, ...]
    seconds: dict[str, tuple[float, ...]]  # medians of the rounds
    spread: dict[str, tuple[tuple[float, float], ...]]  # lowest and highest

    def fits(self) -> dict[str, Fit]:
        return {name: fitted(self.sizes, seconds) for name, seconds in self.seconds.items()}


def fitted(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """The exponent of two or more costs by their sizes."""
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(costs, dtype=float))
    off = x - x.mean()
    exponent = (off @ y) / (off @ off)
    rest = y - y.mean() - exponent * off
    error = math.sqrt((rest @ rest) / (len(x) - 2) / (off @ off)) if len(x) > 2 else None
    return Fit(float(exponent), error, float((y[-1] - y[-2]) / (x[-1] - x[-2])))


def in_words(fit: Fit) -> str:
    """The growth that an exponent within 0.1 of a whole number, or within its error, stands for, or what it lies between."""
    nearest = min(EXPONENTS, key=lambda whole: abs(fit.exponent - whole))
    if fit.error is not None and fit.error > 0.5:
        return "not clear"
    if abs(fit.exponent - nearest) <= max(0.1, fit.error or 0.0):
        return EXPONENTS[nearest]
    if fit.exponent < 0:
        return "falling" if fit.exponent > -1 else "falling faster than in inverse proportion"
    return "sub-linear" if fit.exponent < 1 else "between linear and quadratic" if fit.exponent < 2 else "steeper than quadratic"


@dataclass(frozen=True)
class Axis:
    """One thing that a part's cost depends on. ``cases``: backends' names, size, a scratch folder → what is timed.

    ``shown``: the size that is plotted, where it is not the one that is chosen.
    """

    part: str
    what: str
    sizes: tuple[int, ...]
    cases: Callable[[Sequence[str], int, Path], Cases]
    shown: Callable[[int], float] = float


def boxes_of(side: int) -> float:
    return float(len(default_boxes(side)))


def of_loader(names: Sequence[str], folder: Path, batch: int = 8, side: int = 300, workers: int = 2) -> Cases:
    data = Photographs(folder, 32)
    loaders = {name: data.loader(name, batch, (side, side), workers) for name in names}
    return loader_case(loaders, data, batch, workers).own


def of_opening(names: Sequence[str], images: int, folder: Path) -> Cases:
    """Opening the index, which every backend does alike; it is packed before."""
    file = folder / "annotations.json"
    generate(file, images, 7 * images, lambda line: None, points=4)
    AnnotationIndex.open(file)
    return {"all": lambda: AnnotationIndex.open(file)}


def sized(side: int) -> dict:
    return {**demo_model(), "image_size": (side, side)}


AXES = (
    Axis("loader", "workers", (1, 2, 4), lambda names, n, folder: of_loader(names, folder, workers=n)),
    Axis("loader", "image side", (150, 300, 600, 1200), lambda names, n, folder: of_loader(names, folder, side=n)),
    Axis("loader", "images of the data set (opening its index)", (1_000, 4_000, 16_000, 64_000), of_opening),
    Axis("matcher", "batch", (4, 8, 16, 32, 64), lambda names, n, folder: matcher_case(names, n, 7).own),
    Axis("matcher", "boxes an image", (4, 16, 64, 256), lambda names, n, folder: matcher_case(names, 8, n).own),
    Axis("matcher", "default boxes", SIDES, lambda names, n, folder: matcher_case(names, 8, 7, n).own, boxes_of),
    Axis("loss", "batch", (2, 4, 8, 16), lambda names, n, folder: loss_case(names, n).own),
    Axis("loss", "classes", (11, 21, 41, 81, 161), lambda names, n, folder: loss_case(names, 4, n).own),
    Axis("loss", "default boxes", SIDES, lambda names, n, folder: loss_case(names, 4, side=n).own, boxes_of),
    Axis("decoder", "batch", (1, 2, 4, 8), lambda names, n, folder: decoder_case(names, n).own),
    Axis("decoder", "classes", (11, 21, 41, 81), lambda names, n, folder: decoder_case(names, 2, n).own),
    Axis("decoder", "default boxes", SIDES, lambda names, n, folder: decoder_case(names, 2, side=n).own, boxes_of),
    Axis("evaluator", "images", (25, 50, 100, 200), lambda names, n, folder: evaluator_case(names, n, folder, 100).own),
    Axis("step", "batch", (1, 2, 4, 8), lambda names, n, folder: step_case(names, n, demo_model()).own),
    Axis("step", "image side", (128, 192, 256, 384), lambda names, n, folder: step_case(names, 2, sized(n)).own),
)


def measure(log: Log, names: Sequence[str], parts: Sequence[str], quick: bool = False) -> Iterator[Growth]:
    """Every axis of the parts, one after the other; all sizes and backends of one in the same rounds. Quick: the smallest sizes only."""
    for axis in AXES:
        if axis.part not in parts:
            continue
        sizes = axis.sizes[:QUICK_SIZES] if quick else axis.sizes
        log(f"{axis.part} by {axis.what}: {' '.join(map(str, sizes))}")
        with tempfile.TemporaryDirectory(prefix="ssd-bench-") as scratch:
            cases: dict[tuple[str, int], Callable] = {}
            for size in sizes:
                folder = Path(scratch, str(size))
                folder.mkdir()
                cases |= {(name, size): call for name, call in axis.cases(names, size, folder).items()}
            found = interleaved(cases, QUICK_ROUNDS if quick else ROUNDS, least=LEAST)
        who = dict.fromkeys(name for name, _ in cases)
        seconds = {name: tuple(median(found[name, size]) for size in sizes) for name in who}
        spread = {name: tuple((min(found[name, size]), max(found[name, size])) for size in sizes) for name in who}
        yield Growth(axis.part, axis.what, tuple(map(axis.shown, sizes)), seconds, spread)

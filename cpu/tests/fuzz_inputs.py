"""Inputs for the native modules: each is made from its random numbers, and gives a function to run, which may be run again."""

import atexit
import collections
import functools
import os
import tempfile
from pathlib import Path

import numpy as np
from base.backends.cpu.tests import native  # noqa: F401

# isort: split
from base.backends.cpu import _coco, _decoder, _images, _loss, _matcher
from base.backends.cpu.tests.damaged_jpeg import damaged, files
from base.backends.cpu.tests.odd_values import count_of, numbers, some, twisted

SIZES = [(64, 64), (64, 64), (33, 31), (97, 128), (1, 1), (5, 300), (300, 300)]  # of samples
IOUS, LOW, HIGH = [0.1, 0.3, 0.5, 0.7, 0.9], [0.875, 0.5, 0.5, -0.05], [1.125, 1.5, 1.5, 0.05]


def sample(rng):
    edges = rng.random(4).tolist() if rng.random() < 0.3 else np.sort(rng.random((2, 2)), 0).ravel().tolist()
    edges = some(rng, edges, edges, edges, (0, 0, 1, 1), (0.999, 0.999, 1, 1), (0, 0, 1e-9, 2), (0.5, 0.5, 0.5, 0.5))
    changes = rng.permutation(4).tolist() if rng.random() < 0.7 else rng.integers(0, 4, 4).tolist()
    amounts = rng.uniform(LOW, HIGH).tolist() if rng.random() < 0.8 else rng.choice([-1000, -1, 0, 1e-30, 7, 1000], 4).tolist()
    return _images.Sample(edges, bool(rng.integers(2)), changes, amounts)


def batch_of(rng) -> tuple[np.ndarray, int]:
    return np.full((3, *some(rng, *SIZES), 3), 77, np.uint8), 1


def rendered(batch: np.ndarray, row: int, render) -> tuple:
    """What ``render`` gives, and the picture if it was successful; only its row of the batch may have changed."""
    batch.fill(77)
    status = render()
    assert (np.delete(batch, row, 0) == 77).all(), "pixels of another row were written"
    return status, batch[row].tobytes() if status > 0 else None


def jpeg_file(rng):
    data, (batch, row) = damaged(rng), batch_of(rng)
    drawn, exact = sample(rng) if rng.random() < 0.6 else None, bool(rng.random() < 0.3)
    recorded = some(rng, *[(0, 0)] * 30, (64, 64), (-1, -1), (1, 65535), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (0, 9))
    return lambda: rendered(batch, row, lambda: _images.render_bytes(data, batch, row, drawn, recorded, exact))


def odd_rendering(rng):
    """What is not wrong with the file but with the other arguments."""
    batch, row = batch_of(rng)
    arguments = [files()[rng.integers(len(files()))], batch, row, sample(rng), (0, 0)]
    place = int(rng.integers(5))
    wrong = [("text", None, bytearray(9)), (twisted(rng, batch, 1),), (3, -1, 2**40, None, 1.5), ("sample", 3), ((2**31, 1), (1,), None, ("a", "b"))]
    arguments[place] = some(rng, *wrong[place])
    return lambda: _images.render_bytes(*arguments)


@functools.cache
def folder() -> Path:
    """With all files, and what is no file."""
    place = tempfile.TemporaryDirectory(prefix="fuzz")
    atexit.register(place.cleanup)
    path = Path(place.name)
    for number, content in enumerate(files()):
        (path / f"{number}.jpg").write_bytes(content)
    (path / "empty.jpg").touch()
    (path / "folder.jpg").mkdir()
    os.mkfifo(path / "pipe.jpg")
    return path


def many_files(rng):
    names = [f"{rng.integers(len(files()))}.jpg" if rng.random() < 0.8 else some(rng, "empty.jpg", "folder.jpg", "pipe.jpg", "none.jpg", "0.jpg\0a")]
    names = [os.fsencode(folder() / names[0])] * int(rng.integers(0, 4)) + [os.fsencode(folder() / "0.jpg"), b""]
    batch = np.zeros((len(names), *some(rng, *SIZES), 3), np.uint8)
    arguments = [names, batch, [some(rng, None, sample(rng)) for _ in names], [(0, 0)] * len(names)]
    if rng.random() < 0.4:
        place = int(rng.integers(4))
        few = arguments[place][1:]
        arguments[place] = some(rng, few, None, 3, [None] * len(names), twisted(rng, batch, 1))
    return lambda: (1, _images.render_files(*arguments), batch.tobytes())


def array(rng):
    shape = [int(side) for side in rng.choice([1, 2, 5, 40, 77, 700], 2)]
    pixels, (batch, row) = rng.integers(0, 256, (*shape, 3), dtype=np.uint8), batch_of(rng)
    pixels, drawn = twisted(rng, pixels, 0.3), some(rng, None, sample(rng))
    return lambda: rendered(batch, row, lambda: _images.render_array(pixels, batch, row, drawn))


def odd_sample(rng):
    def values(count):
        return rng.choice([np.nan, np.inf, -np.inf, 1e300, -1e300, -1, 0, 0.5, 1, 2, 1000], some(rng, *[count] * 4, count + 1)).tolist()

    crop, amounts = some(rng, *[[0, 0, 1, 1]] * 2, values(4)), some(rng, *[[1, 1, 1, 0]] * 3, values(4), None)
    order = some(rng, *[[0, 1, 2, 3]] * 6, *[[3, 3, 3, 3]] * 2, [0, 1, 2, 4], [-1, 0, 1, 2], [2**31, 0, 0, 0], [0], "abcd")
    (batch, row), data = batch_of(rng), files()[rng.integers(len(files()))]

    def run():
        made = _images.Sample(crop, False, order, amounts)
        return made.crop, made.boxes.shape, made.kept.tolist(), rendered(batch, row, lambda: _images.render_bytes(data, batch, row, made))

    return run


def draws(rng):
    count, key = int(some(rng, 0, 1, 2, 8, 8, 3000)), int(rng.integers(2**32))
    edges = np.sort(rng.random((count, 2, 2)), 1).reshape(count, 4).astype(np.float32)
    boxes = some(rng, edges, edges, numbers(rng, (count, 4), odd=1), edges[:, ::-1], edges * np.float32(1e30), edges.astype(float) * 1e300, edges - 5)
    boxes, tries = twisted(rng, boxes, 0.1), some(rng, 1, 1, 3, 50, 0, -1, 2**40)
    ious = some(rng, IOUS, IOUS, IOUS, [], [np.nan] * 3, [-np.inf, np.inf], [0.0] * 1000)
    make = some(rng, np.random.PCG64, np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)

    def run():
        generator = np.random.Generator(make(key))
        drawn = _images.draw(generator, boxes, tries, _images.Rules(ious, 0.5, LOW, HIGH))
        return drawn.crop, drawn.kept.tobytes(), drawn.boxes.tobytes(), drawn.order, drawn.amounts, generator.random()

    return run


def no_generator(rng):
    generator = some(rng, None, np.random, np.random.RandomState(0), "generator", np.random.PCG64(1), collections.namedtuple("A", "bit_generator")(3))
    return lambda: _images.draw(generator, np.zeros((1, 4), np.float32), 1, _images.Rules(IOUS, 0.5, LOW, HIGH))


def default_arrays(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = int(some(rng, 1, 7, 31, 32, 33, 100, 600))
    xywh = np.concatenate([rng.random((count, 2)), rng.uniform(0.01, 1, (count, 2))], 1).astype(np.float32)
    ltrb = np.concatenate([xywh[:, :2] - xywh[:, 2:] / 2, xywh[:, :2] + xywh[:, 2:] / 2], 1)
    return xywh, ltrb, rng.permutation(count).astype(np.int64)


def matching(rng):
    xywh, ltrb, order = default_arrays(rng)
    count, images, most = len(order), int(some(rng, 1, 2, 5, 0)), int(some(rng, 0, 1, 3, 40))
    if rng.random() < 0.15:
        xywh, ltrb = numbers(rng, xywh.shape, odd=1), some(rng, ltrb, numbers(rng, ltrb.shape, odd=1))
        order = some(rng, order, numbers(rng, order.shape, np.int64))
    fields = [twisted(rng, field, 0.04) for field in (xywh, ltrb, order)]
    boxes, labels = numbers(rng, (images, most, 4)), numbers(rng, (images, most), np.int64)
    if rng.random() < 0.5:
        boxes = np.sort(boxes.reshape(images, most, 2, 2), 2).reshape(boxes.shape)
    boxes, labels = twisted(rng, boxes), twisted(rng, labels)
    offsets, classes = twisted(rng, np.zeros((images, count, 4), np.float32)), twisted(rng, np.zeros((images, count), np.int64))
    threads = count_of(rng)

    def run():
        for result in (offsets, classes):
            clear(result)
        _matcher.match(_matcher.Defaults(*fields), boxes, labels, offsets, classes, threads)
        return offsets.tobytes(), classes.tobytes()

    return run


def clear(result) -> None:
    if isinstance(result, np.ndarray) and result.flags.writeable:
        result.fill(0)


def logits_of(rng, images: int, count: int, classes: int) -> np.ndarray:
    logits = numbers(rng, (images, count, classes + 3))
    if rng.random() < 0.4:
        logits = (logits.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    if rng.random() < 0.3:
        return logits[..., 2:-1]  # rows with something between them
    return np.ascontiguousarray(logits[..., :classes])


def decoding(rng):
    xywh, *_ = default_arrays(rng)
    images, classes = int(some(rng, 1, 2, 5, 0)), int(some(rng, 1, 2, 3, 5, 16, 17, 81, 0))
    offsets, logits = twisted(rng, numbers(rng, (images, len(xywh), 4))), twisted(rng, logits_of(rng, images, len(xywh), classes))
    limits = [*[(0.05, 0.5, 200)] * 4, (0.0, 0.0, 0), (-1.0, 2.0, 10**6), (np.nan, 0.5, 1), (0.5, np.inf, 5), (1e300, 0.5, -1), (0.05, 0.5, 2**31)]
    limits = some(rng, *limits)
    xywh, threads = twisted(rng, xywh), count_of(rng)

    def run():
        return [[part.tobytes() for part in image] for image in _decoder.decode(offsets, logits, xywh, *limits, threads)]

    return run


def losses(rng):
    images, count, classes = int(some(rng, 1, 2, 5, 0)), int(some(rng, 1, 7, 100, 600, 0)), int(some(rng, 1, 2, 5, 16, 17, 81, 0))
    offsets, logits = numbers(rng, (images, count, 4)), logits_of(rng, images, count, classes)
    wanted, labels = numbers(rng, (images, count, 4)), rng.integers(0, max(classes, 1), (images, count)) * (rng.random((images, count)) < 0.1)
    if rng.random() < 0.1:
        labels = numbers(rng, labels.shape, np.int64, odd=1)
    offsets, logits, wanted, labels = (twisted(rng, given, 0.03) for given in (offsets, logits, wanted, labels))
    chosen, positives = twisted(rng, np.zeros((images, count), np.uint8), 0.03), twisted(rng, np.zeros(images, np.float32), 0.03)
    to_offsets, to_logits = np.zeros((images, count, 4), np.float32), np.zeros((images, count, classes), getattr(logits, "dtype", np.float32))
    to_offsets, to_logits = twisted(rng, to_offsets, 0.05), twisted(rng, to_logits, 0.05)
    scale, threads = some(rng, 1.0, 1e-3, np.nan, np.inf), count_of(rng)
    lies = rng.random() < 0.1
    mask, share = rng.integers(0, 2, (images, count)).astype(np.uint8), numbers(rng, images)  # as no forward pass fills them

    def run():
        for result in (chosen, positives, to_offsets, to_logits):
            clear(result)
        loss = _loss.forward(offsets, logits, wanted, labels, chosen, positives, threads)
        kept = (mask, share) if lies else (chosen, positives)
        _loss.backward(offsets, logits, wanted, labels, *kept, scale, to_offsets, to_logits, threads)
        return repr(loss), to_offsets.tobytes(), to_logits.tobytes()

    return run


def partition(rng, parts: int, total: int) -> np.ndarray:
    return np.concatenate([[0], np.sort(rng.integers(0, total + 1, max(parts - 1, 0))), [total]]).astype(np.int64)[: parts + 1]


def figures(rng):
    images, categories, real, found = int(some(rng, 1, 2, 7, 70)), int(some(rng, 1, 2, 9, 0)), int(rng.integers(0, 200)), int(some(rng, 0, 3, 300))
    labels = [rng.integers(1, categories + 1, count) if categories else np.zeros(count, np.int64) for count in (real, found)]
    first, boxes, crowd, areas = partition(rng, images, real), numbers(rng, (real, 4), float), rng.random(real) < 0.1, numbers(rng, real, float)
    inside = int(rng.integers(1, images + 1))
    part = [rng.permutation(images)[:inside], numbers(rng, (inside, 2), float), partition(rng, inside, found)]
    part += [numbers(rng, (found, 4), float), labels[1], numbers(rng, found, float)]
    if rng.random() < 0.2:
        wrong = int(some(rng, 0, 2, 4))
        part[wrong] = numbers(rng, part[wrong].shape, np.int64, odd=1)
    if rng.random() < 0.1:
        first = numbers(rng, first.shape, np.int64, odd=1)
    truth = [twisted(rng, field, 0.03) for field in (first, boxes, labels[0], crowd, areas)]
    parts = [tuple(twisted(rng, field, 0.03) for field in part)] * int(some(rng, 1, 1, 1, 0, 2))
    thresholds = some(rng, *[np.linspace(0.5, 0.95, 10)] * 5, np.zeros(10), np.full(10, np.nan), np.full(10, np.inf), np.zeros(9))
    recalls, threads = some(rng, *[np.linspace(0, 1, 101)] * 5, np.zeros(0), numbers(rng, 5, float, odd=1)), count_of(rng)
    categories = some(rng, *[categories] * 12, -1, 2**62)

    def run():
        return [result.tobytes() for result in _coco.figures(*truth, categories, parts, thresholds, recalls, threads)]

    return run


KINDS = [*[jpeg_file] * 12, odd_rendering, many_files, array, odd_sample, no_generator, *2 * [draws, matching, decoding, losses, figures]]


def made(seed: int, number: int):
    """(kind, function to run) of an input."""
    rng = np.random.default_rng([seed, number])
    kind = KINDS[rng.integers(len(KINDS))]
    return kind.__name__, kind(rng)

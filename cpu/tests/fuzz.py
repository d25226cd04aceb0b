"""Damaged files and absurd arguments for the native modules: each must end in a result or in an exception of Python's.

``python -m base.backends.cpu.tests.fuzz --seed 0 --count 400 --rounds 3`` makes 400 inputs, which are always the same, and
runs all of them three times, in another order each time; in the first round each in a thread of its own, whose working memory
is new, so that a sanitizer knows where it ends. It fails if an input takes too long, gives something else in another
round (what came before it must not matter), writes beside its place in the batch, or if the process grows from round to round.
The last line says what happened; before each input its number is printed, and ``--only NUMBER`` runs that one alone.
"""

import argparse
import atexit
import collections
import faulthandler
import functools
import hashlib
import io
import json
import os
import struct
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from base.backends.cpu.tests import native  # noqa: F401
from PIL import Image

# isort: split
from base.backends.cpu import _coco, _decoder, _images, _loss, _matcher

SECONDS = 5  # of the processor, that an input may take; with sanitizers it takes longer
HANGS = 60  # seconds after which an input is taken to run for ever, as a busy machine may stand still for a while
GROWTH = 16  # MB between the second round and the last
SIZES = [(64, 64), (64, 64), (33, 31), (97, 128), (1, 1), (5, 300), (300, 300)]  # of samples
IOUS, LOW, HIGH = [0.1, 0.3, 0.5, 0.7, 0.9], [0.875, 0.5, 0.5, -0.05], [1.125, 1.5, 1.5, 0.05]
EXTREMES = (0, 1, 2, 7, 8, 127, 128, 254, 255)
LENGTHS = (0, 1, 2, 3, 16, 17, 255, 256, 4096, 65500, 65535)


# JPEG files, and what is done to them


@functools.cache
def files() -> list[bytes]:
    """JPEG files of many kinds, 16 to 200 pixels a side."""
    made, rng = [], np.random.default_rng(0)
    exif, turned = Image.Exif(), Image.Exif()
    exif[0x010F], turned[0x0112] = "maker", 1
    kinds = [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")] + [{"subsampling": "4:2:0", "optimize": True}, {"quality": 100}]
    others = [{"progressive": True}, {"restart_marker_blocks": 2}, {"exif": exif}, {"exif": turned}, {"keep_rgb": True}]
    grey = [("L", {}), ("L", {}), ("L", {"optimize": True}), ("L", {"progressive": True})]
    for mode, options in [*(("RGB", kind) for kind in 2 * kinds + others), *grey, ("CMYK", {})]:
        width, height = (int(side) for side in rng.choice([16, 17, 33, 60, 121, 200], 2))
        coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)).resize((width, height))
        buffer = io.BytesIO()
        coarse.convert(mode).save(buffer, "JPEG", **{"quality": int(rng.integers(30, 96)), **options})
        made.append(buffer.getvalue())
    return made


def pieces(data: bytes) -> list[bytes]:
    """The start, the marker segments, and all from the first scan's data on, of what may be damaged already."""
    found, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append(data[at:end])
        scan, at = data[at + 1] == 0xDA, end
        if scan:
            break
    return [*found, data[at:]]


def cut(rng, data):
    kept = data[: int(rng.integers(0, len(data) + 1))]
    return kept + b"\xff\xd9" if rng.random() < 0.7 else kept


def flip_bits(rng, data):
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 20))):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return bytes(content)


def damage_scan(rng, data):
    *head, scan = pieces(data)
    if len(scan) < 3:
        return data
    content = bytearray(scan)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(content)))
        if rng.random() < 0.4:  # a marker, or a stuffed byte
            content[at : at + 2] = bytes([0xFF, int(rng.choice([0, 1, 0xC4, 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xFE, 0xFF]))])
        else:
            content[at] = int(rng.choice(EXTREMES))
    return b"".join(head) + bytes(content[:-2]) + b"\xff\xd9"


def overwrite(rng, data):
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    return data[:at] + rng.bytes(length) + data[at + length :]


def rearrange(rng, data):
    """Segments twice, left out, or in another's place; also those of another file."""
    parts = pieces(data)
    if len(parts) < 4:
        return data
    one, other = (int(number) for number in rng.integers(1, len(parts), 2))
    match rng.integers(4):
        case 0:
            parts.insert(other, parts[one])
        case 1:
            del parts[one]
        case 2:
            parts[one], parts[other] = parts[other], parts[one]
        case 3:
            strange = pieces(files()[rng.integers(len(files()))])
            parts[one] = strange[min(one, len(strange) - 1)]
    return b"".join(parts)


def segment_of(rng, parts, markers) -> int | None:
    """The place of some segment with one of the markers."""
    found = [number for number, part in enumerate(parts[1:-1], 1) if part[1] in markers and len(part) > 5]
    return int(rng.choice(found)) if found else None


def extreme_header(rng, data):
    """A length, or a number within a segment that says how long something is, as small or large as can be."""
    parts = pieces(data)
    if (number := segment_of(rng, parts, (0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1))) is None:
        return data
    segment = bytearray(parts[number])
    if rng.random() < 0.3:
        segment[2:4] = int(rng.choice(LENGTHS)).to_bytes(2, "big")
    else:
        segment[int(rng.integers(4, min(len(segment), 24)))] = int(rng.choice(EXTREMES))
    parts[number] = bytes(segment)
    return b"".join(parts)


def short_segment(rng, data):
    """A segment whose content ends before it should, as its length says too; with the file's end behind it, or as before."""
    parts = pieces(data)
    if (number := segment_of(rng, parts, range(0xC0, 0xFF))) is None:
        return data
    content = bytearray(parts[number][4 : 4 + int(rng.integers(0, min(len(parts[number]) - 3, 60)))])
    if content and rng.random() < 0.5:
        content[rng.integers(len(content))] = int(rng.choice(EXTREMES))
    parts[number] = parts[number][:2] + (len(content) + 2).to_bytes(2, "big") + content
    return b"".join(parts[: number + 1]) + b"\xff\xd9" if rng.random() < 0.6 else b"".join(parts)


def dimensions(rng, data):
    parts = pieces(data)
    if (number := segment_of(rng, parts, (0xC0, 0xC1, 0xC2))) is None:
        return data
    sides = [int(rng.choice(LENGTHS)) if rng.random() < 0.7 else int(rng.integers(1, 300)) for _ in range(2)]
    parts[number] = parts[number][:5] + b"".join(side.to_bytes(2, "big") for side in sides) + parts[number][9:]
    return b"".join(parts)


def huffman_tables(rng, data):
    """A table whose segment is whole and whose codes are others, possible or not."""
    parts = pieces(data)
    if (number := segment_of(rng, parts, (0xC4,))) is None or len(parts[number]) < 21:
        return data
    counts, symbols = list(parts[number][5:21]), list(parts[number][21:])
    match rng.integers(6):
        case 0:  # a code longer or shorter
            one, other = (int(place) for place in rng.integers(0, 16, 2))
            moved = min(counts[one], int(rng.integers(1, 9)))
            counts[one], counts[other] = counts[one] - moved, min(counts[other] + moved, 255)
        case 1:
            symbols = rng.permutation(symbols).tolist()
        case 2:
            symbols = rng.integers(0, 256, len(symbols)).tolist()
        case 3:  # long codes only
            counts, symbols = [0] * 15 + [255], rng.integers(0, 256, 255).tolist()
        case 4:  # all codes that there can be
            counts, room, symbols = [], 1, []
            for length in range(16):
                room = 2 * room
                counts.append(int(rng.integers(0, min(room, 255 - sum(counts)) + 1)) if rng.random() < 0.5 or length == 15 else 0)
                room -= counts[-1]
            symbols = rng.integers(0, 256, sum(counts)).tolist()
        case 5:
            counts = rng.choice(EXTREMES, 16).tolist()
            symbols = rng.integers(0, 256, min(sum(counts), 2000)).tolist()
    content = bytes([parts[number][4], *counts, *symbols])
    parts[number] = b"\xff\xc4" + (len(content) + 2).to_bytes(2, "big") + content
    return b"".join(parts)


def exif_segment(rng, data):
    """EXIF data whose numbers of entries, places and types may be any."""
    order, entries = some(rng, "<", ">"), int(rng.integers(0, 4))
    place, count = some(rng, 8, 8, 8, 0, 9, 8 + 12 * entries, 2**31, 2**32 - 1), some(rng, entries, entries, entries + 1, 255, 65535)
    content = b"Exif\0\0" + (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, place, count)
    for _ in range(entries):
        tag, kind, number, value = some(rng, 0x0112, 0x010F, 0), some(rng, 3, 3, 2, 0), some(rng, 1, 1, 2**32 - 1), some(rng, 1, 1, 3, 65535)
        content += struct.pack(f"{order}HHIHH", tag, kind, number, value, 0)
    content = content[: some(rng, None, None, -1, 13, 15)] + some(rng, b"", b"", b"http://ns.adobe.com/xap/1.0/\0 Orientation")
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


def tail(rng, data):
    return data + rng.bytes(int(rng.integers(1, 200))) + (b"\xff\xd9" if rng.random() < 0.7 else b"")


DAMAGES = [cut, flip_bits, overwrite, rearrange, extreme_header, short_segment, dimensions, exif_segment, tail, *2 * [damage_scan, huffman_tables]]


def damaged(rng) -> bytes:
    data = files()[rng.integers(len(files()))]
    for _ in range(int(some(rng, 0, 1, 1, 1, 2, 3))):
        data = DAMAGES[rng.integers(len(DAMAGES))](rng, data) or data
    return data


# Arguments


def some(rng, *choices):
    return choices[rng.integers(len(choices))]


def numbers(rng, shape, dtype=np.float32, odd: float = 0.3) -> np.ndarray:
    """Numbers of which some are as they should not be."""
    with np.errstate(all="ignore"):
        if np.issubdtype(dtype, np.integer):
            info = np.iinfo(dtype)
            values, strange = rng.integers(0, 5, shape), [info.min, info.max, -1, 0, 6, 100]
        else:
            values, strange = rng.normal(0.5, 1, shape), [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0, 1e300, 88.0, -104.0]
        values = np.asarray(values)
        if rng.random() < odd:
            strange = np.array(strange, dtype if np.issubdtype(dtype, np.integer) else float)[rng.integers(0, len(strange), shape)]
            values = np.where(rng.random(shape) < rng.choice([0.05, 0.5, 1]), strange, values)
        return np.ascontiguousarray(values.astype(dtype))


def twisted(rng, array: np.ndarray, chance: float = 0.06):
    """The array or, now and then, another shape, layout, type, or no array at all."""
    if rng.random() >= chance:
        return array
    axis = int(rng.integers(max(array.ndim, 1)))
    return some(
        rng,
        lambda: array[..., ::-1] if array.ndim else array,
        lambda: np.repeat(array, 2, -1)[..., ::2] if array.ndim else array,
        lambda: np.asfortranarray(array),
        lambda: array[:0],
        lambda: array[None],
        lambda: array.ravel(),
        lambda: array.ravel()[:1].reshape(()) if array.size else array,
        lambda: np.take(array, range(array.shape[axis] // 2), axis),
        lambda: np.concatenate([array, array], axis),
        lambda: np.broadcast_to(array[:1], array.shape) if len(array) else array,
        lambda: array.astype(some(rng, np.float64, np.int32, np.int16, np.uint8, np.complex64, ">f4", object)),
        lambda: read_only(array),
        lambda: array.tolist(),
        lambda: None,
    )()


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def count_of(rng) -> int:
    return some(rng, 1, 1, 2, 2, 4, 0, -1, 1000)


# Inputs: each is made from its random numbers, and gives a function to run, which may be run again


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


def outcome(run) -> tuple[str, str]:
    """What happened in a word, and all of it in short."""
    try:
        result = run()
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, type(error).__name__  # of several threads' errors any may be the first
    status = result[0] if isinstance(result, tuple) and isinstance(result[0], int) else 1
    return "read" if status > 0 else "left", hashlib.sha256(repr(result).encode()).hexdigest()


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def resident() -> float:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", type=int, help="a single input")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, that an input may take")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # NumPy's, of odd numbers
    faulthandler.enable()
    which = np.arange(options.count) if options.only is None else np.array([options.only])
    first, happened, memory = {}, collections.Counter(), []
    for turn in range(options.rounds):
        for number in np.random.default_rng([options.seed, turn]).permutation(which).tolist():
            kind, run = made(options.seed, number)
            print(f"round {turn}, input {number}: {kind}", flush=True)
            faulthandler.dump_traceback_later(HANGS + options.seconds, exit=True)
            began = time.process_time()
            word, found = outcome(run) if turn else in_a_thread(lambda run=run: outcome(run))
            faulthandler.cancel_dump_traceback_later()
            if (took := time.process_time() - began) > options.seconds:
                print(f"input {number} of seed {options.seed} took {took:.1f} s")
                return 1
            if options.only is not None:
                print(word, found)
            happened[f"{kind}: {word}"] += turn == 0
            if first.setdefault(number, found) != found:
                print(f"input {number} of seed {options.seed} gave {found} after it had given {first[number]}")
                return 1
        memory.append(round(resident(), 1))
    report = {"native": str(Path(_images.__file__).parent), "happened": dict(sorted(happened.items())), "memory": memory}
    print(json.dumps(report))
    if len(memory) > 2 and memory[-1] - memory[1] > GROWTH:
        print(f"grew from {memory[1]} to {memory[-1]} MB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

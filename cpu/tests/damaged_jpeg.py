"""JPEG files of many kinds, and what is done to them; for fuzz.py."""

import functools
import io
import struct

import numpy as np
from base.backends.cpu.tests.odd_values import some
from PIL import Image

EXTREMES = (0, 1, 2, 7, 8, 127, 128, 254, 255)
LENGTHS = (0, 1, 2, 3, 16, 17, 255, 256, 4096, 65500, 65535)


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

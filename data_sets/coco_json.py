"""Reading a COCO annotation file of unknown quality: every entry is checked, and nothing is dropped silently.

What is done with an entry that is not as it should be (``report`` counts every row, with examples):

| entry | what is done | why |
| --- | --- | --- |
| file empty, cut short, not JSON, or without the lists images, annotations, categories | error | nothing in it can be trusted |
| id that is not an integer (or not below 2^62), entry that is not an object | error | boxes could land on the wrong image |
| category id twice | error | the class of its boxes is ambiguous |
| category without a name | mended: ``category <id>`` | only shown to people |
| file name that is absolute, contains ``..`` or NUL, or is no valid text | error | it could read outside the image folder |
| image without a file name | dropped with its boxes | it cannot be read |
| image whose width or height is missing, not an integer, or <= 0 | dropped with its boxes | its boxes have no scale |
| image id twice, same file name and size | the first is kept | nothing is lost |
| image id twice, file name or size differ | error | boxes could land on the wrong image |
| no image left | error | nothing to train on or evaluate |
| annotation of an unknown image or category | dropped | it has no pixels, or no class |
| box that is not four finite numbers, or whose width or height is <= 0 | dropped | no detection can match it |
| box wholly outside the recorded image | dropped | no detection can match it |
| box more than 0.5 px outside the recorded image | mended: clipped | a detector only sees the part inside |
| box up to 0.5 px outside (COCO has them) | kept as recorded, clamped in ``ltrb`` | the COCO figures stay exact |
| box thinner than 32-bit floats in [0, 1] resolve | dropped | its offsets would be infinite |
| iscrowd that is neither 0 nor 1 (missing counts as 0) | dropped | its part in the COCO figures is ambiguous |
| area missing, not finite, or negative | mended: width × height | only sorts boxes into small, medium, large |
| annotation id twice, same content | the first is kept | nothing is lost |
| annotation id twice (content differs), or missing | mended: a fresh id | the COCO figures need distinct ids |

Excess below one millionth of the image's side is rounding and is not counted. Crowd boxes are kept and flagged.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from base.errors import UserError
from data_sets.layout import GET_DATA

EXAMPLES = 10  # kept per row of the report
ID_LIMIT = 2**62  # leaves room within int64 for fresh ids and for marking missing ones


def stamp_of(file: Path) -> dict:
    """What of a file changes when it is edited: its size and times."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read ({error.strerror}); {GET_DATA}") from error
    # The change time notices what a tool that restores the modification time hides.
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns, "changed_ns": status.st_ctime_ns}


def digest(file: Path) -> str:
    """SHA-256 of a file's content."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def ltrb_of(boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Pixel boxes (n, 4) of images of a size (2,) or sizes (n, 2) (height, width) as float32 ltrb in [0, 1]."""
    scale = size[..., [1, 0, 1, 0]].astype(np.float64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / scale
    return np.clip(corners, 0, 1).astype(np.float32)


def _read(file: Path) -> tuple[dict, str]:
    def without_segmentation(entry: dict) -> dict:
        entry.pop("segmentation", None)  # most of the file: freed while parsing, so that the parse needs a fraction of the memory
        return entry

    try:
        content = file.read_bytes()
        data = json.loads(content, object_hook=without_segmentation) if content.strip() else None
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read ({error.strerror}); {GET_DATA}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not Unicode, a number of absurd length, absurd nesting
        raise UserError(f"annotation file {file} ({len(content)} bytes) is not valid JSON: {error}; if cut short, {GET_DATA}") from error
    if data is None:
        raise UserError(f"annotation file {file} is empty ({len(content)} bytes); {GET_DATA}")
    for name in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise UserError(f"annotation file {file} has no list {name!r} at its top: it is not in COCO's detection layout; {GET_DATA}")
        for position, entry in enumerate(data[name]):
            if not isinstance(entry, dict):
                raise UserError(f"{file}: {name}[{position}] is {_short(entry)}, not an object; correct the file")
    return data, hashlib.sha256(content).hexdigest()


def _short(value: object) -> str:
    return json.dumps(value)[:160]


def _id(value: object, what: str, position: int, file: Path) -> int:
    if type(value) is not int or abs(value) >= ID_LIMIT:
        raise UserError(f"{file}: {what} of entry {position} is {_short(value)}; ids must be integers below 2^62: renumber them")
    return value


def _number(value: object) -> float:
    """The value as a finite float, or NaN."""
    return float(value) if type(value) in (int, float) and -1e300 < value < 1e300 else math.nan


def add(report: dict, kind: str, reason: str, count: int, examples: list[str]) -> None:
    """Counts cases of a row of ``report``; ``kind`` is dropped or mended."""
    row = report[kind].setdefault(reason, {"count": 0, "examples": []})
    row["count"] += count
    row["examples"] += examples[: EXAMPLES - len(row["examples"])]


def _categories(data: dict, file: Path, report: dict) -> dict[int, str]:
    names = {}
    for position, entry in enumerate(data["categories"]):
        key, name = _id(entry.get("id"), "category id", position, file), entry.get("name")
        if key in names:
            raise UserError(f"{file}: category id {key} stands twice ({names[key]!r}, {_short(name)}); give each category its own id")
        if not isinstance(name, str) or not name.strip():
            name = f"category {key}"
            add(report, "mended", "category without a name", 1, [name])
        names[key] = name
    if not names:
        raise UserError(f"{file}: the list of categories is empty; add the classes")
    return dict(sorted(names.items()))


def _images(data: dict, file: Path, report: dict) -> tuple[dict[int, tuple[str, int, int]], set[int]]:
    """Images kept, by ascending id: (file name, height, width); and the ids of those dropped."""
    kept, dropped = {}, set()
    for position, entry in enumerate(data["images"]):
        key = _id(entry.get("id"), "image id", position, file)
        name, *sides = image = (entry.get("file_name"), entry.get("height"), entry.get("width"))
        parts = name.replace("\\", "/").split("/") if isinstance(name, str) and name else None
        if parts and (not parts[0] or parts[0][1:2] == ":" or ".." in parts or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in name)):
            raise UserError(f"{file}: file name {_short(name)} of image {key} leaves the image folder or is no valid text; correct it")
        if not parts or not all(type(side) is int and 0 < side < 2**31 for side in sides):
            reason = "image without a valid width and height" if parts else "image without a file name"
            add(report, "dropped", reason, 1, [f"image {key}: file name {_short(name)}, height and width {_short(sides)}"])
            dropped.add(key)
        elif kept.setdefault(key, image) is not image:
            if kept[key] != image:
                raise UserError(f"{file}: image id {key} is both {kept[key]} and {image}; give each image its own id")
            add(report, "dropped", "image id twice, same file name and size", 1, [f"image {key}"])
    if not kept:
        reasons = {reason: row["count"] for reason, row in report["dropped"].items()}
        raise UserError(f"{file}: of {len(data['images'])} images none is left (dropped: {reasons}); correct the list of images")
    return dict(sorted(kept.items())), dropped - kept.keys()


def parse(file: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read and check a COCO annotation file: the arrays of AnnotationIndex, and the head stored with them."""
    stamp = stamp_of(file)  # before reading: a change meanwhile then shows at the next opening
    data, sha256 = _read(file)
    arrays, head = checked(data, file, {"dropped": {}, "mended": {}})
    return arrays, {"stamp": stamp, "sha256": sha256, **head}


def checked(data: dict, file: Path, report: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The table above on a COCO dictionary: the arrays of AnnotationIndex, and the names and report of its head.

    ``report``: what was dropped and mended before. Raises UserError, naming ``file``.
    """
    report = {**{name: len(data[name]) for name in ("images", "annotations", "categories")}, **report}
    categories = _categories(data, file, report)
    images, dropped_images = _images(data, file, report)
    image_of = {**dict.fromkeys(dropped_images, -2), **{key: position for position, key in enumerate(images)}}
    label_of = {key: label for label, key in enumerate(categories, 1)}

    entries, rows, numbers = data["annotations"], [], []
    for position, entry in enumerate(entries):
        key, image, category = (
            None if (value := entry.get(field)) is None else _id(value, f"annotation {field}", position, file)
            for field in ("id", "image_id", "category_id")
        )
        key = -ID_LIMIT - position if key is None else key
        crowd, box = entry.get("iscrowd", 0), entry.get("bbox")
        crowd = int(crowd) if type(crowd) in (int, bool) and crowd in (0, 1) else -1
        rows.append((key, image_of.get(image, -1), label_of.get(category, 0), crowd))
        box = box if isinstance(box, list) and len(box) == 4 else [None] * 4
        numbers.append([_number(value) for value in (*box, entry.get("area"))])
    ids, image, label, crowd = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    numbers = np.array(numbers, dtype=np.float64).reshape(-1, 5)
    boxes, areas, keep = numbers[:, :4], numbers[:, 4], np.ones(len(rows), dtype=bool)
    sizes = np.array([entry[1:] for entry in images.values()], dtype=np.int64)
    sizes_of = sizes[np.maximum(image, 0)]  # rows without an image are dropped before it matters
    sides = sizes_of[:, ::-1]  # (B, 2) width, height

    def count(kind: str, reason: str, which: np.ndarray) -> None:
        if which.any():
            add(report, kind, reason, int(which.sum()), [_short(entries[i]) for i in np.flatnonzero(which)[:EXAMPLES]])

    def drop(reason: str, which: np.ndarray) -> None:
        count("dropped", reason, which & keep)
        keep[which] = False

    drop("annotation of a dropped image", image == -2)
    drop("annotation of an unknown image", image == -1)
    drop("annotation of an unknown category", label == 0)
    drop("iscrowd is neither 0 nor 1", crowd < 0)
    drop("box is not four finite numbers", ~np.isfinite(boxes).all(axis=1))
    drop("box width or height <= 0", (boxes[:, 2:] <= 0).any(axis=1))
    near, far = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    drop("box wholly outside the image", ((near >= sides) | (far <= 0)).any(axis=1))
    thin = ltrb_of(boxes, sizes_of)
    drop("box thinner than 32-bit floats resolve", (thin[:, :2] >= thin[:, 2:]).any(axis=1))

    excess = np.maximum(-near, far - sides)
    clip, slight = (excess > 0.5).any(axis=1) & keep, (excess > 1e-6 * sides).any(axis=1) & keep
    count("mended", "box more than 0.5 px outside the image: clipped", clip)
    count("mended", "box up to 0.5 px outside the image: kept for the COCO figures, clamped for training", slight & ~clip)
    near = np.maximum(near[clip], 0)
    boxes[clip] = np.concatenate([near, np.minimum(far[clip], sides[clip]) - near], axis=1)
    no_area = ~(areas >= 0) & keep
    count("mended", "area missing, not finite or negative: width x height taken", no_area)
    areas[no_area] = boxes[no_area, 2] * boxes[no_area, 3]

    kept = np.flatnonzero(keep)
    _, first, place = np.unique(ids[kept], return_index=True, return_inverse=True)
    first_of = np.arange(len(ids))
    first_of[kept] = kept[first[place]]
    content = np.column_stack([image, label, crowd, numbers])
    repeated = first_of != np.arange(len(ids))
    drop("annotation id twice, same content", repeated & (content == content[first_of]).all(axis=1))
    fresh = (repeated | (ids <= -ID_LIMIT)) & keep
    count("mended", "annotation id twice or missing: a fresh id given", fresh)
    ids[fresh] = ids[keep].max(initial=0) + 1 + np.arange(fresh.sum())

    order = np.flatnonzero(keep)[np.argsort(image[keep], kind="stable")]  # stable: within an image the JSON's order stays
    names = [entry[0].encode() for entry in images.values()]
    arrays = {
        "image_ids": np.array(list(images), dtype=np.int64),
        "sizes": sizes,
        "file_names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "first_byte": np.cumsum([0, *map(len, names)], dtype=np.int64),
        "first_box": np.cumsum([0, *np.bincount(image[order], minlength=len(images))], dtype=np.int64),
        "boxes": boxes[order],
        "labels": label[order],
        "crowd": crowd[order] == 1,
        "areas": areas[order],
        "box_ids": ids[order],
        "category_ids": np.array(list(categories), dtype=np.int64),
    }
    return arrays, {"names": list(categories.values()), "report": report}

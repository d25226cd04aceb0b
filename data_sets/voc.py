"""Reading a list of Pascal VOC (``ImageSets/Main/train.txt``) with the XMLs of its images, as `data_sets.coco_json` reads a JSON.

Each line names an image: ``Annotations/<name>.xml`` holds its size and objects, ``JPEGImages/<name>.jpg`` (or .png, …) its pixels. Boxes
are in pixels that are counted from 1, the last one included (VOC's development kit: the top-left pixel is (1, 1), and VOCevaldet.m takes
xmax - xmin + 1 for a width): x is xmin - 1. Classes are VOC's 20 if the XMLs of the folder name no others, else all their names sorted; so
all lists of a folder agree. Image ids do not depend on the list: the number in a name such as 000005 or 2008_000008, else a hash of it.

What is done with what is not as it should be, beyond the table of `data_sets.coco_json` that objects go through as annotations:

| entry | what is done | why |
| --- | --- | --- |
| list empty or not text, folder Annotations missing | error | nothing can be read |
| two names with the same number, such as 5 and 005 | error | boxes could land on the wrong image |
| XML with a DOCTYPE, or larger than 8 MiB | error | no tool writes one; entities may grow without bounds or read other files |
| XML of a listed image missing | dropped | its boxes are not known, nor that it has none |
| XML of a listed image not well-formed, or not an ``annotation`` | dropped | its boxes are not known |
| name in the list twice | the first is kept | nothing is lost |
| several image files of one name (a.jpg, a.png) | error | boxes could land on the wrong image |
| <filename> and <folder> of the XML | not read | files are renamed more often than that is mended |
| size missing or odd | dropped with its boxes | its boxes have no scale |
| object without a name or with two | dropped | it has no class |
| object without a box, with two, reversed, outside | dropped or clipped as in JSON | no detection can match it |
| difficult | ``iscrowd``: trained on, neither hit nor miss in evaluation | VOC's evaluation leaves them out of both |
| difficult that is neither 0 nor 1 (missing counts as 0) | dropped | its part in the figures is ambiguous |
"""

import hashlib
import math
import os
import re
from collections import Counter
from pathlib import Path
from xml.parsers import expat

import numpy as np

from base.errors import UserError
from data_sets.coco_json import add, checked

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of files that are images, in either case
LARGEST_XML = 8 << 20  # bytes
NUMBER = re.compile(r"\d{1,15}|\d{4}_\d{6}", re.ASCII)
BOX = tuple(f"annotation/object/bndbox/{side}" for side in ("xmin", "ymin", "xmax", "ymax"))
ONCE = {"annotation/size/width", "annotation/size/height"}
OBJECT = {"annotation/object/name", "annotation/object/difficult", *BOX}


class NotAnnotations(ValueError):
    """An XML that is not well-formed, or holds something else."""


def _folder(names: Path) -> Path:
    """The folder of Annotations/, JPEGImages/ and ImageSets/Main/, of a list in the last."""
    folder = names.absolute().parents[2] if len(names.absolute().parents) > 2 else names.parent
    if not (folder / "Annotations").is_dir():
        raise UserError(f"{names} is no list of Pascal VOC: it must lie in ImageSets/Main beside Annotations/, and there is no {folder}/Annotations")
    return folder


def _files(names: Path) -> dict[str, os.stat_result]:
    """The XMLs of the list's folder: name without ending → state, sorted."""
    with os.scandir(_folder(names) / "Annotations") as entries:
        return dict(sorted((entry.name[:-4], entry.stat()) for entry in entries if entry.name.endswith(".xml") and entry.is_file()))


def stamp_of(names: Path) -> dict:
    """What changes when the list, one of the XMLs or the set of image files is edited: sizes and times of all."""
    try:
        files, own, images = _files(names), names.stat(), _folder(names) / "JPEGImages"
        states = [("", own), *files.items(), *([("images", images.stat())] if images.is_dir() else [])]
    except OSError as error:
        raise UserError(f"{error.filename or names} cannot be read: {error.strerror}") from error
    facts = "\n".join(f"{name}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}" for name, state in states)
    total = own.st_size + sum(state.st_size for state in files.values())
    return {"bytes": total, "files": len(files), "state": hashlib.sha256(os.fsencode(facts)).hexdigest()}


def digest(names: Path) -> str:
    """SHA-256 of everything that the index is made of."""
    return _read(names)[-1]


def _read(names: Path) -> tuple[list[str], dict[str, bytes], dict[str, list[str]], str]:
    """The list's names, the XMLs by name, the image files by name, and the hash of all three."""
    try:
        folder, text = _folder(names), names.read_bytes()
        contents = {name: _bytes_of(folder / "Annotations" / f"{name}.xml") for name in _files(names)}
        images = folder / "JPEGImages"
        files = sorted(os.listdir(images)) if images.is_dir() else []
        listed = [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{error.filename or names} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{names} is not text in UTF-8 ({error.reason}); it must hold the name of an image in each line") from error
    if not listed:
        raise UserError(f"{names} is empty; it must hold the name of an image in each line, as {names.parent} of Pascal VOC does")
    by_name: dict[str, list[str]] = {}
    for file in files:
        if file.lower().endswith(ENDINGS):
            by_name.setdefault(os.path.splitext(file)[0], []).append(file)
    hashed = hashlib.sha256(text)
    for name, content in contents.items():
        hashed.update(os.fsencode(f"\0{name}\0{len(content)}\0") + content)
    hashed.update(os.fsencode("\0".join(files)))
    return listed, contents, by_name, hashed.hexdigest()


def _bytes_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read(LARGEST_XML + 1)
    if len(content) > LARGEST_XML:
        raise UserError(f"{path} has more than {LARGEST_XML >> 20} MiB: it is no annotation of one image; take it away")
    return content


def read_xml(content: bytes, path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """One XML: → (the texts of ONCE, those of OBJECT for each object), a path that stands twice left out.

    Raises NotAnnotations if it is none, and UserError if it declares a DOCTYPE: without one there are no entities to expand or to fetch.
    """
    parser, path_to, text = expat.ParserCreate(), [], []
    single: dict[str, str] = {}
    objects: list[dict[str, str]] = []
    twice: set[tuple[int, str]] = set()

    def start(tag: str, attributes: dict) -> None:
        path_to.append(tag)
        text.clear()
        if path_to[0] != "annotation" or len(path_to) > 32:
            raise NotAnnotations(f"<{tag}> at its top, not <annotation>" if len(path_to) == 1 else "too deeply nested")
        if path_to == ["annotation", "object"]:
            objects.append({})

    def end(tag: str) -> None:
        place = "/".join(path_to)
        if place in ONCE or place in OBJECT:
            where = objects[-1] if place in OBJECT else single
            if place in where:
                twice.add((len(objects) if place in OBJECT else 0, place))
            where[place] = "".join(text).strip()
        path_to.pop()
        text.clear()

    def refuse(*declared: object) -> None:
        raise UserError(f"{path} declares a DOCTYPE ({declared[0]}), which no annotation needs and which can hide an attack; remove it or the file")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler, parser.buffer_text = refuse, refuse, True
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # also of encodings that do not exist
        raise NotAnnotations(str(error)) from error
    for number, place in twice:
        (objects[number - 1] if number else single).pop(place, None)
    return single, objects


def _number(text: str | None) -> float | int | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return None if not math.isfinite(value) else int(value) if value == int(value) else value


def _image_id(name: str) -> int:
    if NUMBER.fullmatch(name):
        return int(name.replace("_", ""))
    return (1 << 52) + (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 12)  # above all numbers, exact in float64


def parse(names: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Read and check a list with its XMLs: the arrays of AnnotationIndex, and the head stored with them. Raises UserError."""
    stamp = stamp_of(names)  # before reading: a change meanwhile then shows at the next opening
    listed, contents, files, sha256 = _read(names)
    folder, read, broken = _folder(names), {}, {}
    for name, content in contents.items():
        try:
            read[name] = read_xml(content, folder / "Annotations" / f"{name}.xml")
        except NotAnnotations as error:
            broken[name] = str(error)
    classes = sorted({entry["annotation/object/name"] for _, objects in read.values() for entry in objects if entry.get("annotation/object/name")})
    classes = CLASSES if set(classes) <= set(CLASSES) else classes
    id_of = {name: key for key, name in enumerate(classes, 1)}
    report = {"dropped": {}, "mended": {}}
    images, annotations, named = [], [], {}
    for name in sorted(set(listed)):
        if (other := named.setdefault(_image_id(name), name)) != name:
            raise UserError(f"{names}: images {other} and {name} have the same number; rename one of them, with its XML")
        if len(files.get(name, ())) > 1:
            raise UserError(f"{folder / 'JPEGImages'} holds {' and '.join(files[name])} for the image {name}; keep the one that its XML describes")
        if name in read:
            single, objects = read[name]
            size = {side: _number(single.get(f"annotation/size/{side}")) for side in ("width", "height")}
            images.append({"id": _image_id(name), "file_name": files.get(name, [f"{name}.jpg"])[0], **size})
            annotations += [_annotation(entry, _image_id(name), id_of, name) for entry in objects]
        elif name in broken:
            add(report, "dropped", "image whose XML cannot be read", 1, [f"{name}.xml: {broken[name]}"])
        else:
            add(report, "dropped", "image without an XML", 1, [name])
    if repeated := sorted((Counter(listed) - Counter(set(listed))).elements()):
        add(report, "dropped", "image in the list twice", len(repeated), repeated)
    annotations.sort(key=lambda entry: entry["image_id"])  # so that no order of names or of the list shows in the annotations' ids
    for number, entry in enumerate(annotations, 1):
        entry["id"] = number
    data = {"images": images, "annotations": annotations, "categories": [{"id": key, "name": name} for name, key in id_of.items()]}
    arrays, head = checked(data, names, report)
    return arrays, {"stamp": stamp, "sha256": sha256, **head}


def _annotation(entry: dict[str, str], image_id: int, id_of: dict[str, int], name: str) -> dict:
    """An object as COCO has it; what is missing or no number stays None and is dropped there."""
    sides = [_number(entry.get(place)) for place in BOX]
    if None not in sides:
        left, top, right, bottom = sides
        sides = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    difficult = entry.get("annotation/object/difficult", "0")
    called = entry.get("annotation/object/name")
    return {
        "id": None, "xml": f"{name}.xml", "name": called, "image_id": image_id, "category_id": id_of.get(called), "bbox": sides,
        "iscrowd": int(difficult) if difficult in ("0", "1") else difficult, "area": sides[2] * sides[3] if None not in sides else None,
    }  # fmt: skip

"""Where the two parts of a data set lie in its folder: under the names of COCO 2017, or of the other layouts that `find` knows.

- COCO: ``instances_{train,val}*.json`` or ``{train,val}*.json``, in ``annotations/`` or beside it; images in the folder of that name, else
  in ``{train,val}*/``, each here or in ``images/``, else in ``images/`` itself.
- COCO as Roboflow exports it: ``{train,valid}/_annotations.coco.json``, the images beside them.
- Pascal VOC, its folder or the one above with a folder a year: the lists trainval and test in ``ImageSets/Main/`` if images of test have
  XMLs, else train and val; images in ``JPEGImages/``.

Only the standard library: `prepare.py` calls it before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from base.errors import UserError

PARTS = {"train": "training", "val": "validation"}
COCO_2017 = {  # by the keys of the configuration that state them
    "train_images": "train2017",
    "train_annotations": "annotations/instances_train2017.json",
    "val_images": "val2017",
    "val_annotations": "annotations/instances_val2017.json",
}
GET_DATA = "make the demo data with `python3 prepare.py --demo-data` or fetch COCO 2017 with `python3 prepare.py --download`"
LOOKED_FOR = (
    "COCO's annotations/instances_{train,val}*.json or annotations/{train,val}.json with images in {train,val}*/, images/{train,val}*/ or "
    "images/; Roboflow's {train,valid}/_annotations.coco.json; Pascal VOC's Annotations/, JPEGImages/ and ImageSets/Main/{train,val}.txt"
)
NAME = re.compile(r"(?:instances_)?((?:train(?:ing)?(?![-_]?val)|val(?:id(?:ation)?)?)(?![a-z]).*)")  # not trainval: it is neither part
Choices = dict[str, list]  # part → [(images or None, annotations), …], relative to the data folder


def flags(parser: argparse.ArgumentParser, *parts: str) -> None:
    """The flags that state where parts lie."""
    for key, default in COCO_2017.items():
        if key.partition("_")[0] in parts:
            text = f"within the data folder, such as {default} (default: found)"
            parser.add_argument(f"--{key}", f"--{key.replace('_', '-')}", metavar="PATH", help=text)


def stated(options: argparse.Namespace) -> dict[str, str]:
    """What those flags say: key → path."""
    return {key: value for key in COCO_2017 if (value := getattr(options, key, None))}


def find(
    folder: Path, known: Mapping[str, str] = COCO_2017, given: Mapping[str, str] | None = None, parts: tuple[str, ...] = tuple(PARTS)
) -> tuple[dict[str, str], str]:
    """Where the ``parts`` of the data set in ``folder`` lie: → (key → path relative to it, the layout in words; "" if all were ``known``).

    ``known`` paths are taken where all are there; else a part is looked for, unless one of its keys is ``given`` by a person.
    Raises UserError, with what was looked for and what is there, where a part is missing or could be several.
    """
    given = given or {}
    paths = {key: path for key, path in {**known, **given}.items() if key.partition("_")[0] in parts}
    try:
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist: name another with --data_dir; {GET_DATA}")
        missing = {key: path for key, path in paths.items() if not (folder / path).exists()}
        if not missing:
            return paths, ""
        looked = [part for part in parts if not any(key.startswith(part) for key in given)]
        if fixed := [f"{path} ({key})" for key, path in missing.items() if key.partition("_")[0] not in looked]:
            raise UserError(f"data folder {folder} lacks {', '.join(fixed)}; it holds {_holds(folder)}")
        layouts = [("COCO", _json(folder)), ("COCO as Roboflow exports it", _roboflow(folder)), *_voc(folder)]
        whole = [(layout, found) for layout, found in layouts if all(found[part] for part in looked)]
        if not whole:
            raise _nothing(folder, layouts, looked)
        if len(whole) > 1 or any(len(found[part]) > 1 for _, found in whole for part in looked):
            raise _several(folder, whole, looked)
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.filename}: {error.strerror}") from error
    (layout, found), texts = whole[0], []
    for part in looked:
        images, annotations = found[part][0]
        if images is None:
            raise _fault(folder, f"the folder of the images of {annotations} is missing or has another name", looked)
        paths |= {f"{part}_images": images, f"{part}_annotations": annotations}
        texts.append(f"{annotations} with {images}/")
    return paths, f"{layout}, {', '.join(texts)}"


def _json(folder: Path) -> Choices:
    found: Choices = {part: [] for part in PARTS}
    for file in sorted([*(folder / "annotations").glob("*.json"), *folder.glob("*.json")]):
        if match := NAME.fullmatch(file.stem):
            part = "train" if match[1].startswith("train") else "val"
            found[part] += [(images, file.relative_to(folder).as_posix()) for images in _images_of(folder, match[1], part) or [None]]
    return found


def _images_of(folder: Path, name: str, part: str) -> list[str]:
    """Folders that may hold the images of an annotation file: those of its name, else of its part, else images/."""
    within = (folder, folder / "images")
    own = [place / name for place in within if (place / name).is_dir()]
    alike = [path for place in within for path in sorted(place.glob(f"{part}*")) if path.is_dir() and NAME.fullmatch(path.name)]
    all_together = [folder / "images"] if (folder / "images").is_dir() else []
    return [path.relative_to(folder).as_posix() for path in own or alike or all_together]


def _roboflow(folder: Path) -> Choices:
    names = {"train": ("train",), "val": ("valid", "val")}
    return {part: [(n, f"{n}/_annotations.coco.json") for n in names[part] if (folder / n / "_annotations.coco.json").is_file()] for part in PARTS}


def _voc(folder: Path) -> Iterator[tuple[str, Choices]]:
    """Each folder of Pascal VOC: the data folder, or one a year within it or its VOCdevkit/."""
    places = [folder] if _is_voc(folder) else [path for path in sorted([*folder.glob("*"), *folder.glob("VOCdevkit/*")]) if _is_voc(path)]
    for root in places:
        within = root.relative_to(folder)
        lists = {name: root / "ImageSets" / "Main" / f"{name}.txt" for name in ("train", "val", "trainval", "test")}
        there = {name for name, file in lists.items() if file.is_file()}
        split = {"train": "train", "val": "val"}
        if {"trainval", "test"} <= there and _annotated(root, lists["test"]):
            split = {"train": "trainval", "val": "test"}
        images = (within / "JPEGImages").as_posix()
        yield (
            "Pascal VOC",
            {part: [(images, lists[name].relative_to(folder).as_posix())] if name in there else [] for part, name in split.items()},
        )


def _is_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def _annotated(root: Path, names: Path) -> bool:
    """Whether images of a list have XMLs: VOC's later years publish none of their test images."""
    there = set(os.listdir(root / "Annotations"))
    return any(f"{line.strip()}.xml" in there for line in names.read_text(encoding="utf-8", errors="replace").splitlines())


def _holds(folder: Path) -> str:
    """What is in a folder, as far as it matters here: its entries, and the annotation files in annotations/ and ImageSets/Main/."""
    entries = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    inner = [str(path.relative_to(folder)) for pattern in ("annotations/*.json", "ImageSets/Main/*.txt") for path in sorted(folder.glob(pattern))]
    some = [*entries[:8], *["…"] * (len(entries) > 8), *inner[:6], *["…"] * (len(inner) > 6)]
    return ", ".join(some) or "nothing"


def _fault(folder: Path, what: str, parts: Sequence[str]) -> UserError:
    keys = ", ".join(f"--{key}" for key in COCO_2017 if key.partition("_")[0] in parts)
    return UserError(f"data folder {folder}: {what}; looked for {LOOKED_FOR}. It holds {_holds(folder)}. State the paths by {keys}, or {GET_DATA}")


def _nothing(folder: Path, layouts: list, looked: list[str]) -> UserError:
    """Of the layout that comes nearest, what is missing."""
    for _, found in layouts:
        if any(found[part] for part in looked):
            (lacking,) = [part for part in looked if not found[part]]
            has = ", ".join(annotations for part in looked for _, annotations in found[part])
            advice = "; evaluation needs annotated images that are not trained on: set some apart" * (lacking == "val")
            return _fault(folder, f"{has} is there and no {PARTS[lacking]} part{advice}", looked)
    if any(layout == "Pascal VOC" for layout, _ in layouts):
        return _fault(folder, "Annotations/ and JPEGImages/ are there and no lists of their names, one a line, in ImageSets/Main/", looked)
    return _fault(folder, "no annotations are found", looked)


def _several(folder: Path, whole: list, looked: list[str]) -> UserError:
    choices = [(layout, *choice) for layout, found in whole for part in looked for choice in found[part]]
    texts = [f"{annotations} with {images}/" if images else f"{annotations} without images" for _, images, annotations in choices]
    years = sorted({(folder / images).parent for layout, images, _ in choices if layout == "Pascal VOC"})
    advice = f"; name one year, such as --data_dir {years[0]}" if len(years) > 1 else ""
    return _fault(folder, f"it could be several data sets: {', '.join(texts)}{advice}", looked)

"""A compact index of an annotation file: checked and packed once, then opened by every process in well under a second.

The file is COCO's JSON, or a list of Pascal VOC (``.txt``), which stands for the XMLs of its images. The index lies beside it
(``instances_train2017.index.npz``, ``train.txt.index.npz``) or, where that folder cannot be written, in ``$XDG_CACHE_HOME/ssd-zoo``
(``~/.cache/ssd-zoo``). It is packed again when the content changes.

What is done with entries that are not as they should be stands in `data_sets.coco_json` and `data_sets.voc`; ``report`` counts every case.
"""

import contextlib
import fcntl
import gc
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

import numpy as np

from base.errors import UserError
from data_sets import coco_json, voc

FORMAT = 1  # raise it when the stored arrays or the table above change: older indexes are then packed again
PARSE_HERE_BYTES = 4 << 20  # larger files are parsed in a child, so that the parse's memory never stays in this process
DAMAGE = (OSError, ValueError, LookupError, EOFError, RuntimeError, TypeError, SyntaxError, struct.error, zipfile.BadZipFile)
Log = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """I images by ascending id and their B boxes, those of one image together, in the order of the JSON.

    Arrays are read-only. Boxes are x, y, width, height in pixels of the original image, as recorded.
    """

    annotation_file: Path
    image_ids: np.ndarray  # int64 (I,), ascending
    sizes: np.ndarray  # int64 (I, 2) recorded height, width
    file_names: np.ndarray  # uint8: all names in UTF-8, one after the other; read them with file_name()
    first_byte: np.ndarray  # int64 (I+1,): the name of image i is file_names[first_byte[i]:first_byte[i+1]]
    first_box: np.ndarray  # int64 (I+1,): the boxes of image i are first_box[i]:first_box[i+1]
    boxes: np.ndarray  # float64 (B, 4): 64 bits, so that the COCO figures stay exact
    labels: np.ndarray  # int64 (B,) 1..C in the order of ascending category id (0 is background)
    crowd: np.ndarray  # bool (B,)
    areas: np.ndarray  # float64 (B,) recorded area in square pixels
    box_ids: np.ndarray  # int64 (B,) annotation ids
    category_ids: np.ndarray  # int64 (C,), ascending: label = position + 1
    category_names: tuple[str, ...]
    sha256: str  # of the annotation file
    report: dict  # images, annotations, categories: entries read; dropped, mended: {reason: {"count", "examples"}}
    origin: str  # how this process came by it: "packed", "current", or "refreshed" (same content, new time stamp)
    stored_in: Path

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, image: int) -> str:
        """File name of the image at a position (0..I-1), relative to the image folder."""
        return self.file_names[self.first_byte[image] : self.first_byte[image + 1]].tobytes().decode()

    def ltrb(self, image: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float32 (n, 4) as left, top, right, bottom in [0, 1] of the recorded size, and labels int64 (n,); crowd included."""
        some = slice(self.first_box[image], self.first_box[image + 1])
        return coco_json.ltrb_of(self.boxes[some], self.sizes[image]), self.labels[some]

    def to_coco(self) -> dict:
        """The index as a COCO dictionary without segmentations, for pycocotools: ids and boxes as in the index."""
        image_of_box = np.repeat(self.image_ids, np.diff(self.first_box))
        columns = (self.box_ids, image_of_box, self.category_ids[self.labels - 1], self.boxes, self.areas, self.crowd.astype(int))
        names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "images": [
                {"id": key, "file_name": self.file_name(i), "height": height, "width": width}
                for i, (key, (height, width)) in enumerate(zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True))
            ],
            "annotations": [dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)],
            "categories": [{"id": int(key), "name": name} for key, name in zip(self.category_ids, self.category_names, strict=True)],
        }

    @classmethod
    def open(cls, annotation_file: str | os.PathLike, log: Log | None = None) -> "AnnotationIndex":
        """Load the index of an annotation file, packing it first if there is none or the file's content changed.

        Of several processes that open it at once, one packs and the others wait. ``log`` is called with a line for
        everything worth knowing (packing, repairs, another place). Raises UserError for whatever the table calls an error.
        """
        file, log = Path(annotation_file).absolute(), log or (lambda line: None)
        read = reader(file)
        stamp, places = read.stamp_of(file), _places(file)
        for place in places:  # without the lock: the common case costs one read
            if (found := _load(place, log)) and found[1]["stamp"] == stamp:
                return cls._of(file, place, found, "current")
        target = _target(places, log)
        with _locked(target.with_name(f".{target.name}.lock"), log):
            began, stamp, same_size = time.perf_counter(), read.stamp_of(file), None
            for place in places:  # again: another process may have packed it while this one waited
                if (found := _load(place, lambda line: None)) and found[1]["stamp"]["bytes"] == stamp["bytes"]:
                    if found[1]["stamp"] == stamp:
                        return cls._of(file, place, found, "current")
                    same_size = found
            if same_size and same_size[1]["sha256"] == read.digest(file):  # touched, copied or moved, but not edited
                same_size[1]["stamp"] = stamp
                _write(target, *same_size)
                return cls._of(file, target, same_size, "refreshed")
            log(f"packing {file} ({stamp['bytes'] / 1e6:,.1f} MB)")
            if stamp["bytes"] <= PARSE_HERE_BYTES:
                _write(target, *read.parse(file))
            else:
                _pack_in_child(file, target, stamp["bytes"])
            found = _load(target, log)
            if not found:
                raise UserError(f"index {target} cannot be read back after writing; check the disk")
            index = cls._of(file, target, found, "packed")
            log(f"packed {len(index):,} images, {len(index.boxes):,} boxes into {target} in {time.perf_counter() - began:.1f} s")
            return index

    @classmethod
    def _of(cls, file: Path, place: Path, found: tuple[dict, dict], origin: str) -> "AnnotationIndex":
        arrays, head = found
        for array in arrays.values():
            array.flags.writeable = False
        return cls(file, **arrays, category_names=tuple(head["names"]), sha256=head["sha256"], report=head["report"], origin=origin, stored_in=place)


ARRAYS = tuple(field.name for field in fields(AnnotationIndex) if field.type is np.ndarray)


def reader(file: Path):
    """The module that reads an annotation file: it has ``stamp_of``, ``digest`` and ``parse``."""
    return voc if file.suffix == ".txt" else coco_json


def _places(file: Path) -> tuple[Path, Path]:
    """Beside the file, and in the user's cache."""
    beside = file.with_name((file.stem if file.suffix == ".json" else file.name) + ".index.npz")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return beside, cache / "ssd-zoo" / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]}.npz"


def _target(places: tuple[Path, Path], log: Log) -> Path:
    beside, cached = places
    if os.access(beside.parent, os.W_OK | os.X_OK):
        return beside
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(cached.parent, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"neither {beside.parent} nor {cached.parent} can be written; set XDG_CACHE_HOME to a folder that can")
    log(f"{beside.parent} cannot be written: its index {beside.name} is kept as {cached}")
    return cached


def _locked(path: Path, log: Log) -> IO[str]:
    """The opened lock file: closing it releases the lock, and so does the end of the process."""
    try:
        handle = open(path, "a")  # noqa: SIM115  the caller's `with` closes it
    except OSError as error:
        raise UserError(f"lock file {path} cannot be opened ({error.strerror}); make it writable or remove it") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that packs (lock {path})")
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks; the atomic rename still keeps the index right
        log(f"{path} cannot be locked ({error.strerror}): processes that start together may each pack")
    return handle


def _load(place: Path, log: Log) -> tuple[dict[str, np.ndarray], dict] | None:
    """The stored arrays and head, or None if the index is absent, damaged or of another format."""
    if not os.access(place, os.R_OK):
        return None
    try:
        with np.load(place, allow_pickle=False) as store:
            head = json.loads(store["head"].tobytes())
            if head["format"] != FORMAT:
                log(f"index {place} has format {head['format']}, not {FORMAT}: packing again")
                return None
            return {name: store[name] for name in ARRAYS}, head  # zipfile checks each array's CRC
    except DAMAGE as error:
        log(f"index {place} is damaged ({type(error).__name__}: {error}): packing again")
        return None


def _write(target: Path, arrays: dict[str, np.ndarray], head: dict) -> None:
    """Store atomically: whoever reads sees the old index or the new one, also after a crash."""
    temporary = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            now = os.fstat(handle.fileno()).st_mtime  # by the clock that also stamps the others, whatever this machine's says
            for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed while writing
                with contextlib.suppress(FileNotFoundError):
                    if now - leftover.stat().st_mtime > 3600:
                        leftover.unlink()
            np.savez(handle, head=np.frombuffer(json.dumps({**head, "format": FORMAT}).encode(), dtype=np.uint8), **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"index {target} cannot be written ({error.strerror}); free disk space or make the folder writable") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pack_in_child(file: Path, target: Path, size: int) -> None:
    paths = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "data_sets.index", str(file), str(target)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode:
        why = f"killed, as when memory runs out; it needs about {size * 4 / 1e9:.1f} GB for a moment"
        raise UserError(f"packing {file} ended with status {done.returncode} ({why if done.returncode < 0 else done.stderr.strip()})")


if __name__ == "__main__":  # the child that _pack_in_child starts: python -m data_sets.index FILE TARGET
    gc.disable()  # millions of live objects and no cycles: collecting costs time and frees nothing
    try:
        _write(Path(sys.argv[2]), *reader(Path(sys.argv[1])).parse(Path(sys.argv[1])))
    except UserError as failure:
        print(failure, file=sys.stderr)
        sys.exit(2)

"""COCO 2017 and the backbone's weights as published, and fetching what is not there yet.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations  # prepare.py runs on whatever Python there is

import fcntl
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from base.errors import UserError
from data_sets.archives import folder_faults, unpack
from data_sets.transfer import RemoteFile, Transfer, download, need_space, request

MEMBERS = ("instances_train2017.json", "instances_val2017.json")
COCO = "http://images.cocodataset.org"
# Small files first, so that a wrong address or folder shows within a minute.
COCO_FILES = (
    RemoteFile("https://download.pytorch.org/models/resnet34-333f7ec4.pth", "sha256", "333f7ec4"),
    RemoteFile(
        f"{COCO}/annotations/annotations_trainval2017.zip",
        "md5",
        "f4bbac642086de4f52a3fdda2de5fa2c",
        252_907_541,
        "annotations",
        MEMBERS,
        unpacked_ratio=4.0,
    ),
    RemoteFile(f"{COCO}/zips/val2017.zip", "md5", "442b8da7639aecaf257c1dceb8ba8c80", None, "val2017", count=5_000),
    RemoteFile(f"{COCO}/zips/train2017.zip", "md5", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798, "train2017", count=118_287),
)


@contextmanager
def locked(path: Path, out: TextIO) -> Iterator[None]:
    """Hold the lock file `path`, saying so when another process has it. The kernel frees it however its holder ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is at work here (it holds {path}): waiting for it", file=out, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def peak_bytes(files: Sequence[RemoteFile], directory: Path, keep_zips: bool, how: Transfer) -> float:
    """Bytes needed at the worst moment. Asks the server for each file: a wrong address shows before hours of download."""
    used = peak = 0.0
    for file in files:
        path, part, size = directory / file.name, directory / f"{file.name}.part", file.size or 0
        if not path.exists():
            try:
                with request(file.url, {}, directory, how, "HEAD") as answer:
                    length = answer.headers.get("Content-Length", "")
                    size = size or (int(length) if length.isdigit() else 0)
            except urllib.error.HTTPError:
                pass  # the server does not answer HEAD: the download itself checks the room again
        here = next((each.stat().st_size for each in (path, part) if each.exists()), 0)
        used += max(size - here, 0) + (size * file.unpacked_ratio if file.folder else 0)
        peak = max(peak, used)
        used -= size if file.folder and not keep_zips else 0
    return peak


def fetch_dataset(
    directory: Path, how: Transfer, files: Sequence[RemoteFile] = COCO_FILES, base_url: str | None = None, keep_zips: bool = False
) -> None:
    """Fetch and unpack whatever of `files` is not in `directory` yet. Zips go once unpacked, unless `keep_zips`.

    `base_url` is a mirror that serves the same files under `base_url/NAME`. Raises UserError with the fix.
    """
    if base_url:
        files = [replace(file, url=f"{base_url.rstrip('/')}/{file.name}") for file in files]
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / ".download.lock", how.out):
        wanted = []
        for file in files:
            if not (directory / (file.folder or file.name)).exists():
                wanted.append(file)
            elif not file.folder:
                download(file, directory, how)  # verifies what is there
            elif faults := folder_faults(directory, file):
                raise UserError(f"{'; '.join(faults)}: move or delete {directory / file.folder} and run this again")
        if not wanted:
            print(f"{directory}: everything is downloaded and unpacked", file=how.out)
            return
        needed = peak_bytes(wanted, directory, keep_zips, how)
        need_space(directory, needed, f"fetching {', '.join(file.name for file in wanted)}", how)
        for file in wanted:
            started = time.monotonic()
            archive = download(file, directory, how)
            if file.folder:
                unpack(archive, file, directory, how)
                if not keep_zips:
                    archive.unlink()
            kept = f", unpacked into {file.folder}/" if file.folder else ""
            print(f"  {file.name}: verified{kept} ({time.monotonic() - started:.0f} s)", file=how.out, flush=True)

"""Zip archives unpacked safely: a folder has its place only when it is whole; until then it is `.unpacking-FOLDER` beside it.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations  # prepare.py runs on whatever Python there is

import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from data_sets.transfer import CHUNK, GB, Progress, RemoteFile, Transfer, need_space

MOST_INFLATION = 100  # declared bytes per archive byte above which a zip is taken for a bomb; JPEG and JSON stay below 10


def check_entries(archive: Path, file: RemoteFile, entries: Sequence[zipfile.ZipInfo]) -> int:
    """Refuse, before anything is written, an archive that could harm or is not the expected one; returns its unpacked bytes."""
    seen: set[str] = set()
    for entry in entries:
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        faults = (
            (name.startswith("/") or re.match(r"[A-Za-z]:", name) or "\\" in name, "is not a relative path"),
            (any(step in ("", ".", "..") for step in name.rstrip("/").split("/")), "leaves its folder"),
            (kind not in (0, stat.S_IFREG, stat.S_IFDIR), "is a link or a special file"),
            (entry.flag_bits & 1, "is encrypted"),
            (name.split("/")[0] != file.folder, f"is outside {file.folder}/"),
            (not name.lower().endswith(("/", ".jpg", ".jpeg", ".json")), "is neither JPEG nor JSON"),
            (name in seen, "occurs twice"),
        )
        if fault := next((why for bad, why in faults if bad), ""):
            raise UserError(f"{archive}: entry {name!r} {fault}: nothing was unpacked; delete the archive (rm {archive})")
        seen.add(name)
    total = sum(entry.file_size for entry in entries)
    if total > MOST_INFLATION * archive.stat().st_size:
        raise UserError(f"{archive} would unpack to {total / GB:,.2f} GB, a bomb: nothing was unpacked; delete it (rm {archive})")
    files = sum(not entry.is_dir() for entry in entries)
    missing = [member for member in file.members if f"{file.folder}/{member}" not in seen]
    if missing or files < file.count:
        raise UserError(f"{archive} is incomplete: {files:,} files, expected {file.count:,}; missing: {', '.join(missing) or 'images'}")
    return total


def extract(bundle: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo], work: Path, progress: Progress) -> None:
    with progress:
        for entry in entries:
            place = work / entry.filename
            (place if entry.is_dir() else place.parent).mkdir(parents=True, exist_ok=True)
            if entry.is_dir():
                continue
            written = 0
            with bundle.open(entry) as source, place.open("xb") as output:
                while data := source.read(CHUNK):
                    written += len(data)
                    if written > entry.file_size:
                        break  # a bomb that declares less than it delivers
                    output.write(data)
                    progress.add(len(data))
            if written != entry.file_size:
                raise zipfile.BadZipFile(f"entry {entry.filename!r} does not hold the {entry.file_size:,} bytes that it declares")


def unpack(archive: Path, file: RemoteFile, directory: Path, how: Transfer) -> None:
    """Unpack `archive` into `directory/file.folder`, which appears only when every entry is there and its CRC is right."""
    target, work = directory / str(file.folder), directory / f".unpacking-{file.folder}"
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    try:
        with zipfile.ZipFile(archive) as bundle:
            entries = bundle.infolist()
            total = check_entries(archive, file, entries)
            need_space(directory, total, f"unpacking {archive.name}", how)
            extract(bundle, entries, work, Progress(f"unpacking {archive.name}", total, how.out))
        os.sync()  # the rename must not outlive the data in a power cut
        os.rename(work / str(file.folder), target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(f"{archive} cannot be unpacked: {error}: delete it (rm {archive}) and run this again") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {directory}: {error}: make room, or use a folder you may write") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def folder_faults(directory: Path, file: RemoteFile) -> list[str]:
    """What is missing of an unpacked archive, one line each; none when it is whole."""
    folder = directory / str(file.folder)
    if not folder.is_dir():
        return [f"{folder} is missing"]
    if file.count:
        with os.scandir(folder) as entries:
            found = sum(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in entries)
        if found < file.count:
            return [f"{folder} holds {found:,} of {file.count:,} images"]
    return [f"{folder / member} is missing" for member in file.members if not (folder / member).is_file()]

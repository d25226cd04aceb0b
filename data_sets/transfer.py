"""One published file, fetched: resumed after a cut, and under its name only when it is whole and verified; until then `NAME.part`.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations  # prepare.py runs on whatever Python there is

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from base.errors import UserError

CHUNK = 1 << 20
GB = 1e9
UNMENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR)  # no use retrying


@dataclass(frozen=True)
class RemoteFile:
    """A published file. `digest` may be a prefix of the sum; `size` is in bytes, None where it is not published.

    `folder` is the one top folder of an archive (None: the file is used as it is), `members` the files it must hold
    there and `count` how many files it must hold.
    """

    url: str
    algorithm: str
    digest: str
    size: int | None = None
    folder: str | None = None
    members: tuple[str, ...] = ()
    count: int = 0
    unpacked_ratio: float = 1.0  # room set aside before the archive itself tells: JPEGs hardly shrink in a zip

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Transfer:
    """How a download behaves: seconds to wait for a byte, tries without progress, seconds before the second of them."""

    timeout: float = 60.0
    tries: int = 5
    backoff: float = 1.0
    free_bytes: Callable[[Path], int] = lambda directory: shutil.disk_usage(directory).free
    out: TextIO = field(default_factory=lambda: sys.stdout)


class Progress:
    """Bytes, rate and time left: one updating line on a terminal, a line every tenth elsewhere."""

    def __init__(self, label: str, total: int | None, out: TextIO, done: int = 0) -> None:
        self.label, self.total, self.out, self.done, self.first = label, total, out, done, done
        self.started = self.shown = time.monotonic()
        self.terminal, self.tenth = out.isatty(), 10 * done // total if total else 0

    def add(self, count: int) -> None:
        self.done, now = self.done + count, time.monotonic()
        tenth = 10 * self.done // self.total if self.total else int((now - self.started) / 10)
        if now - self.shown < 0.2 if self.terminal else tenth <= self.tenth:
            return
        self.shown, self.tenth = now, tenth
        rate, text = (self.done - self.first) / max(now - self.started, 1e-3), f"  {self.label}: {self.done / 1e6:,.1f} MB"
        if self.total:
            left = int(max(self.total - self.done, 0) / max(rate, 1.0))
            text += f" of {self.total / 1e6:,.1f} ({100 * self.done // self.total} %), {left // 60}:{left % 60:02d} left"
        text += f", {rate / 1e6:,.1f} MB/s"
        print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", file=self.out, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=self.out, flush=True)


def hash_file(path: Path, algorithm: str, out: TextIO) -> hashlib._Hash:
    """The running sum of a file that is there already."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file, Progress(f"checking {path.name}", path.stat().st_size, out) as progress:
        while data := file.read(CHUNK):
            digest.update(data)
            progress.add(len(data))
    return digest


def request(url: str, headers: dict[str, str], directory: Path, how: Transfer, method: str = "GET") -> http.client.HTTPResponse:
    """Open `url`, trying again what may pass (no connection, 5xx). Raises UserError, and HTTPError for 405, 416 and 501."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is not an http:// or https:// address")
    query = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers}, method=method)
    for failures in range(1, how.tries + 1):
        try:
            return urllib.request.urlopen(query, timeout=how.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (405, 416, 501):
                raise
            reason = f"the server answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{reason} for {url}: check the address; --base-url names another one") from None
        except (OSError, http.client.HTTPException) as error:
            reason = f"no connection ({getattr(error, 'reason', None) or error or type(error).__name__})"
        if failures < how.tries:
            wait = how.backoff * 2 ** (failures - 1)
            print(f"  {url}: {reason}; trying again in {wait:.0f} s", file=how.out, flush=True)
            time.sleep(wait)
    by_hand = f"download it by hand into {directory} and run this again"
    raise UserError(f"{url}: {reason}, {how.tries} times: check the network and proxy settings, or {by_hand}")


class Part:
    """A file under way: its bytes in `NAME.part`, and in `NAME.part.json` what tells whether the server still has that file."""

    def __init__(self, file: RemoteFile, directory: Path, how: Transfer) -> None:
        self.file, self.how = file, how
        self.path, self.note = directory / f"{file.name}.part", directory / f"{file.name}.part.json"
        self.validator: str | None = None  # what If-Range may name; without one a part cannot be continued
        self.total: int | None = None
        self.digest = hashlib.new(file.algorithm, usedforsecurity=False)
        try:
            note = json.loads(self.note.read_text())
            if note["url"] == file.url and self.path.exists():
                self.validator, self.total = note["validator"], note["total"]
                self.digest = hash_file(self.path, file.algorithm, how.out)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # no note, or one cut by a crash: the part is begun anew

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.validator, self.total, self.digest = None, None, hashlib.new(self.file.algorithm, usedforsecurity=False)

    def continue_once(self) -> bool:
        """One connection: bring the part further; True when it is complete."""
        have = self.size() if self.validator else 0
        if have and have == self.total:
            return True  # killed between the last byte and the rename
        headers = {"Range": f"bytes={have}-", "If-Range": self.validator} if have and self.validator else {}
        with request(self.file.url, headers, self.path.parent, self.how) as answer:
            tag = answer.headers.get("ETag", "")  # a weak one (W/"…") must not be used for ranges: RFC 9110, section 13.1.5
            offered = tag if tag.startswith('"') else answer.headers.get("Last-Modified")
            if answer.status == 206:
                span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
                if not span or int(span[1]) != have or (offered and offered != self.validator):
                    self.delete()
                    raise OSError("the server sent another part of the file than was asked for")
                print(f"  {self.file.name}: continuing at {have / 1e6:,.1f} MB", file=self.how.out, flush=True)
            else:
                if have:
                    print(f"  {self.file.name}: the server cannot continue this file: starting again", file=self.how.out, flush=True)
                have, length = 0, answer.headers.get("Content-Length", "")
                self.delete()
                self.validator, self.total = offered, int(length) if length.isdigit() else self.file.size
            if self.file.size not in (None, self.total):
                raise UserError(f"{self.file.url} has {self.total:,} bytes, the published file {self.file.size:,}: this is another file")
            need_space(self.path.parent, (self.total or 0) - have, f"downloading {self.file.name}", self.how)
            self.note.write_text(json.dumps({"url": self.file.url, "validator": self.validator, "total": self.total}))
            with self.path.open("ab") as output, Progress(self.file.name, self.total, self.how.out, have) as progress:
                while data := answer.read1(CHUNK):
                    output.write(data)
                    self.digest.update(data)
                    progress.add(len(data))
                output.flush()
                os.fsync(output.fileno())
        return self.total is None or self.size() == self.total

    def complete(self) -> str:
        """Bring the part to its full length through cuts; returns its sum."""
        failures, best, reason = 0, self.size() if self.validator else 0, ""
        while failures < self.how.tries:
            try:
                if self.continue_once():
                    return self.digest.hexdigest()
                reason = f"the connection ended at {self.size():,} of {self.total:,} bytes"
            except urllib.error.HTTPError as error:
                reason = f"the server answered {error.code} {error.reason}"
                self.delete()  # 416: the part is no beginning of the server's file
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in UNMENDABLE:
                    raise UserError(f"cannot write {self.path}: {error.strerror}: make room, or use a folder you may write") from None
                reason = str(error) or type(error).__name__
            failures, best = (0 if self.size() > best else failures + 1), max(best, self.size())
            wait = self.how.backoff * 2 ** max(failures - 1, 0)
            print(f"  {self.file.name}: {reason}; trying again in {wait:.0f} s", file=self.how.out, flush=True)
            time.sleep(wait)
        raise UserError(f"{self.file.url}: {reason}, {failures} times without progress: run this again later; what is here is kept")


def download(file: RemoteFile, directory: Path, how: Transfer) -> Path:
    """The verified file in `directory`, fetched unless it is there. Raises UserError naming the file and both sums."""
    path, part = directory / file.name, Part(file, directory, how)
    if path.exists():
        if wrong := mismatch(file, hash_file(path, file.algorithm, how.out).hexdigest()):
            raise UserError(f"{path} is corrupt: {wrong}: delete it (rm {path}) and run this again")
        return path
    if wrong := mismatch(file, part.complete()):
        print(f"  {file.name} is corrupt: {wrong}: deleted, fetching it once more", file=how.out, flush=True)
        part.delete()
        if wrong := mismatch(file, part.complete()):
            part.delete()
            raise UserError(f"{file.url} is corrupt: {wrong}: it was deleted; try another mirror with --base-url")
    os.replace(part.path, path)
    part.note.unlink(missing_ok=True)
    return path


def mismatch(file: RemoteFile, got: str) -> str:
    """What is wrong with the sum `got`; empty when it is right."""
    expected = file.digest if len(file.digest) == len(got) else f"{file.digest}…"
    return "" if got.startswith(file.digest) else f"its {file.algorithm} is {got}, expected {expected}"


def need_space(directory: Path, needed: float, what: str, how: Transfer) -> None:
    free = how.free_bytes(directory)
    if needed > free:
        raise UserError(f"{what} needs {needed / GB:,.2f} GB in {directory}, but {free / GB:,.2f} GB are free: make room there")

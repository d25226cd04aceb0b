"""data_sets.archives: zips that are hostile, damaged or not the expected ones."""

import io
import zipfile
from pathlib import Path

import pytest

from base.errors import UserError
from data_sets.archives import unpack
from data_sets.transfer import RemoteFile, Transfer
from tests.http_server import BODY, archive


def link() -> bytes:
    entry = zipfile.ZipInfo("train2017/link.jpg")
    entry.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("train2017/0.jpg", b"fine")
        bundle.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


def understated() -> bytes:
    """An entry that declares 10 bytes, in both its headers, and delivers 1000."""
    data = bytearray(archive({"train2017/0.jpg": b"z" * 1000}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = (10).to_bytes(4, "little")
    return bytes(data)


HOSTILE = {
    "dots": (archive({"train2017/0.jpg": b"", "train2017/../../evil.jpg": b""}), "leaves its folder"),
    "absolute": (archive({"train2017/0.jpg": b"", "/tmp/evil.jpg": b""}), "not a relative path"),
    "drive": (archive({"train2017/0.jpg": b"", "C:/evil.jpg": b""}), "not a relative path"),
    "backslash": (archive({"train2017/0.jpg": b"", "train2017\\..\\evil.jpg": b""}), "not a relative path"),
    "link": (link(), "is a link"),
    "other folder": (archive({"train2017/0.jpg": b"", "elsewhere/evil.jpg": b""}), "outside train2017/"),
    "script": (archive({"train2017/0.jpg": b"", "train2017/evil.py": b""}), "neither JPEG nor JSON"),
    "bomb": (archive({"train2017/0.jpg": b"\0" * 10_000_000}), "bomb"),
    "understated": (understated(), "cannot be unpacked"),
    "truncated": (archive({"train2017/0.jpg": BODY})[:-30], "cannot be unpacked"),
    "not a zip": (b"hello", "cannot be unpacked"),
    "too few": (archive({"train2017/readme.json": b""}), "incomplete"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive_writes_nothing(tmp_path, kind):
    data, message = HOSTILE[kind]
    home = tmp_path / "data"
    home.mkdir()
    (home / "train2017.zip").write_bytes(data)
    file = RemoteFile("http://x/train2017.zip", "md5", "", folder="train2017", members=("0.jpg",))
    with pytest.raises(UserError, match=message):
        unpack(home / "train2017.zip", file, home, Transfer(out=io.StringIO()))
    assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")) == ["data", "data/train2017.zip"]
    assert not Path("/tmp/evil.jpg").exists()


def test_wrong_crc_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("train2017/0.jpg", b"A" * 1000)
    data = buffer.getvalue().replace(b"A" * 1000, b"A" * 999 + b"B")
    (tmp_path / "t.zip").write_bytes(data)
    with pytest.raises(UserError, match="CRC"):
        unpack(tmp_path / "t.zip", RemoteFile("http://x/t.zip", "md5", "", folder="train2017"), tmp_path, Transfer(out=io.StringIO()))
    assert not (tmp_path / "train2017").exists()

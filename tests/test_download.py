"""data_sets.transfer and data_sets.download against a real HTTP server that misbehaves in every way that was thought of."""

import dataclasses
import hashlib
import io
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from base.errors import UserError
from data_sets.download import COCO_FILES, fetch_dataset
from data_sets.transfer import RemoteFile, Transfer, download
from tests.conftest import ROOT
from tests.http_server import BODY, Server, archive


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def how():
    return Transfer(timeout=5, tries=3, backoff=0.01, out=io.StringIO())


def test_plain_download_leaves_only_the_file(server, how, tmp_path):
    path = download(server.add("a.bin", BODY), tmp_path, how)
    assert path.read_bytes() == BODY
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_resume_continues_where_the_cut_was(server, how, tmp_path):
    server.cut = [300_000, 200_000]
    assert download(server.add("a.bin", BODY), tmp_path, how).read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert server.sent == len(BODY)


def test_changed_file_between_cut_and_resume_starts_again(server, how, tmp_path):
    old = server.add("a.bin", BODY[::-1])
    server.cut = [300_000, 0]
    with pytest.raises(UserError, match="connection ended"):
        download(old, tmp_path, dataclasses.replace(how, tries=1))
    new = server.add("a.bin", BODY)
    assert download(new, tmp_path, how).read_bytes() == BODY
    assert "cannot continue" in how.out.getvalue()


def test_server_that_ignores_range(server, how, tmp_path):
    server.ranges_served, server.cut = False, [300_000]
    assert download(server.add("a.bin", BODY), tmp_path, how).read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-"]


def test_cut_for_ever_at_one_place_ends(server, how, tmp_path):
    server.ranges_served, server.cut = False, [1000] * 50
    with pytest.raises(UserError, match="3 times without progress"):
        download(server.add("a.bin", BODY), tmp_path, how)
    assert len(server.ranges) == 4


def test_complete_part_needs_no_request(server, how, tmp_path):
    file = server.add("a.bin", BODY)
    (tmp_path / "a.bin.part").write_bytes(BODY)
    (tmp_path / "a.bin.part.json").write_text(json.dumps({"url": file.url, "validator": '"x"', "total": len(BODY)}))
    download(file, tmp_path, how)
    assert server.ranges == []


def test_part_longer_than_the_file_is_dropped(server, how, tmp_path):
    file = server.add("a.bin", BODY)
    tag = f'"{file.digest}"'
    (tmp_path / "a.bin.part").write_bytes(BODY + b"x")
    (tmp_path / "a.bin.part.json").write_text(json.dumps({"url": file.url, "validator": tag, "total": None}))
    assert download(file, tmp_path, how).read_bytes() == BODY


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", "null"])
def test_torn_note_starts_again(server, how, tmp_path, note):
    (tmp_path / "a.bin.part").write_bytes(b"junk")
    (tmp_path / "a.bin.part.json").write_text(note)
    assert download(server.add("a.bin", BODY), tmp_path, how).read_bytes() == BODY


def test_corrupt_once_is_fetched_again(server, how, tmp_path):
    server.corrupt = [True]
    assert download(server.add("a.bin", BODY), tmp_path, how).read_bytes() == BODY
    assert "fetching it once more" in how.out.getvalue()


def test_corrupt_twice_is_an_error_with_both_sums(server, how, tmp_path):
    server.corrupt = [True, True]
    file = server.add("a.bin", BODY)
    with pytest.raises(UserError, match=f"md5 is (?!{file.digest})[0-9a-f]{{32}}, expected {file.digest}"):
        download(file, tmp_path, how)
    assert list(tmp_path.iterdir()) == []


def test_corrupt_file_of_the_users_is_named_not_deleted(server, how, tmp_path):
    file = server.add("a.bin", BODY)
    (tmp_path / "a.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="corrupt.*rm "):
        download(file, tmp_path, how)
    assert (tmp_path / "a.bin").exists()


def test_sum_by_prefix(server, how, tmp_path):
    file = server.add("w.pth", BODY)
    sha = hashlib.sha256(BODY).hexdigest()
    download(dataclasses.replace(file, algorithm="sha256", digest=sha[:8], size=None), tmp_path, how)
    with pytest.raises(UserError, match="expected 00000000…"):
        download(dataclasses.replace(file, algorithm="sha256", digest="0" * 8), tmp_path, how)


def test_server_errors_pass(server, how, tmp_path):
    server.status = [500, 503]
    assert download(server.add("a.bin", BODY), tmp_path, how).read_bytes() == BODY


def test_server_errors_that_stay(server, how, tmp_path):
    server.status = [500] * 9
    with pytest.raises(UserError, match="answered 500 .*, 3 times.*by hand into"):
        download(server.add("a.bin", BODY), tmp_path, how)


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusal_is_not_retried(server, how, tmp_path, code):
    server.status = [code, code]
    file = server.add("a.bin", BODY)
    with pytest.raises(UserError, match=f"answered {code} .*{file.url}"):
        download(file, tmp_path, how)
    assert len(server.ranges) == 1


def test_redirect_is_followed(server, how, tmp_path):
    file = server.add("a.bin", BODY)
    server.cut = [1000]
    moved = dataclasses.replace(file, url=f"{server.url}/moved/a.bin")
    assert download(moved, tmp_path, how).read_bytes() == BODY


@pytest.mark.parametrize("lie", [-10, 10])
def test_wrong_content_length(server, how, tmp_path, lie):
    server.lie = lie
    file = server.add("a.bin", BODY)
    with pytest.raises(UserError, match="another file"):
        download(file, tmp_path, how)
    with pytest.raises(UserError, match="corrupt|without progress|another part|ended at"):
        download(dataclasses.replace(file, size=None), tmp_path, how)
    assert not (tmp_path / "a.bin").exists()


def test_no_network(how, tmp_path):
    with pytest.raises(UserError, match="no connection.*http://127.0.0.1:9/a.bin|http://127.0.0.1:9/a.bin.*no connection.*by hand into"):
        download(RemoteFile("http://127.0.0.1:9/a.bin", "md5", "0" * 32), tmp_path, how)


def test_only_http(how, tmp_path):
    with pytest.raises(UserError, match="not an http"):
        download(RemoteFile("file:///etc/passwd", "md5", "0" * 32), tmp_path, how)


def test_disk_full_is_told_first(server, how, tmp_path):
    small = dataclasses.replace(how, free_bytes=lambda _: 1_500_000)
    file = server.add("val2017.zip", BODY, folder="val2017")
    with pytest.raises(UserError, match=r"needs 0.00 GB .*but 0.00 GB are free"):
        fetch_dataset(tmp_path, small, [file])
    assert server.ranges == []
    download(file, tmp_path, small)  # one MB fits


def dataset(server: Server) -> list[RemoteFile]:
    train = archive({"train2017/": b"", "train2017/1.jpg": b"x" * 3000, "train2017/2.jpg": b"y"})
    labels = archive({f"annotations/instances_{split}2017.json": b"{}" for split in ("train", "val")})
    return [
        server.add("w.pth", BODY),
        server.add("annotations.zip", labels, folder="annotations", members=("instances_train2017.json",)),
        server.add("train2017.zip", train, folder="train2017", count=2),
    ]


def test_data_set_and_second_call(server, how, tmp_path):
    files = dataset(server)
    fetch_dataset(tmp_path, how, files)
    assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*") if each.name[0] != ".") == [
        "annotations", "annotations/instances_train2017.json", "annotations/instances_val2017.json",
        "train2017", "train2017/1.jpg", "train2017/2.jpg", "w.pth",
    ]  # fmt: skip
    asked, when = len(server.ranges), (tmp_path / "train2017").stat().st_mtime_ns
    fetch_dataset(tmp_path, how, files)
    assert len(server.ranges) == asked and (tmp_path / "train2017").stat().st_mtime_ns == when
    assert "everything is downloaded" in how.out.getvalue()


def test_mirror_and_kept_zips(server, how, tmp_path):
    files = [dataclasses.replace(file, url=f"http://nowhere.invalid/deep/{file.name}") for file in dataset(server)]
    fetch_dataset(tmp_path, how, files, base_url=f"{server.url}/pub/", keep_zips=True)
    assert (tmp_path / "train2017.zip").exists() and (tmp_path / "train2017/1.jpg").exists()


def test_missing_file_shows_before_any_download(server, how, tmp_path):
    files = dataset(server)
    del server.files["train2017.zip"]
    with pytest.raises(UserError, match="404.*train2017.zip"):
        fetch_dataset(tmp_path, how, files)
    assert server.ranges == []


def test_incomplete_folder_is_not_taken_for_whole(server, how, tmp_path):
    files = dataset(server)
    (tmp_path / "train2017").mkdir()
    with pytest.raises(UserError, match="holds 0 of 2 images.*move or delete"):
        fetch_dataset(tmp_path, how, files)


def test_half_unpacked_folder_of_a_killed_run_is_replaced(server, how, tmp_path):
    (tmp_path / ".unpacking-train2017" / "train2017").mkdir(parents=True)
    (tmp_path / ".unpacking-train2017" / "train2017" / "half.jpg").write_bytes(b"")
    fetch_dataset(tmp_path, how, dataset(server))
    assert sorted(each.name for each in (tmp_path / "train2017").iterdir()) == ["1.jpg", "2.jpg"]
    assert not (tmp_path / ".unpacking-train2017").exists()


def test_killed_process_then_success(server, how, tmp_path):
    body = BODY * 8
    file = server.add("a.bin", body)
    code = (
        "import sys; from pathlib import Path; from data_sets.download import *;"
        f"fetch_dataset(Path({str(tmp_path)!r}), Transfer(), [RemoteFile({file.url!r}, 'md5', {file.digest!r}, {file.size})])"
    )
    server.pause = 0.02
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    part = tmp_path / "a.bin.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 1_000_000 < have < len(body) and not (tmp_path / "a.bin").exists()
    server.pause = 0
    fetch_dataset(tmp_path, how, [file])
    assert (tmp_path / "a.bin").read_bytes() == body
    assert server.ranges[-1] == f"bytes={have}-"


def test_two_at_once_download_once(server, how, tmp_path):
    server.pause, files = 0.01, dataset(server)
    threads = [threading.Thread(target=fetch_dataset, args=(tmp_path, how, files)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.ranges) == 3
    assert "waiting for it" in how.out.getvalue()


def test_published_table():
    assert [file.name for file in COCO_FILES] == [
        "resnet34-333f7ec4.pth", "annotations_trainval2017.zip", "val2017.zip", "train2017.zip"]  # fmt: skip
    assert all(len(file.digest) == 32 for file in COCO_FILES if file.algorithm == "md5")

"""The packed annotation index on the disk: when it is read, refreshed and packed again, by several processes, and its commands."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.contracts import FIGURES
from base.errors import UserError
from data_sets import coco_json
from data_sets import index as index_module
from data_sets import pack as index_tool
from data_sets.index import AnnotationIndex
from measuring import bench
from measuring import index as measured
from tests.annotations import changed, coco, counts, opened, write
from tests.conftest import GOLDEN, ROOT


def test_second_opening_reads_the_index(tmp_path):
    file = write(tmp_path, coco())
    assert AnnotationIndex.open(file).origin == "packed"
    again = AnnotationIndex.open(file)
    assert again.origin == "current" and again.stored_in == tmp_path / "annotations.index.npz"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_changed_file_is_noticed_also_at_the_same_size_and_time(tmp_path):
    file = write(tmp_path, coco())
    AnnotationIndex.open(file)
    status = file.stat()
    file.write_text(file.read_text().replace("30.5", "31.5"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    index = AnnotationIndex.open(file)
    assert index.origin == "packed" and index.boxes[0, 2] == 31.5


def test_touched_file_is_not_packed_again(tmp_path, monkeypatch):
    file = write(tmp_path, coco())
    before = AnnotationIndex.open(file)
    os.utime(file)
    monkeypatch.setattr(coco_json, "parse", lambda file: pytest.fail("parsed again"))
    after = AnnotationIndex.open(file)
    assert after.origin == "refreshed" and after.to_coco() == before.to_coco()
    assert AnnotationIndex.open(file).origin == "current"


def test_other_format_is_packed_again(tmp_path, monkeypatch):
    file = write(tmp_path, coco())
    AnnotationIndex.open(file)
    monkeypatch.setattr(index_module, "FORMAT", 10**6)
    lines = []
    assert AnnotationIndex.open(file, lines.append).origin == "packed"
    assert any("has format" in line for line in lines)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_index_is_repaired(data):
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), coco())
        clean = AnnotationIndex.open(file)
        content = bytearray(clean.stored_in.read_bytes())
        if data.draw(st.booleans(), label="truncate"):
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        clean.stored_in.write_bytes(content)
        lines = []
        index = AnnotationIndex.open(file, lines.append)
        assert index.to_coco() == clean.to_coco()
        # Damage outside the data (a time inside the archive) may go unnoticed; wrong data may not.
        assert index.origin == "current" or any("is damaged" in line for line in lines)
        assert AnnotationIndex.open(file).origin == "current"


OPEN = "import sys; from data_sets.index import AnnotationIndex as A; i = A.open(sys.argv[1], lambda s: print(s, file=sys.stderr)); "
OPEN += "print(i.origin, i.stored_in, len(i.boxes))"


def start(file: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **options.pop("env", {})}
    command = [sys.executable, "-c", OPEN, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_processes_at_once_pack_once(tmp_path):
    file = tmp_path / "instances_train2017.json"
    measured.generate(file, 2_000, 10_000, lambda line: None)
    assert file.stat().st_size > index_module.PARSE_HERE_BYTES  # so this also covers the child that parses
    running = [start(file) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], answers
    assert sorted(answer.split()[0] for answer, _ in answers) == ["current", "current", "packed"], answers
    assert {answer.split()[2] for answer, _ in answers} == {"10000"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_error_of_the_child_reaches_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "PARSE_HERE_BYTES", 0)
    with pytest.raises(UserError, match="category id 3 stands twice"):
        opened(tmp_path, coco(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]))
    assert opened(tmp_path, coco()).origin == "packed"


@contextlib.contextmanager
def unprivileged():
    """As an ordinary user for a while: root may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_folder_that_cannot_be_written(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies below a folder that only its owner may enter
        folder, cache = Path(name) / "data", Path(name) / "cache"
        folder.mkdir()
        cache.mkdir()
        file = write(folder, coco())
        for path, mode in ((Path(name), 0o755), (cache, 0o777), (folder, 0o555)):
            path.chmod(mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for expected in ("packed", "current"):
            lines = []
            with unprivileged():
                index = AnnotationIndex.open(file, lines.append)
            assert index.origin == expected and index.stored_in.parent == cache / "ssd-zoo"
            assert any("cannot be written" in line for line in lines) == (expected == "packed")
        assert [path.name for path in folder.iterdir()] == ["annotations.json"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        with unprivileged(), pytest.raises(UserError, match="set XDG_CACHE_HOME"):
            AnnotationIndex.open(file)
        folder.chmod(0o755)
        assert AnnotationIndex.open(file).stored_in.parent == folder


def figures(coco_api, detections: list) -> list[float]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_api, coco_api.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_coco_figures_equal_those_of_the_raw_file(tmp_path):
    from pycocotools.coco import COCO

    raw = GOLDEN / "coco_gt.json"
    index = AnnotationIndex.open(write(tmp_path, raw.read_text()))
    assert counts(index) == {}
    detections = json.loads((GOLDEN / "coco_detections.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        from_raw, from_index = COCO(str(raw)), COCO()
        from_index.dataset = index.to_coco()
        from_index.createIndex()
    assert figures(from_index, detections) == figures(from_raw, detections)
    expected = json.loads((GOLDEN / "coco_stats.json").read_text())
    np.testing.assert_allclose(figures(from_index, detections), [expected[name] for name in FIGURES], rtol=0, atol=1e-9)


# The commands


def test_tool_prints_counts_and_reasons(tmp_path, capsys):
    folder = tmp_path / "annotations"
    with pytest.raises(UserError, match="--demo-data"):
        index_tool.main(["--data_dir", str(tmp_path)])
    for made in ("annotations", "train2017", "val2017"):
        (tmp_path / made).mkdir()
    write(folder, changed("annotations", 0, bbox=[1, 2, 0, 4]), "instances_train2017.json")
    with pytest.raises(UserError, match="instances_train2017.json is there and no validation part"):
        index_tool.main(["--data_dir", str(tmp_path)])
    write(folder, coco(), "instances_val2017.json")
    assert index_tool.main(["--data-dir", str(tmp_path)]) == index_tool.main(["--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"1 × box width or height <= 0", out) and '"bbox": [1, 2, 0, 4]' in out and "packed in" in out and "current in" in out


def test_opening_imports_no_torch():
    code = "import sys, data_sets.index, data_sets.pack; sys.exit(any(m.split('.')[0] in ('torch', 'PIL') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_bench_reports_a_missed_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "IMAGES", 200)
    monkeypatch.setattr(measured, "BOXES", 500)
    monkeypatch.setattr(measured, "OPENINGS", 2)
    assert bench.main(["--part", "index", "--json", str(tmp_path / "figures.json")]) == 0
    monkeypatch.setattr(measured, "OPEN_SECONDS", 0.0)
    assert bench.main(["--part", "index"]) == 1
    assert "MISS" in capsys.readouterr().out
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["machine"]["cores"] and all(figure["ok"] for figure in content["parts"][0]["figures"])


@pytest.mark.long
def test_size_of_coco_train_meets_the_limits():
    assert bench.main(["--part", "index"]) == 0

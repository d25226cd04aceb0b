"""`python -m base report`: its page against the records of a real run, of a long one, of several, and of damaged folders."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from base.__main__ import main
from base.backend import load_backend
from base.config import Config, Resolved, read_run
from base.contracts import FIGURES
from base.records import config_text
from data_sets.coverage import model_boxes
from pages.charts import Line, line_chart, thinned, ticks
from report.batches import BATCHES, IMAGES
from report.detected import agreement
from report.folder import read_folder
from tests.conftest import start_training

HOSTILE = '<script>alert("1")</script> & \x1b[31m'
VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Every tag with its attributes and the section it stands in, the text of each section, and whether tags close as they open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.section, self.texts = [], [], "", {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self.section = dict(attributes)["id"]
        self.tags.append((self.section, tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((self.section, tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "p", "li", "h2", "h3", "figcaption"):
            self.handle_data("\n")

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def row(self, section: str, first: str) -> str:
        """What stands in the table cell after the one that says ``first``."""
        cells = self.texts[section].split("\n")
        return next(after for cell, after in zip(cells, cells[1:], strict=False) if cell.strip() == first)


def report(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["report", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def opened(file: Path) -> Page:
    """A page, held to what every page has to be: whole, small, alone, with a name for each picture and a target for each link."""
    text = file.read_text(encoding="utf-8")
    found = Page(text)
    assert len(text.encode()) < 5_000_000 and "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", text)
    tags = {tag for _, tag, _ in found.tags}
    assert {"script", "link", "iframe"}.isdisjoint(tags) and {"main", "nav", "h1", "h2"} <= tags
    ids = [a["id"] for _, _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"] for _, tag, a in found.tags if tag == "a"} <= {f"#{name}" for name in ids}
    assert all(a["alt"] and a["src"].startswith("data:image/jpeg;base64,") for _, tag, a in found.tags if tag == "img")
    assert all("aria-label" in a or "aria-hidden" in a for _, tag, a in found.tags if tag == "svg")
    return found


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory) -> Path:
    """A real run of 4 steps on the reference; its target is reached by any detector."""
    folder = tmp_path_factory.mktemp("report")
    flags = ["--max_steps", "4", "--target", "0", "--log_every", "1", "--workers", "1"]
    done = start_training(folder, demo_data, flags).wait_done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_page_of_a_run_says_what_its_records_say(run, capsys):
    code, printed = report(capsys, run, "--workers", 0)
    assert code == 0 and "report.html" in printed, printed
    page, lines = opened(run / "report.html"), records(run)
    (evaluation,), end = ([line for line in lines if line["kind"] == kind] for kind in ("evaluation", "end"))
    assert page.row("summary", "mAP") == f"{evaluation['AP']:.4f} after epoch 1"
    assert page.row("summary", "epochs to target") == "1" and page.row("summary", "steps") == f"{end[0]['steps']}" == "4"
    rate = next(line for line in reversed(lines) if line["kind"] == "train")["images_per_second"]
    assert page.row("summary", "images/s") == f"{rate:,.1f} in training, up to step 4"
    assert page.row("summary", "images per joule").startswith("not measured (")
    stamps = {event["key"]: event["time_ms"] for event in map(json.loads, (line.split(" ", 1)[1] for line in (run / "mlperf.log").open()))}
    bounds = "from MLPerf's run_start to run_stop, breaks included"
    assert page.row("summary", "time to target by MLPerf's log") == f"{(stamps['run_stop'] - stamps['run_start']) / 1e3:,.1f} s {bounds}"
    assert page.row("summary", "images/s, raw") == f"{end[0]['images_per_second_raw']:,.1f} {bounds}"
    assert page.row("throughput", "of it waiting for data").startswith(f"{end[0]['data_seconds']:,.1f} s, ")
    parts = [page.row("throughput", name) for name in ("training, 4 steps", "evaluation", "checkpoints and the rest")]
    seconds = [float(part.split(" ")[0].replace(",", "")) for part in parts]
    assert sum(seconds) == pytest.approx(end[0]["seconds"], abs=0.2) and min(seconds) >= 0
    assert page.row("throughput", "of it backward pass") == "not measured (not recorded)"
    assert f"mAP {evaluation['AP']:.4f}, AP50 {evaluation['AP50']:.4f}" in page.texts["classes"]  # evaluated again, by the page
    assert page.row("components", "matcher") == "reference" and "the reference itself" in page.texts["components"]
    assert page.row("configuration", "batch_size") == "8" and "--batch_size" in page.texts["configuration"]
    assert page.row("environment", "packages.numpy") == np.__version__
    assert "missing" not in page.texts and "images/s" in page.texts["log"]
    for section in ("detections", "batches"):
        assert any(tag == "img" for where, tag, _ in page.tags if where == section), page.texts[section]


def test_the_first_batches_are_those_of_the_loader(run, capsys, tmp_path):
    assert report(capsys, run, "--workers", 0, "--out", tmp_path / "page.html")[0] == 0
    page, config, backend = opened(tmp_path / "page.html"), read_run(run / "config.yaml"), load_backend("reference")
    loader = backend.train_loader(
        annotation_file=config.path("train_annotations"), image_dir=config.path("train_images"), image_size=config.image_size,
        batch_size=config.batch_size, workers=0, seed=config.seed,
    )  # fmt: skip
    boxes, matched, names = 0, 0, []
    for batch in islice(loader, BATCHES):
        targets = backend.matcher(batch.boxes, batch.labels, model_boxes(config.image_size, config.strides))
        boxes, matched = boxes + int((batch.labels[:IMAGES] > 0).sum()), matched + int((targets.labels[:IMAGES] > 0).sum())
        names += [f"{number:012d}" for number in batch.image_ids[:IMAGES].tolist()]
    drawn = [a for where, tag, a in page.tags if where == "batches" and tag == "path" and "stroke" in a]
    assert sum("class" not in a for a in drawn) == boxes > 0 and sum(a.get("class") == "thin" for a in drawn) == matched > boxes
    shown = [a["alt"] for where, tag, a in page.tags if where == "batches" and tag == "img"]
    assert [alt.partition(".")[0] for alt in shown] == names


def test_detections_are_right_once_and_only_of_their_class():
    class Index(SimpleNamespace):
        def ltrb(self, image):
            return np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32), np.array([1, 2])

    index = Index(image_ids=np.array([7]), crowd=np.array([False, False]), first_box=np.array([0, 2]))
    boxes = np.array([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1]], np.float32)
    arrays = {
        "ids": np.array([7]),
        "counts": np.array([4]),
        "boxes": boxes,
        "labels": np.array([1, 1, 1, 2]),
        "scores": np.array([0.9, 0.8, 0.7, 0.2]),
    }
    ((quality, score, image, sure),) = agreement(SimpleNamespace(index=index, arrays=arrays))
    assert sure.tolist() == [[0, 1], [1, 0], [2, 0]] and (image, score) == (0, pytest.approx(0.8))  # the last is below the score
    assert quality == 2 * 1 / (3 + 2)


def test_verdicts_are_those_of_verify(run, capsys, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("checkpoints"))
    rows = [
        {"component": "loss", "check": "golden: loss", "supplied_by": "reference", "passed": True},
        {"component": "decoder", "check": HOSTILE, "supplied_by": "reference", "passed": False},
        {"component": "decoder", "check": "b", "supplied_by": "reference", "passed": True},
        {"component": "step", "check": "c", "supplied_by": "acme", "passed": True},
    ]
    (tmp_path / "verify-reference").mkdir()
    file = tmp_path / "verify-reference" / "verify.json"
    file.write_text(json.dumps({"about": {"commit": HOSTILE}, "rows": rows, "speeds": {"loss": 1.5}}))
    assert report(capsys, copied, "--no-pictures")[0] == 0
    text = opened(copied / "report.html").texts["components"]
    assert "loss\nreference\npassed 1 checks\n1.50 ×" in text and "FAILED 1 of 2 checks: <script>" in text
    assert "step\nreference\nnot verified (it is of acme's)" in text and "run\nall of them together\nnot verified" in text
    file.write_text('{"rows": [')
    assert report(capsys, copied, "--no-pictures")[0] == 0
    assert "cannot be read" in opened(copied / "report.html").texts["components"]


def written(folder: Path, steps: int, seed: int = 1, reached: int | None = 50, **changes) -> Path:
    """The records of a long run, as a run writes them: 120 steps an epoch, evaluations after every 5th, the target after ``reached``."""
    (folder / "checkpoints").mkdir(parents=True)
    config = Config(seed=seed, batch_size=1024, log_every=1, **changes)
    (folder / "config.yaml").write_text(config_text(Resolved(config, {"seed": f"--seed # {HOSTILE[:30]}"}), "cpu"), encoding="utf-8")
    facts = {"backend": "cpu", "host": HOSTILE, "device": "cpu", "components": {"loss": "cpu"}, "packages": {"torch": "2.15.0"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        epoch = (step - 1) // 120 + 1
        loss = 3 + 20 * np.exp(-step / 500) + rng.normal(0, 0.2) + 40 * (step == 5000)
        line = {"kind": "train", "time": 1.7e9 + step * 0.2, "step": step, "epoch": epoch, "loss": loss, "learning_rate": 0.08}
        lines.append(line | {"images_per_second": 5120.0 + seed, "data_seconds": 0.001})
        if step % 600 == 0:
            ap = min(0.3, 0.23 * epoch / (reached or 1000))
            lines.append({"kind": "evaluation", "time": line["time"], "step": step, "epoch": epoch, "seconds": 10.0, **dict.fromkeys(FIGURES, ap)})
    lines.append({"kind": "end", "time": 1.8e9, "reached": reached is not None, "steps": steps, "seconds": steps * 0.21 + seed})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mlperf.log").write_text(":::MLLOG " + json.dumps({"key": "train_samples", "value": 117_266, "time_ms": 1}) + "\n")
    (folder / "log.txt").write_text(f"{HOSTILE}\n")
    return folder


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    folder = written(tmp_path_factory.mktemp("long") / f"run {html.escape(HOSTILE[:8])}".replace("/", ""), 10_000)
    assert main(["report", str(folder)]) == 0
    return folder


def test_ten_thousand_steps_stay_small_and_nothing_of_them_is_lost(long_run):
    page = opened(long_run / "report.html")
    assert (long_run / "report.html").stat().st_size < 300_000
    loss = next(a["aria-label"] for where, tag, a in page.tags if where == "curves" and tag == "svg" and a.get("aria-label", "").startswith("Loss"))
    highest = max(line["loss"] for line in records(long_run) if line["kind"] == "train")
    assert highest > 40 and "10,000 records" in loss and loss.endswith(f"to {highest:.4g}")
    assert page.row("environment", "host") == '<script>alert("1")</script> & �[31m' and "<script>" in page.texts["log"]
    assert page.texts["configuration"].count("--seed # <script>") == 1 and page.row("configuration", "seed") == "1"
    assert "1,024\n50\n50\nwithin" in page.texts["convergence"]
    assert "does not exist" in page.texts["classes"] or "has no checkpoint" in page.texts["classes"]
    assert "checkpoints/ has no checkpoint" in page.texts["missing"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("which", ["run", "long_run"])
def test_a_browser_opens_it_at_once_and_nothing_sticks_out(which, request, tmp_path, capsys):
    """Measured by a script that this test adds: the page itself lets none run."""
    folder, frames = request.getfixturevalue(which), []
    if which == "run":
        assert report(capsys, folder, "--workers", 0)[0] == 0
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (folder / "report.html").read_text(encoding="utf-8"))
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    for width in (390, 800, 1400):
        frames.append(f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>')
    script = """<script>addEventListener("load", () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
      const page = frame.contentDocument.documentElement, timing = frame.contentWindow.performance.getEntriesByType("navigation")[0];
      return [frame.clientWidth, page.scrollWidth, timing.domComplete] })) })</script>"""
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title>nothing</title>{''.join(frames)}{script}", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
               "--dump-dom", f"file://{tmp_path / 'frame.html'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert [wide for wide, _, _ in found] == [390, 800, 1400]
    assert all(inner <= wide for wide, inner, _ in found), found
    assert min(took for _, _, took in found) <= 2000, found  # milliseconds; the three load at once, on a machine that may be busy


def test_runs_beside_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [written(tmp_path / name, 1200, seed, 10, runs_dir=name) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    other = written(tmp_path / "other", 1200, 4, None, weight_decay=1e-4)
    assert report(capsys, *folders, other)[0] == 0
    page = opened(tmp_path / "runs" / "report.html")
    assert "weight_decay\n≠\n0.0005\n0.0005\n0.0005\n0.0001" in page.texts["configuration"]
    assert "≠" not in page.texts["environment"] and "Nothing differs" in page.texts["environment"]
    assert "images/s\n≠\n5,121.0 in training, up to step 1,200\n5,122.0 in training, up to step 1,200 (+0.0%)" in page.texts["figures"]
    assert "3 trials of one configuration: a, b, c; seeds 1, 2, 3" in page.texts["trials"]
    (spread,) = (a["aria-label"] for where, tag, a in page.tags if where == "trials" and tag == "svg")
    assert "time to target, s (3 of 3 runs): median 254, 253 to 255, 3 values" in spread
    assert sum(tag == "circle" for where, tag, _ in page.tags if where == "trials") == 12
    assert "a\n1,024\n10\n50\nfewer epochs: -80.0%" in page.texts["convergence"]
    staged = tmp_path / "staged"
    for number in (1, 2, 10):
        written(staged / f"stage-{number}", 20, number)
    shutil.copy(staged / "stage-1" / "config.yaml", staged)
    assert report(capsys, staged)[0] == 0
    assert "staged/stage-2\nstaged/stage-10" in opened(staged / "report.html").texts["figures"]


def test_a_damaged_folder_gives_what_is_there(run, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    metrics = whole / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(["[1]\n", '{"kind": "train", "loss": NaN}\n', *lines[:3], lines[3][:20]]))
    (whole / "environment.json").write_text("{")
    for file in ("mlperf.log", "log.txt"):
        (whole / file).unlink()
    for file in (whole / "checkpoints").glob("*.pt"):
        file.write_bytes(b"no")
    with (whole / "config.yaml").open("a") as file:
        file.write("unheard_of: 3  # a file\n")
    code, printed = report(capsys, whole)
    assert code == 0, printed
    page = opened(whole / "report.html")
    gone = ["mlperf.log cannot be read", "log.txt cannot be read", "no checkpoint of"]
    spoilt = [
        "2 of 5 lines cannot be used, the first is line 1",
        "the last line is cut off",
        "environment.json is not whole",
        "unknown key 'unheard_of'",
    ]
    for text in gone + spoilt:
        assert text in page.texts["missing"] and text in printed, text
    assert page.row("summary", "mAP") == "not measured (no evaluation yet)" and page.row("summary", "time") == "not measured (the run has no end)"
    assert page.row("configuration", "unheard_of") == "3" and "no end is recorded" in page.texts[""]
    assert "environment.json does not say which backend" in page.texts["classes"]
    assert len(read_folder(whole).lines["train"]) == sum('"kind": "train"' in line for line in lines[:3])
    for file in whole.glob("*.json*"):
        file.unlink()
    (whole / "config.yaml").write_bytes(b"\xff\x00: [")
    assert report(capsys, whole)[0] == 0 and opened(whole / "report.html")


def test_no_run_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "none", "it does not exist"), (tmp_path / "file", "it is a file"), (tmp_path, "it has no config.yaml")):
        code, said = report(capsys, path)
        assert code == 2 and f"{path} is no run's folder: {message}" in said


def test_a_chart_keeps_the_extremes():
    x = np.arange(100_000.0)
    y = np.sin(x / 9) + (x == 77_777) * 50 - (x == 3) * 50
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= 600 and (few_y.max(), few_y.min()) == (y.max(), y.min()) and (np.diff(few_x) > 0).all()
    assert (y[few_x.astype(int)] == few_y).all()
    assert thinned([1, 2, 3], [1, float("nan"), 2])[0].tolist() == [1, 3]
    assert ticks(0, 23) == [0, 5, 10, 15, 20, 25] and ticks(5, 5)[0] < 5 < ticks(5, 5)[-1]
    chart = line_chart("a < b", [Line("one", [1, 2, 3], [0, 5, 10]), Line("none", [], [])], aim=(5.0, "half"))
    assert 'd="M0.0 1000.0 500.0 500.0 1000.0 0.0"' in chart and 'class="aim" d="M0 500.0H1000"' in chart and "a &lt; b" in chart
    assert "not measured" in line_chart("nothing", [Line("none", [], [])])

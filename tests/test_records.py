"""docs/records.md says what is there: each file and field of a real run is on the page, and nothing is on it that no code writes."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from base import checkpoint
from base.__main__ import TOOLS
from base.checkpoint import Progress
from base.contracts import FIGURES
from conformance.verify import Row
from data_sets.index import ARRAYS, AnnotationIndex
from tests.conftest import ROOT, start_training

PAGE = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
CODE = "".join(path.read_text(encoding="utf-8") for room in ("base", "reference") for path in sorted((ROOT / room).glob("*.py")))
NAME = re.compile(r"`([^`\n]+)`")
COMMON = {"kind", "time"}


def section(title: str) -> str:
    """The text below a heading, to the next one of its level or above."""
    level, text = re.search(rf"^(#+) {re.escape(title)}\n(.*)", PAGE, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", text, flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, str]:
    """Names in the first column of the section's table → the rest of their row."""
    lines = [line.strip("|").split("|", 1) for line in text.splitlines() if line.startswith("| ")]
    return {name: rest for first, rest in lines for name in NAME.findall(first)}


@pytest.fixture(scope="module")
def run(demo_data, tmp_path_factory) -> Path:
    """A run with evaluation and telemetry, by a backend that has a sensor here."""
    folder = tmp_path_factory.mktemp("records")
    flags = ["--name", "cpu", "--device", "cpu", "--image_size", "64", "64", "--max_steps", "6", "--target", "null", "--log_every", "1"]
    done = start_training(folder, demo_data, [*flags, "--workers", "0", "--telemetry_seconds", "0.1"]).wait_done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_every_file_of_a_run_is_named(run):
    there = rows(section("The folder of a run"))
    assert there.keys() == {path.name for path in run.iterdir()}
    for path in (run / "checkpoints").iterdir():
        assert re.sub(r"\d", "N", path.name) in NAME.findall(there["checkpoints"])
    assert set(json.loads((run / "environment.json").read_text())) == rows(section("`environment.json`")).keys()


def test_every_kind_of_line_is_on_the_page():
    kinds = set(re.findall(r'\bmetric\("(\w+)"', CODE))
    assert kinds == set(re.findall(r"^### `(\w+)`", PAGE, re.MULTILINE)) and {"train", "evaluation", "end"} < kinds


@pytest.mark.parametrize("kind", re.findall(r"^### `(\w+)`", PAGE, re.MULTILINE))
def test_the_fields_of_a_line_are_on_the_page_and_no_others(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written, told = {key for line in lines if line["kind"] == kind for key in line} - COMMON, rows(section(f"`{kind}`"))
    assert written and written <= told.keys()
    for name in told.keys() - written:
        made = rf'"{name}":|\b{name}=|\bmark\("{name.removesuffix("_seconds")}"\)'
        assert "left out" in told[name] and re.search(made, CODE), f"{name} is in no line of kind {kind}"
    assert kind != "evaluation" or list(told)[-12:] == list(FIGURES)


def test_the_keys_of_mlperfs_log_are_on_the_page(run):
    events = [json.loads(line.partition(" ")[2]) for line in (run / "mlperf.log").read_text().splitlines()]
    told, told_of_lines = section("`mlperf.log`").split("The keys:")[::-1]
    keys = {event["key"] for event in events}
    assert keys <= set(NAME.findall(told)) and events[0].keys() <= set(NAME.findall(told_of_lines))
    assert set(re.findall(r"\b(?:submission|opt|init|run|block|epoch|eval)_\w+", told)) <= keys


def test_what_a_checkpoint_holds_is_on_the_page(run):
    content, told = checkpoint.read(run / "checkpoints" / "best.pt"), rows(section("Checkpoints"))
    assert told.keys() == content.keys() and content["progress"].keys() == {field.name for field in fields(Progress)}
    for key in ("progress", "categories"):
        assert content[key].keys() == set(NAME.findall(told[key]))
    assert {name.partition(".")[0] for name in content["model"]} == {name.partition(".")[0] for name in NAME.findall(told["model"])}


def test_the_arrays_of_an_index_are_on_the_page(demo_data):
    told = rows(section("Annotations"))
    assert told.keys() == {*ARRAYS, "head"}
    index = AnnotationIndex.open(demo_data / "annotations" / "instances_val2017.json")
    for name in ARRAYS:
        assert getattr(index, name).dtype.name in told[name]


def test_what_tools_write_is_on_the_page():
    text = section("What tools write")
    row, figure = text.split("A row of")[1].split("A figure of")
    assert {field.name for field in fields(Row)} <= set(NAME.findall(row))
    Figure = importlib.import_module(TOOLS["bench"][0]).Figure
    assert {"ok", *(field.name for field in fields(Figure))} == set(NAME.findall(figure))

"""docs/recipes.md: its tables are what the configuration files say, none of which it leaves out, and its example is one."""

import re
from decimal import Decimal

import pytest

from base.backend import backend_folder, list_backends
from base.config import RECIPES, Config, list_configs, resolve
from base.schedule import evaluates_after, scaled_rate
from planning.formulas import CONVERGENCE
from tests.conftest import ROOT
from tests.test_docs import BLOCK

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
NAME = re.compile(r"`([^`\n]+)`")


def table(title: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading, by its head."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))
    return [dict(zip(head, row, strict=True)) for row in rows]


def told(config: Config) -> dict[str, str]:
    """The columns of the first table, as numbers are written there."""
    warmup = f"{config.warmup_epochs} epochs" if config.warmup_epochs else f"{config.warmup_steps} steps" if config.warmup_steps else "none"
    evaluations = [epoch for epoch in range(1, config.epochs + 1) if evaluates_after(config, epoch)]
    regular = {tuple(range(5, config.epochs + 1, 5)): "5", (40, *range(50, config.epochs + 1, 5)): "40 50 55 …"}
    decays = " ".join(map(str, config.decay_epochs)) + (f", × {config.decay_factor}" if config.decay_factor != 0.1 else "")
    return {
        "nodes × devices": f"{config.nodes}×{config.devices}", "batch a device": f"{config.batch_size}", "global batch": f"{config.global_batch}",
        "warm-up": warmup, "decay epochs": decays, "epochs": f"{config.epochs}", "evaluated": regular.get(tuple(evaluations), f"{evaluations}"),
    }  # fmt: skip


@pytest.mark.parametrize("row", table("As published"), ids=lambda row: " ".join(NAME.findall(row["backend"] + row["configuration"])))
def test_a_row_is_what_its_file_says(row):
    (backend,), (name,) = (NAME.findall(row[key]) for key in ("backend", "configuration"))
    config = resolve(backend_folder(backend), name).config
    assert {key: row[key] for key in told(config)} == told(config)
    assert float(row["rate"]) == config.learning_rate and float(row["weight decay"]) == config.weight_decay
    assert Decimal(row["scaled"]) == Decimal(repr(round(scaled_rate(config), 12)))
    same = ("image_size", "strides", "backbone", "target", "momentum", "warmup_factor", "score_threshold", "iou_threshold", "max_detections")
    assert all(getattr(config, key) == getattr(Config(), key) for key in same)


def test_every_configuration_is_on_the_page():
    named = {(NAME.findall(row["backend"])[0], NAME.findall(row["configuration"])[0]) for row in table("As published")}
    neutral = {path.stem for path in RECIPES.glob("*.yaml")}
    for row in table("Of this project"):
        backends = NAME.findall(row["backend"]) or list_backends()
        named |= {(backend, name) for backend in backends for name in NAME.findall(row["configuration"])}
    wanted = {(backend, name) for backend in list_backends() for name in (*list_configs(backend_folder(backend)), *neutral)}
    assert named == wanted


def test_the_example_is_a_configuration(tmp_path):
    ((path, _, text),) = (block for block in BLOCK.findall(PAGE) if block[1] == "yaml")
    place = tmp_path / path
    place.parent.mkdir(parents=True)
    place.write_text(text, encoding="utf-8")
    config = resolve(place.parents[1], place.stem).config
    assert config.global_batch == int(re.search(r"global batch (\d+)", text)[1]) and not (ROOT / path).exists()


def test_mlperfs_points_are_those_that_plans_use():
    text = re.search(r"MLPerf's points are (.*?)\.", PAGE, re.DOTALL)[1]
    found = {int(batch): (int(few), int(most or few)) for few, most, batch in re.findall(r"(\d+)(?: to (\d+))? at (\d+)", text)}
    assert found == CONVERGENCE

"""`python -m base predict` and `evaluate`: from files as people have them to pictures, JSON and figures."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from base.backends.reference.images import read_rgb
from PIL import Image

from base import checkpoint
from base.__main__ import main
from base.backend import load_backend
from base.checkpoint import Progress
from base.config import Config
from base.tools.detector import coco_categories, open_checkpoint
from base.tools.predict import draw
from base.weights import from_mlperf, to_mlperf
from data_sets.index import AnnotationIndex
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def weights(tmp_path_factory, demo_data) -> Path:
    """A checkpoint of a model with random weights, of the demo's classes."""
    torch.manual_seed(4)
    backend = load_backend("reference")
    config = Config(image_size=(96, 96), strides=(1,) * 6, backbone="resnet18", data_dir=str(demo_data), norm_ranks=4, devices=8)
    index = AnnotationIndex.open(config.path("val_annotations"))
    categories = {"ids": index.category_ids.tolist(), "names": list(index.category_names)}
    model = backend.model(num_classes=len(categories["ids"]) + 1, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18")
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device="cpu")
    path = tmp_path_factory.mktemp("weights") / "run/checkpoints/step-000000000.pt"
    checkpoint.write(path, checkpoint.pack(config, Progress(), categories, model, optimizer, step, []))
    return path


@pytest.fixture
def pictures(tmp_path, demo_data):
    """A folder as cameras and downloads leave it."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    pixels = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels[..., 0]).save(folder / "grey.PNG")
    Image.open(sorted((demo_data / "val2017").iterdir())[0]).save(folder / "deeper" / "one.jpg")
    (folder / "note.txt").write_text("no picture")
    return folder


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_pictures_and_detections(weights, pictures, tmp_path, name, capsys):
    out = tmp_path / "out"
    assert run("--checkpoint", weights, "--name", name, "--device", "cpu", "--score", 0.01, "--batch_size", 2, pictures, "--out", out) == 0
    said = capsys.readouterr().out
    assert sorted(path.relative_to(out) for path in out.rglob("*.*")) == [
        Path("deeper/one.jpg"), Path("detections.json"), Path("grey.jpg"), Path("turned.jpg"),
    ]  # fmt: skip
    assert Image.open(out / "turned.jpg").size == (60, 90)
    drawn, plain = (np.asarray(read_rgb(file)).astype(int) for file in (out / "turned.jpg", pictures / "turned.jpg"))
    assert (np.abs(drawn - plain) > 64).any(2).mean() > 0.02
    rows = json.loads((out / "detections.json").read_text())
    assert f"3 images, {len(rows)} detections" in said and len(rows) > 10
    detector = open_checkpoint(weights, "reference", "cpu")
    for file in (pictures / "turned.jpg", pictures / "grey.PNG", pictures / "deeper/one.jpg"):
        image = read_rgb(file)
        small = torch.from_numpy(np.array(image.resize((96, 96), Image.Resampling.BILINEAR)))[None]
        [want] = detector.backend.decoder(detector.step.predict(small), detector.model.default_boxes, 0.01)
        mine = [row for row in rows if row["file_name"] == str(file)]
        assert len({row["image_id"] for row in mine}) == 1 and {row["category_id"] for row in mine} <= set(detector.category_ids)
        assert abs(len(mine) - len(want.scores)) <= 3
        assert mine[0]["score"] == pytest.approx(want.scores[0].item(), abs=0.01)
        corners = np.array([row["bbox"] for row in mine])
        corners[:, 2:] += corners[:, :2]
        best = want.boxes[0].numpy() * (*image.size, *image.size)
        assert np.abs(corners - best).max(1).min() < 1  # pixels


def test_boxes_of_weights_that_ran_away_are_drawn_to_the_edges(pictures, tmp_path):
    boxes = [[-math.inf, -1e30, math.inf, 1e30], [0.2, 0.2, 0.8, 0.8]]
    draw(pictures / "turned.jpg", tmp_path / "drawn.jpg", boxes, [1, 1], [0.5, 0.9], ["shape"])
    assert Image.open(tmp_path / "drawn.jpg").size == (60, 90)


def test_what_cannot_be_read_is_named_and_the_rest_is_done(weights, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes(b"no picture at all")
    whole = (pictures / "turned.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert run("--checkpoint", weights, "--name", "reference", "--device", "cpu", pictures, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert f"not read: {pictures / 'broken.jpg'}" in said.err and f"not read: {pictures / 'cut.jpg'}" in said.err
    assert "3 images" in said.out and (tmp_path / "out/grey.jpg").exists() and not (tmp_path / "out/cut.jpg").exists()


def test_requests_that_cannot_be_met(weights, pictures, tmp_path, capsys):
    given = ("--checkpoint", weights, "--device", "cpu", "--out", tmp_path / "out")
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("")
    Image.new("RGB", (9, 9)).save(tmp_path / "turned.png")
    for arguments, says in [
        ((tmp_path / "missing",), "missing does not exist"),
        ((tmp_path / "none",), "no image there"),
        ((pictures / "turned.jpg", tmp_path / "turned.png"), "would both become turned.jpg"),
        ((pictures, "--score", 2), "--score 2.0 is not within 0 and 1"),
        ((pictures, "--out", tmp_path / "file" / "out"), "cannot be written"),
    ]:
        assert run(*given, *arguments) == 2
        assert says in capsys.readouterr().err


def test_an_mlperf_checkpoint_detects_cocos_classes(tmp_path, pictures, golden):
    state = {name: torch.randn(shape) * 0.01 if len(shape) else torch.tensor(0) for name, shape in golden("mlperf_state_dict")}
    state |= {name: tensor.abs() for name, tensor in state.items() if name.endswith("running_var")}
    torch.save({"model": state}, tmp_path / "mlperf.pt")
    given = ("--checkpoint", tmp_path / "mlperf.pt", "--device", "cpu", "--score", 0.001, pictures / "grey.PNG", "--out", tmp_path / "out")
    assert run("--name", "reference", *given) == 0
    rows = json.loads((tmp_path / "out/detections.json").read_text())
    truth = json.loads((GOLDEN / "coco_gt.json").read_text())
    assert rows and {row["category_id"] for row in rows} <= set(coco_categories()["ids"])
    assert {category["id"] for category in truth["categories"]} <= set(coco_categories()["ids"])


def test_evaluate_prints_the_figures_and_each_class(weights, demo_data, capsys):
    assert main(["evaluate", "--checkpoint", str(weights), "--name", "reference", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = json.loads((demo_data / "annotations/instances_val2017.json").read_text())["categories"]
    assert [line.split()[0] for line in lines[:3]] == ["AP", "AP50", "AP75"] and lines[13].split() == ["class", "AP", "AP50"]
    each = {line.rsplit(None, 2)[0]: float(line.split()[-2]) for line in lines[14:]}
    assert sorted(each) == sorted(category["name"] for category in names)
    assert np.mean(list(each.values())) == pytest.approx(float(lines[0].split()[1]), abs=1e-4)


def test_a_runs_folder_stands_for_its_checkpoint(weights, pictures, tmp_path, capsys):
    found = []
    for number, place in enumerate((weights, weights.parents[1])):
        out = tmp_path / str(number)
        assert main(["evaluate", "--checkpoint", str(place), "--device", "cpu"]) == 0
        figures = capsys.readouterr().out.splitlines()
        assert run("--checkpoint", place, "--device", "cpu", "--score", 0.1, pictures / "grey.PNG", "--out", out) == 0
        assert main(["export", "--checkpoint", str(place), "--out", str(out / "theirs.pt")]) == 0
        weight = torch.load(out / "theirs.pt", weights_only=True)["model"]["model.layer1.0.weight"]
        capsys.readouterr()
        found.append((figures, (out / "detections.json").read_text(), weight.sum().item()))
    assert found[0] == found[1]
    for command in (["evaluate"], ["predict", str(pictures), "--out", str(tmp_path)], ["export", "--out", str(tmp_path / "x.pt")]):
        assert main([*command, "--checkpoint", str(pictures)]) == 2
        assert f"{pictures} has no checkpoint in it" in capsys.readouterr().err


# Export

EXPORTED = {"detections.onnx": (), "dense.onnx": ("--dense",), "program.pt2": ()}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_detects_the_same(weights, tmp_path, name, capsys):
    assert main(["export", "--checkpoint", str(weights), "--out", str(tmp_path / name), *EXPORTED[name]]) == 0
    said = capsys.readouterr().out
    assert "the same as PyTorch's" in said and int(said.split("; ")[1].split()[0]) > 100


def test_any_number_of_images_and_none_found(weights, tmp_path):
    file = tmp_path / "few.onnx"
    assert main(["export", "--checkpoint", str(weights), "--out", str(file), "--score", "0.3", "--no-check"]) == 0
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [("images", "tensor(uint8)")]
    images = np.random.default_rng(5).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    image, boxes, labels, scores = session.run(None, {"images": images})
    assert set(image.tolist()) == set(range(5)) and len(image) == len(boxes) == len(labels) == len(scores) and scores.min() > 0.3
    assert (np.diff(image) >= 0).all() and all((np.diff(scores[image == n]) <= 0).all() for n in range(5))
    for n in range(5):
        alone = session.run(None, {"images": images[n : n + 1]})
        assert np.array_equal(alone[2], labels[image == n]) and np.allclose(alone[3], scores[image == n], atol=1e-5)
    assert main(["export", "--checkpoint", str(weights), "--out", str(file), "--score", "1", "--no_check"]) == 0
    nothing = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"images": images})
    assert [len(output) for output in nothing] == [0] * 4


def test_mlperfs_layout_and_back(weights, tmp_path, golden, capsys):
    backend = load_backend("reference")
    model = backend.model(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet34")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name: tuple(shape) for name, shape in golden("mlperf_state_dict")} == {name: tuple(t.shape) for name, t in to_mlperf(state).items()}
    back = from_mlperf(to_mlperf(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert main(["export", "--checkpoint", str(weights), "--out", str(tmp_path / "theirs.pt")]) == 0
    assert "read back and the same" in capsys.readouterr().out
    theirs, ours = torch.load(tmp_path / "theirs.pt", weights_only=True)["model"], checkpoint.read(weights)["model"]
    assert torch.equal(theirs["model.layer1.0.weight"], ours["backbone.conv1.weight"])


def test_exports_that_cannot_be(weights, tmp_path, monkeypatch, capsys):
    assert main(["export", "--checkpoint", str(weights), "--out", str(tmp_path / "x.h5")]) == 2
    assert "must end in .onnx, .pt2 or .pt" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", "--checkpoint", str(weights), "--out", str(tmp_path / "x.onnx")]) == 2
    assert "-m pip install onnx onnxscript onnxruntime" in capsys.readouterr().err and not (tmp_path / "x.onnx").exists()

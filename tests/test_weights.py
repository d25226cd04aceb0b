"""Weights from elsewhere: MLPerf reference checkpoints and torchvision's ResNet files, whole, foreign, damaged and hostile."""

import hashlib
import os
import pickle
import random

import pytest
import torch
import torchvision
from torch import nn

from base.backend import load_backend
from base.checkpoint import load_weights, read_weights
from base.errors import UserError
from base.weights import from_mlperf, load_backbone, read_tensors

# The MLPerf reference's own model, written from its layout: names and shapes are those of tests/golden/mlperf_state_dict.json


class MLPerfSSD(nn.Module):
    """SSD300-ResNet34 as MLPerf names it: ``model`` (ResNet), ``additional_blocks``, ``loc``, ``conf``."""

    def __init__(self, classes: int = 81):
        super().__init__()
        resnet = torchvision.models.resnet34(weights=None)
        for layer in (resnet.layer3[0].conv1, resnet.layer3[0].downsample[0]):
            layer.stride = (1, 1)
        self.model = nn.Module()
        self.model.layer1 = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2)
        self.model.layer2 = nn.Sequential(resnet.layer3)
        widths = [(256, 256, 512, 2, 1), (512, 256, 512, 2, 1), (512, 128, 256, 2, 1), (256, 128, 256, 1, 0), (256, 128, 256, 1, 0)]
        self.additional_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 1), nn.ReLU(), nn.Conv2d(b, c, 3, stride=stride, padding=padding), nn.ReLU())
            for a, b, c, stride, padding in widths
        )
        heads = list(zip((256, 512, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4), strict=True))
        self.loc = nn.ModuleList(nn.Conv2d(width, boxes * 4, 3, padding=1) for width, boxes in heads)
        self.conf = nn.ModuleList(nn.Conv2d(width, boxes * classes, 3, padding=1) for width, boxes in heads)
        self.classes = classes

    def forward(self, images):
        """→ offsets (N, 4, A), logits (N, C, A), as MLPerf views its heads: channel = value · boxes + box."""
        levels = [self.model.layer2(self.model.layer1(images))]
        for block in self.additional_blocks:
            levels.append(block(levels[-1]))
        offsets = [head(level).view(len(images), 4, -1) for head, level in zip(self.loc, levels, strict=True)]
        logits = [head(level).view(len(images), self.classes, -1) for head, level in zip(self.conf, levels, strict=True)]
        return torch.cat(offsets, 2), torch.cat(logits, 2)


@pytest.fixture(scope="module")
def mlperf():
    """The model with lively running statistics, so that each buffer matters."""
    torch.manual_seed(11)
    model = MLPerfSSD()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def test_the_stand_in_has_the_references_layout(mlperf, golden):
    assert [[name, list(tensor.shape)] for name, tensor in mlperf.state_dict().items()] == golden("mlperf_state_dict")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_mlperf_checkpoint_gives_the_same_outputs(backend, mlperf, tmp_path, prefix):
    file = tmp_path / "iter_240000.pt"
    torch.save({"model": {prefix + name: tensor for name, tensor in mlperf.state_dict().items()}, "label_map": {1: "person"}}, file)
    state, ours = read_weights(file)
    assert ours is None
    model = backend.model(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet34").eval()
    load_weights(model, state, file)
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        offsets, logits = mlperf(images)
        got = model(images)
    order = model.default_boxes.mlperf_order
    torch.testing.assert_close(got.offsets[:, order].float(), offsets.transpose(1, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.logits[:, order].float(), logits.transpose(1, 2), atol=1e-4, rtol=0)
    assert offsets.std() > 0.01 and logits.std() > 0.01  # not all alike, or any order would do


def test_foreign_names_and_shapes_are_refused(mlperf, tmp_path):
    file, state = tmp_path / "x.pt", dict(mlperf.state_dict())
    build = load_backend("reference").model

    def load(state):
        load_weights(build(num_classes=81, image_size=(300, 300), strides=(1, 1, 2, 2, 2, 1), backbone="resnet34"), from_mlperf(state), file)

    load(state)
    for name, value in (("surprise.weight", torch.zeros(1)), (7, torch.zeros(1)), ("loc.0.weight", "text")):
        with pytest.raises(UserError, match=f"'{name}' is no weight of an SSD-ResNet checkpoint in MLPerf's layout"):
            load({**state, name: value})
    with pytest.raises(UserError, match=r"x\.pt belongs to another architecture: it has 'backbone\.layer1\.9\.x'"):
        load({**state, "model.layer1.4.9.x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"x\.pt belongs to another architecture: it lacks 'offset_heads\.3\.bias'"):
        load({name: tensor for name, tensor in state.items() if name != "loc.3.bias"})
    with pytest.raises(UserError, match=r"it has 'class_heads\.6\.bias'"):
        load({**state, "conf.6.bias": torch.zeros(4)})
    for shape in ((8, 256, 3, 3), (7,), ()):
        with pytest.raises(UserError, match=r"class_heads\.0\.weight \(.*\) instead of \(324, 256, 3, 3\)"):
            load({**state, "conf.0.weight": torch.zeros(shape)})


# torchvision's files

RESNETS = ("resnet18", "resnet34", "resnet50")


@pytest.fixture(scope="module")
def resnets():
    """Random torchvision state dicts, by name."""
    torch.manual_seed(5)
    return {name: getattr(torchvision.models, name)(weights=None).state_dict() for name in RESNETS}


@pytest.fixture(scope="module")
def models(backend):
    """A model of a backend for each backbone."""
    return {
        name: backend.model(num_classes=2, image_size=(96, 96), strides=(1,) * 6, backbone=name) for name in RESNETS
    }


@pytest.mark.parametrize(("name", "zipped"), [*((name, True) for name in RESNETS), ("resnet18", False)])
def test_a_torchvision_file_becomes_the_backbone(resnets, models, tmp_path, name, zipped):
    file, model = tmp_path / f"{name}.pth", models[name]
    torch.save(resnets[name], file, _use_new_zipfile_serialization=zipped)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}
    for tensor in model.backbone.state_dict().values():
        tensor.zero_()
    load_backbone(model, file)
    loaded = model.backbone.state_dict()
    assert loaded and not any(key.startswith(("layer4", "fc")) for key in loaded)
    for key, tensor in loaded.items():
        assert torch.equal(tensor.cpu().float(), resnets[name][key].float()), key
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_files_older_than_num_batches_tracked_load(resnets, models, tmp_path):
    torch.save({key: tensor for key, tensor in resnets["resnet18"].items() if "num_batches_tracked" not in key}, tmp_path / "old.pth")
    load_backbone(models["resnet18"], tmp_path / "old.pth")
    assert torch.equal(models["resnet18"].backbone.state_dict()["conv1.weight"].cpu(), resnets["resnet18"]["conv1.weight"])


def test_a_hash_in_the_name_is_held(resnets, models, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save(resnets["resnet18"], plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    for right in (digest[:8], digest):
        load_backbone(models["resnet18"], plain.rename(tmp_path / f"resnet18-{right}.pth"))
        (tmp_path / f"resnet18-{right}.pth").rename(plain)
    plain.rename(tmp_path / "resnet18-333f7ec4.pth")
    with pytest.raises(UserError, match=f"resnet18-333f7ec4.pth is not the file that its name promises: SHA-256 {digest[:8]}…, not 333f7ec4…"):
        load_backbone(models["resnet18"], tmp_path / "resnet18-333f7ec4.pth")


def small(state: dict) -> dict:
    """A state dict that no ResNet needs in full to be told apart."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(("layer3.", "layer4.", "fc."))}


FOREIGN = {
    "another ResNet": (lambda r: r["resnet18"], "lacks layer1.2.conv1.weight"),
    "a part": (lambda r: small(r["resnet34"]), "lacks layer3.0.conv1.weight"),
    "grey": (lambda r: {**r["resnet34"], "conv1.weight": torch.zeros(64, 1, 7, 7)}, r"has conv1.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)"),
    "more": (lambda r: {**r["resnet34"], "layer9.weight": torch.zeros(1)}, "has layer9.weight besides"),
    "nothing": (lambda r: {}, "lacks conv1.weight"),
    "wrapped": (lambda r: {"state_dict": small(r["resnet18"])}, "does not hold a torchvision state dict"),
    "a list": (lambda r: [torch.zeros(1)], "does not hold a torchvision state dict"),
    "numbered": (lambda r: {0: torch.zeros(1)}, "does not hold a torchvision state dict"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_weights_are_refused(resnets, models, tmp_path, case):
    make, said = FOREIGN[case]
    torch.save(make(resnets), tmp_path / "f.pth")
    before = models["resnet34"].backbone.state_dict()["conv1.weight"].clone()
    with pytest.raises(UserError, match=said) as caught:
        load_backbone(models["resnet34"], tmp_path / "f.pth")
    assert str(tmp_path / "f.pth") in str(caught.value)
    assert torch.equal(models["resnet34"].backbone.state_dict()["conv1.weight"], before)


def test_each_resnets_weights_are_refused_by_the_others(resnets, models, tmp_path):
    for name, state in resnets.items():
        torch.save({key: tensor for key, tensor in state.items() if not key.startswith(("layer4.", "fc."))}, tmp_path / f"{name}.pth")
        for other in set(RESNETS) - {name}:
            with pytest.raises(UserError, match=rf"{name}\.pth is not weights of this model's ResNet: it .*; is --backbone right\?"):
                load_backbone(models[other], tmp_path / f"{name}.pth")


# Damage

TENSORS = {f"layer.{number}": torch.arange(12.0).reshape(4, 3) + number for number in range(5)}


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request, tmp_path):
    """A small torch file and whether it is of the zip format."""
    torch.save(TENSORS, tmp_path / "t.pth", _use_new_zipfile_serialization=request.param)
    return tmp_path / "t.pth", request.param


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_files_are_refused_wherever_they_end(saved):
    file, _ = saved
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"t\.pth is "):
            read_tensors(file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_bits_are_refused_or_harmless(saved):
    """The zip format carries sums of its contents, so that what loads is right; the older one is only held to fail in order."""
    file, zipped = saved
    whole, draw, refused = file.read_bytes(), random.Random(4), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            found = read_tensors(file)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert not zipped or (found.keys() == TENSORS.keys() and all(torch.equal(found[key], TENSORS[key]) for key in TENSORS))
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"\0" * 999, b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"f\.pth is truncated, damaged or not a torch file"):
        read_tensors(tmp_path / "f.pth")


def test_missing_files_and_folders_are_refused(tmp_path):
    for place in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(UserError, match="does not exist or is not a file"):
            read_tensors(place)


class Hostile:
    """Runs a command when unpickled by unsafe means."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "newest pickle"])
def test_code_in_a_file_is_not_run(models, tmp_path, form):
    file, marker = tmp_path / "h.pth", tmp_path / "executed"
    if "pickle" in form:
        file.write_bytes(pickle.dumps({"conv1.weight": Hostile(marker)}, protocol=2 if form == "pickle" else pickle.HIGHEST_PROTOCOL))
    else:
        torch.save({"conv1.weight": Hostile(marker)}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError) as caught:
        load_backbone(models["resnet18"], file)
    assert not marker.exists() and "weights_only" not in str(caught.value)  # no advice to load it all the same
    if form != "newest pickle":
        assert f"{file} is refused: it holds {os.system.__module__}.system" in str(caught.value)
    pickle.loads(pickle.dumps(Hostile(marker)))  # noqa: S301 (the marker does appear where code runs)
    assert marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_whole_objects_are_refused_by_name(models, tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"refused: it holds torch\.nn\.modules\.linear\.Linear"):
        load_backbone(models["resnet18"], tmp_path / "model.pth")
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "script.pth"))
    with pytest.raises(UserError, match="not a torch file") as caught:
        load_backbone(models["resnet18"], tmp_path / "script.pth")
    assert "Re-running" not in str(caught.value)

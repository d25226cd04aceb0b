"""Starting a run: everything a person can get wrong is told in one message, exit code 2, before anything is made."""

import io
import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from base.backend import SLOTS, backend_folder, list_backends, load_backend
from base.backends import DEFAULT_BACKEND
from base.config import Config, Resolved, list_configs
from base.errors import UserError
from base.records import config_text
from base.tools.launch import RESUMABLE, main
from tests.conftest import SMALL, Started, one_error

NO_ACCELERATOR = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here):
    """refused(*flags) → the message, once it is sure that nothing was made in the current folder."""

    def call(*flags) -> str:
        before = tree(here)
        with pytest.raises(UserError) as caught:
            main([str(flag) for flag in flags])
        assert tree(here) == before
        return str(caught.value)

    return call


@pytest.fixture
def demo(demo_data):
    """Flags of a run on the small demo data."""
    return ["--config", "demo", "--data_dir", str(demo_data), *SMALL]


# As a person starts it


def test_list_shows_backends_and_configurations_whatever_folder_it_is_called_from(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "__init__.py").write_text("raise SystemExit('the wrong base')")
    done = Started(tmp_path, ["--list"]).wait_done()
    assert (done.returncode, done.stderr) == (0, "")
    for name in list_backends():
        assert f"\n{name}\n" in f"\n{done.stdout}"
        for config in list_configs(backend_folder(name)):
            assert f"  {config}" in done.stdout
    assert "MLPerf reference, two nodes of eight devices, global batch 1024." in done.stdout


def test_dry_run_shows_everything_and_makes_nothing(tmp_path, demo_data):
    flags = ["--name", "reference", "--config", "demo", "--data_dir", str(demo_data), *SMALL, "--nproc=2", "--device", "cpu", "--dry-run"]
    flags += ["--use", "loss=reference"]
    done = Started(tmp_path, flags).wait_done()
    assert (done.returncode, done.stderr, tree(tmp_path)) == (0, "", [])
    assert "backend reference on 1 × 2 cpu; resnet18 at 96×96, global batch 16" in done.stdout
    for slot in SLOTS:
        assert f"  {slot:<14}reference" in done.stdout
    assert "\nseed: 1 " in done.stdout and "# --image_size" in done.stdout and "# base/recipes/demo.yaml" in done.stdout
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:6] == ["command:", "torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    given = json.loads(command[-1])
    assert given["backend"] == "reference" and given["config"]["image_size"] == [96, 96] and not given["resume"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--name", "referense"], "no backend is called 'referense'; did you mean reference?"),
        (["--name", "reference", "--config", "DGX1_23"], "no configuration 'DGX1_23'; did you mean DGX1_32"),
        (["--batchsize", "3"], "unknown argument '--batchsize'; did you mean --batch_size"),
        (["--config", "DGX1_32"], f"backend {DEFAULT_BACKEND} has no configuration 'DGX1_32'; add --name reference, or choose another"),
        (["--config", "demo", "--data_dir", "nowhere"], "data folder nowhere does not exist"),
        (["--config", "demo", "--epochs", "many"], "epochs is 'many'"),
        (["--name"], "--name: expected one argument"),
    ],
)
def test_wrong_commands_end_with_one_message(tmp_path, flags, said):
    assert said in one_error(Started(tmp_path, flags).wait_done())
    assert tree(tmp_path) == []


def test_a_hostile_backbone_is_not_executed(tmp_path, demo_data):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    file = tmp_path / "hostile.pth"
    torch.save({"conv1.weight": Hostile()}, file)
    flags = ["--config", "demo", "--data_dir", str(demo_data), *SMALL, "--backbone_path", str(file)]
    assert f"{file} is refused: it holds {os.system.__module__}.system" in one_error(Started(tmp_path, flags).wait_done())
    assert tree(tmp_path) == ["hostile.pth"]


# Backend and components


def test_unknown_components_and_suppliers(refused, demo):
    assert "no component is called 'los'; did you mean loss" in refused(*demo, "--use", "los=reference")
    assert "no backend is called 'referense'; did you mean reference?" in refused(*demo, "--use", "loss=referense")
    assert "--use 'loss' is not COMPONENT=BACKEND" in refused(*demo, "--use", "loss")
    assert "no backend is called '../reference'" in refused(*demo, "--name", "../reference")


@NO_ACCELERATOR
def test_too_few_devices(refused, demo_data):
    said = refused("--name", "reference", "--config", "DGX1_singlenode", "--data_dir", demo_data)
    assert "wants 8 devices a node" in said and "no accelerator" in said and "--nproc N" in said and "--list" in said
    assert "this machine has no cuda device; --name cpu runs here, and --device cpu takes what reference does on a CPU" in refused(
        "--name", "reference", "--config", "DGX1_singlenode", "--data_dir", demo_data, "--device", "cuda"
    )


def test_device_types_that_do_not_exist(refused, demo):
    assert "device 'abacus' is not a device type of this torch" in refused(*demo, "--device", "abacus")
    assert "device is 'cpu:0'" in refused(*demo, "--device", "cpu:0")


def test_image_sizes_that_leave_no_feature_map(refused, demo):
    assert "image size 30×30" in refused(*demo, "--image_size", 30, 30)


# Nodes


def test_several_nodes_need_a_place_to_meet(refused, demo):
    assert "2 nodes need --rdzv_endpoint HOST:PORT" in refused(*demo, "--nodes", 2)
    assert "it is 'host'" in refused(*demo, "--nodes", 2, "--rdzv_endpoint", "host")
    assert "--node_rank 2 is not one of 2 nodes" in refused(*demo, "--nodes", 2, "--rdzv_endpoint", "host:1", "--node_rank", 2)
    assert "--node_rank 1 is not one of 1 nodes" in refused(*demo, "--node_rank", 1)


def test_commands_of_several_nodes(here, demo, capsys):
    assert main([*demo, "--nodes", "2", "--rdzv-endpoint", "host:29500", "--device", "cpu", "--dry_run"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    where = "--nnodes 2 --rdzv-endpoint host:29500 --rdzv-id ssd --rdzv-backend static --rdzv-conf timeout=60 --node-rank"
    assert " ".join(words[2:-3]) == f"{where} N --nproc-per-node 1"  # the number that the meeting gives
    assert main([*demo, "--nodes", "2", "--rdzv_endpoint", "host:29500", "--node_rank", "1", "--device", "cpu", "--dry_run"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert " ".join(words[2:-3]) == f"{where} 1 --nproc-per-node 1"
    assert tree(here) == []


# Data


@pytest.fixture
def layout(here, demo_data):
    """layout("train2017", …) → a data folder like the demo's without these parts."""

    def make(*without: str) -> Path:
        folder = here / "data"
        (folder / "annotations").mkdir(parents=True)
        for part in ("train2017", "val2017", *(f"annotations/instances_{kind}2017.json" for kind in ("train", "val"))):
            if not part.startswith(tuple(without)):
                (folder / part).symlink_to(demo_data / part)
        return folder

    return make


@pytest.mark.parametrize("part", ["train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"])
def test_each_missing_part_of_the_layout_is_named(refused, layout, part):
    folder = layout(part)
    said = refused("--config", "demo", "--data_dir", folder)
    missing = "part" if part.endswith(".json") else f"the folder of the images of annotations/instances_{part}.json"
    assert said.startswith(f"data folder {folder}: ") and missing in said and "It holds annotations/" in said and "--val_annotations" in said


def test_nothing_in_the_data_folder(refused, here):
    (here / "data").mkdir()
    said = refused("--config", "demo", "--data_dir", here / "data")
    assert "no annotations are found; looked for COCO's annotations/instances_{train,val}*.json" in said and "It holds nothing" in said


def test_folders_without_the_images(refused, layout, here):
    folder = layout("val2017")
    (folder / "val2017").mkdir()
    made = []  # the index of each annotation file is packed beside it on first sight, here beside the links
    with pytest.raises(UserError) as caught:
        main(["--config", "demo", "--data_dir", str(folder)])
    assert f"{folder / 'val2017'} holds none of the first images of {folder / 'annotations' / 'instances_val2017.json'}" in str(caught.value)
    made = [path for path in tree(here) if "index" not in path and "json" not in path]
    assert made == ["data", "data/annotations", "data/train2017", "data/val2017"]


def test_data_that_is_no_folder_or_not_named(refused, here):
    (here / "file").write_text("x")
    assert "data folder file does not exist" in refused("--config", "demo", "--data_dir", "file")
    assert "--data_dir is missing: a folder with COCO's annotations/" in refused("--name", "reference", "--config", "DGX1_32")
    assert "--data_dir is missing" in refused("--config", "demo", "--data_dir=")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"images": [], "annotations": [], "categories": []}'])
def test_annotations_that_are_none(here, layout, text):
    folder = layout("annotations/instances_val2017.json")
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        main(["--config", "demo", "--data_dir", str(folder)])
    assert str(file) in str(caught.value) and not (here / "runs").exists()


def test_the_demo_draws_its_data_last(here, monkeypatch, capsys):
    monkeypatch.setattr("base.tools.launch.DEMO_DATA", here / "drawn")
    with pytest.raises(UserError, match="no component is called"):
        main(["--use", "los=reference"])
    assert main(["--dry-run", "--device", "cpu"]) == 0
    assert f"data_dir: {here / 'drawn'} " in capsys.readouterr().out and tree(here) == []


# Backbone weights


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    """Weights of a ResNet-18 as the demo has it."""
    model = load_backend("reference").model(num_classes=2, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18")
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.backbone.state_dict(), file)
    return file


def test_backbone_files_that_are_wrong(refused, demo, here, backbone_file):
    def said(name: str, content: bytes | None = None, *flags) -> str:
        if content is not None:
            (here / name).write_bytes(content)
        message = refused(*demo, "--backbone_path", here / name, *flags)
        assert str(here / name) in message
        return message

    whole = backbone_file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    assert "does not exist" in said("missing.pth")
    assert "does not exist or is not a file" in said("")
    assert "truncated" in said("short.pth", whole[: len(whole) // 2])
    assert "damaged" in said("flipped.pth", bytes(damaged))
    assert "not a torch file" in said("empty.pth", b"")
    assert "not a torch file" in said("page.pth", b"<html>404 not found</html>")
    assert "does not hold a torchvision state dict" in said("list.pth", dumped([1, 2]))
    assert "lacks conv1.weight" in said("other.pth", dumped({"a": torch.zeros(1)}))
    assert "not the file that its name promises: SHA-256" in said("resnet18-333f7ec4.pth", whole)
    assert "is --backbone right?" in said("resnet18.pth", whole, "--backbone", "resnet34")


def dumped(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_right_backbone_is_taken(here, demo, backbone_file, capsys):
    assert main([*demo, "--pretrained-backbone", str(backbone_file), "--device", "cpu", "--dry-run"]) == 0
    assert f"backbone_path: {backbone_file} " in capsys.readouterr().out


# The run's folder


def test_a_used_run_folder_is_refused(refused, demo, here):
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "log.txt").write_text("x")
    said = refused(*demo, "--run_name", "mine")
    assert f"run folder {here / 'runs' / 'mine'} exists already" in said and "--resume" in said and "--run_name" in said
    (here / "runs" / "file").write_text("x")
    assert "exists already" in refused(*demo, "--run_name", "file")


@pytest.fixture
def run_folder(here, demo_data):
    """run_folder(key=value, …) → the folder of a run on the CPU, as one leaves it before its first checkpoint."""

    def make(**keys) -> Path:
        config = Config(data_dir=str(demo_data), backbone="resnet18", image_size=(96, 96), strides=(1,) * 6, **keys)
        (here / "run").mkdir()
        (here / "run" / "config.yaml").write_text(config_text(Resolved(config, {}), "reference"))
        (here / "run" / "environment.json").write_text('{"backend": "reference"}')
        return here / "run"

    return make


def test_resuming_what_is_no_run(refused, here):
    assert f"{here / 'nowhere'} is no run folder: it has no config.yaml" in refused("--resume", "nowhere")
    (here / "config.yaml").write_text("seed: 1")
    assert "it has no environment.json" in refused("--resume", here)
    for text in ("", "{", "[]", "{}", "3"):
        (here / "environment.json").write_text(text)
        assert f"{here / 'environment.json'} does not name the run's backend" in refused("--resume", here)


def test_what_cannot_change_on_resuming(refused, run_folder):
    run = run_folder()
    for key in ("batch_size", "seed", "learning_rate", "nproc"):
        said = refused("--resume", run, f"--{key}", 2)
        assert f"--{'devices' if key == 'nproc' else key} cannot change when a run is resumed" in said and ", ".join(sorted(RESUMABLE)) in said
    for flag in ("--name", "--config", "--run_name"):
        assert "leave out --name, --config and --run_name" in refused("--resume", run, flag, "other")
    (run / "config.yaml").write_text("batchsize: 3")
    assert f"{run / 'config.yaml'}: unknown key 'batchsize'" in refused("--resume", run)


@NO_ACCELERATOR
def test_a_run_of_several_cpu_processes_is_resumed_as_it_was(run_folder, capsys):
    assert main(["--resume", str(run_folder(devices=2)), "--epochs", "9", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "on 1 × 2 cpu" in shown and "epochs: 9 " in shown
    assert json.loads(shlex.split(shown.splitlines()[-1])[-1])["resume"] is True

"""Training that begins with the weights of another: other sizes, other classes, stages of one run."""

import json

import pytest
import torch

from base import checkpoint
from base.backend import load_backend
from base.errors import UserError
from tests.conftest import Started, losses, start_training

SHORT = ["--max_steps", "2", "--target", "null", "--log_every", "1"]
OTHER = ["--image_size", "128", "160", "--strides", "1", "1", "2", "1", "1", "1"]


def state(run) -> dict:
    return checkpoint.read(run / "checkpoints" / "step-000000002.pt")["model"]


def test_another_size_begins_with_all_the_weights(train, tmp_path):
    assert train(*SHORT, run="first").returncode == 0
    done = train(*SHORT, "--learning_rate", "0", *OTHER, "--checkpoint", str(tmp_path / "first"))
    assert done.returncode == 0, done.stderr
    assert f"begins with the weights of {tmp_path / 'first/checkpoints/best.pt'}, its optimizer and step afresh; all of them" in done.stdout
    before, after = (state(tmp_path / run) for run in ("first", "run"))
    assert all(torch.equal(before[name], after[name]) for name in before if "running" not in name and "batches" not in name)


def test_other_classes_keep_all_but_the_class_heads(train, tmp_path, demo_data):
    assert train(*SHORT, run="first").returncode == 0
    model = load_backend("reference").model(num_classes=4, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18")
    left = checkpoint.carry_over(model, tmp_path / "first/checkpoints/best.pt", {"ids": [1, 2, 3], "names": ["a", "b", "c"]})
    assert left == [name for name in model.state_dict() if name.startswith("class_heads.")]
    before = state(tmp_path / "first")
    assert torch.equal(model.state_dict()["offset_heads.0.weight"], before["offset_heads.0.weight"])
    count = before["class_heads.5.bias"].numel() // 4 - 1  # as many classes, but others
    again = load_backend("reference").model(num_classes=count + 1, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18")
    named = {"ids": list(range(1, count + 1)), "names": [str(n) for n in range(count)]}
    assert len(checkpoint.carry_over(again, tmp_path / "first/checkpoints/best.pt", named)) == 12


def test_where_a_checkpoint_is_looked_for(tmp_path):
    for place, name in (("run", "step-000000030"), ("run", "step-000000040"), ("all/stage-9", "best"), ("all/stage-10", "best")):
        (tmp_path / place / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / place / f"checkpoints/{name}.pt").touch()
    kept = tmp_path / "run/checkpoints"
    for given in ("run", "run/checkpoints", "run/iter_40", "run/iter_000040.pt", "run/checkpoints/step-000000040.pt"):
        assert checkpoint.found_in(tmp_path / given) == kept / "step-000000040.pt"
    (kept / "best.pt").touch()
    assert checkpoint.found_in(str(tmp_path / "run")) == kept / "best.pt"
    assert checkpoint.found_in(tmp_path / "all") == tmp_path / "all/stage-10/checkpoints/best.pt"
    (tmp_path / "iter_7.pt").touch()  # a file of MLPerf's reference itself
    assert checkpoint.found_in(tmp_path / "iter_7.pt") == tmp_path / "iter_7.pt"
    has = r"step-000000020\.pt does not exist; .*/checkpoints has best\.pt, step-000000030\.pt, step-000000040\.pt \(--keep"
    with pytest.raises(UserError, match=has):
        checkpoint.found_in(tmp_path / "run/iter_20")


def test_what_no_weights_can_be_taken_from(train, tmp_path):
    assert "no checkpoint in it" in train(*SHORT, "--checkpoint", str(tmp_path)).stderr
    assert train(*SHORT, run="first").returncode == 0
    done = train(*SHORT, "--backbone", "resnet50", "--checkpoint", str(tmp_path / "first"), run="second")
    assert done.returncode == 2 and "has another backbone: it lacks backbone.layer1.0" in done.stderr
    done = train(*SHORT, "--checkpoint", str(tmp_path / "first"), "--backbone_path", "x.pth", run="third")
    assert done.returncode == 2 and "set backbone_path 'x.pth' to null" in done.stderr


@pytest.mark.long
def test_the_published_commands_for_larger_and_larger_images(tmp_path, demo_data):
    """As SSD-R34-Large states them, but for the sizes."""
    commands = (
        "--device-ids 0 --image-size 64 64 --save-path models_64",
        "--device_ids 0 --image_size 96 96 --save_path models_96 --checkpoint ./models_64/iter_2",
        "--device-ids 0 1 --image-size 128 160 --strides 3 3 2 1 1 1 --batch-size 4 --sync-bn --save-path models_128 --checkpoint ./models_96/iter_2",
    )
    for number, command in enumerate(commands):
        done = start_training(tmp_path, demo_data, ["--device", "cpu", *SHORT, *command.split()]).wait_done()
        assert done.returncode == 0, done.stderr
        before = ("", "models_64", "models_96")[number]
        assert number == 0 or f"weights of {before}/checkpoints/step-000000002.pt, its optimizer and step afresh; all of them" in done.stdout
    text = (tmp_path / "models_128/config.yaml").read_text()
    assert all(line in text for line in ("device_ids: [0, 1]", "devices: 2 ", "batch_size: 4 ", "norm_ranks: 0 ", "strides: [3, 3, 2, 1, 1, 1]"))


@pytest.mark.long
def test_stages_are_one_run(train, tmp_path):
    stages = ["{epochs: 1}", "{image_size: [128, 160], strides: [1, 1, 2, 1, 1, 1], batch_size: 4, epochs: 1}"]
    flags = ("--stages", *stages, "--max_steps", "2", "--target", "null", "--log_every", "1")
    done = train(*flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert "stage 2 of 2: 128×160, 1 epochs" in done.stdout
    assert f"begins with the weights of {run / 'stage-1/checkpoints/best.pt'}" in (run / "stage-2/log.txt").read_text()
    kept = losses(run / "stage-2")

    (run / "stage-2/metrics.jsonl").write_text("")  # as if it had been cut off
    again = train("--resume", str(run))
    assert again.returncode == 0, again.stderr
    assert f"{run / 'stage-1'} is done" in again.stdout
    end = json.loads((run / "stage-2/metrics.jsonl").read_text().splitlines()[-1])
    assert end["kind"] == "end" and kept

    done = train("--stages", "{epochs: 1}", "{epoch: 2}", run="wrong")
    assert done.returncode == 2 and "stage 2 of --stages: unknown key 'epoch'; did you mean 'epochs'?" in done.stderr
    assert not (tmp_path / "wrong").exists()


def test_the_large_image_recipe_as_published(demo_data, tmp_path):
    """300 → 700 → 1200; flags win over its stages, so it runs on fewer devices too."""
    flags = ["--name", "reference", "--config", "large_image", "--data_dir", str(demo_data), "--dry-run"]
    done = Started(tmp_path, [*flags, "--devices", "1"]).wait_done()
    assert done.returncode == 0, done.stderr
    for size in ("300×300, global batch 32", "700×700, global batch 32", "1200×1200, global batch 32"):
        assert size in done.stdout
    assert "strides: [3, 3, 2, 2, 2, 2]" in done.stdout
    if not torch.accelerator.is_available():
        whole = Started(tmp_path, flags).wait_done()
        assert whole.returncode == 2 and "wants 4 devices a node" in whole.stderr  # said before the first stage begins


def test_devices_that_are_not_named_once_each():
    from base.config import validate

    with pytest.raises(UserError, match=r"device_ids \[0, 0\] must name as many different devices as devices says, 2"):
        validate({"devices": 2, "device_ids": [0, 0]}, {})

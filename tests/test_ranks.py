"""Training over several ranks on the CPU: how it is split changes nothing that it should not."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from base.backends.reference.all_reduce import Average
from hypothesis import given
from hypothesis import strategies as st

from base.backend import list_backends
from base.config import Config, validate
from base.contracts import Detections
from base.errors import UserError
from base.sampling import epoch_order, eval_shard, train_shard
from tests import ranks
from tests.conftest import runs_here

NAMES = [name for name in list_backends() if runs_here(name)]
CASES: dict[int, dict[str, dict]] = {  # ranks → cases
    1: {"whole": {}},
    2: {"whole": {}, "bf16": {"compression": "bf16", "bucket_mb": 2}, "fp16": {"compression": "fp16"}},
    4: {"whole": {}},
    8: {},
}
BUCKETS = {"one": {}, "small": {"bucket_mb": 1}, "large": {"bucket_mb": 100}}
PARTS = {"parts": {"accumulation": 2}, "parts in buckets": {"accumulation": 2, "bucket_mb": 4}}
GROUPS = (1, 2, 4, 8)  # ranks that share statistics
for _name in NAMES:
    CASES[2] |= {f"{_name}, {case}": {"backend": _name, "norm_ranks": 1, **options} for case, options in (BUCKETS | PARTS).items()}
    for _group in GROUPS:  # in float32, whatever the backend's step multiplies in
        few = {"backend": _name, "use": {"step": "reference"}, "steps": 2, "side": 48}
        CASES[8][f"{_name}, groups of {_group}"] = {**few, "norm_ranks": _group}
        CASES[8 // _group][f"{_name}, each alone"] = {**few, "norm_ranks": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(ranks, case) → mean loss of each step, and every rank's state."""
    found = {}
    for world_size, cases in CASES.items():
        each = ranks.on(world_size, tmp_path_factory.mktemp("ranks"), ranks.train, cases)
        for case in cases:
            losses, states = zip(*(rank[case] for rank in each), strict=True)
            found[world_size, case] = torch.stack(losses).mean(0), states
    return found


def same(a: Mapping, b: Mapping) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_every_rank_ends_with_the_same_state(trained):
    for (_, case), (_, states) in trained.items():
        assert all(same(states[0], state) for state in states), case


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_batch_split_over_ranks_trains_the_same(trained, world_size):
    whole, [state] = trained[1, "whole"]
    losses, states = trained[world_size, "whole"]
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-5)
    for key in ("backbone.bn1.running_mean", "backbone.bn1.running_var"):
        torch.testing.assert_close(states[0][key], state[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_ranks_share_statistics(trained, name, group):
    """Eight ranks in groups are as many ranks as there are groups, each alone with its group's images; and no other number of ranks."""
    losses, states = trained[8, f"{name}, groups of {group}"]
    wanted, ends = trained[8 // group, f"{name}, each alone"]
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[0]["backbone.bn1.running_var"], ends[0]["backbone.bn1.running_var"], rtol=1e-5, atol=1e-5)
    for other in set(GROUPS) - {group}:
        assert (losses - trained[8 // other, f"{name}, each alone"][0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "wanted"), [("small", "one"), ("large", "one"), ("parts in buckets", "parts")])
def test_buckets_beside_the_backward_pass_change_nothing(trained, name, case, wanted):
    """Two numbers have one sum, whatever travels with them."""
    (losses, states), (plain, ends) = trained[2, f"{name}, {case}"], trained[2, f"{name}, {wanted}"]
    assert torch.equal(losses, plain) and same(states[0], ends[0])


@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_compressed_gradients_train_nearly_the_same(trained, compression):
    (losses, states), (plain, ends) = trained[2, compression], trained[2, "whole"]
    torch.testing.assert_close(losses, plain, rtol=1e-3, atol=0)
    assert not same(states[0], ends[0])


def test_buckets_are_cut_where_they_are_full():
    """About one gradient over their size, each gradient in one of them."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(5)))  # 1 MiB each
    assert [len(bucket) for bucket in Average(layers, 2, 2, "none").buckets] == [2, 2, 1]
    assert [len(bucket) for bucket in Average(layers, 2, 0, "none").buckets] == [5]


def test_groups_must_divide_the_ranks():
    assert Config(devices=8, norm_ranks=4).norm_ranks == 4
    with pytest.raises(UserError, match="norm_ranks 3 must divide the 8 ranks of nodes 1 × devices 8"):
        validate({"devices": 8, "norm_ranks": 3}, {})


@given(images=st.integers(0, 70), batch=st.integers(1, 9), world_size=st.integers(1, 9))
def test_evaluation_takes_every_image_once(images, batch, world_size):
    shards = [eval_shard(images, batch, rank, world_size) for rank in range(world_size)]
    shares = [sum(map(len, shard)) for shard in shards]
    assert sorted(int(image) for shard in shards for part in shard for image in part) == list(range(images))
    assert max(shares) - min(shares) <= 1 and all(1 <= len(part) <= batch for shard in shards for part in shard)


@given(batch=st.integers(1, 4), parts=st.sampled_from([1, 2, 3, 4, 6, 12]), batches=st.integers(1, 5), rest=st.integers(0, 11))
def test_global_batches_do_not_depend_on_their_split(batch, parts, batches, rest):
    whole = 12 * batch
    images = batches * whole + rest
    shards = [train_shard(images, 3, 7, whole // parts, rank, parts) for rank in range(parts)]
    assert np.array_equal(np.concatenate(shards, 1), epoch_order(images, 3, 7)[: batches * whole].reshape(batches, whole))


@pytest.fixture(scope="module")
def followed(demo_data, tmp_path_factory):
    """(backend, ranks) → the mean loss of each step."""
    found, weights = {}, tmp_path_factory.mktemp("weights") / "trained.pt"
    for world_size in (1, 2, 4):
        each = ranks.on(world_size, tmp_path_factory.mktemp("followed"), ranks.follow, NAMES, demo_data, weights)
        found |= {(name, world_size): torch.tensor([rank[name] for rank in each]).double().mean(0) for name in NAMES}
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_the_same_however_they_are_split(followed, name):
    """One rank with 16 images of the loader, two with 8 and four with 4, all sharing statistics, in float32 over Gloo.

    From weights that are trained a little: from random ones, steps at the same rate make of the last bit of a sum, which depends on the
    order of adding, a hundredth of the loss within twenty.
    """
    whole = followed[name, 1]
    assert len(whole) == 20 and whole.diff().abs().min() > 1e-4  # every step has other images
    for world_size in (2, 4):
        torch.testing.assert_close(followed[name, world_size], whole, rtol=1e-5, atol=0)


def subset(data: Path, folder: Path, count: int) -> Path:
    """A data set of the first ``count`` validation images of another."""
    whole = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    images = whole["images"][:count]
    annotations = [entry for entry in whole["annotations"] if entry["image_id"] in {image["id"] for image in images}]
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps({**whole, "images": images, "annotations": annotations}))
    (folder / "val2017").symlink_to(data / "val2017")
    return folder


COUNTS = (1, 2, 11)  # images to evaluate: fewer than ranks, and a number that none divides


@pytest.fixture(scope="module")
def evaluated(demo_data, tmp_path_factory):
    """Ranks → for each of them: (backend, images) → all detections, as `detect` gathers them."""
    place = tmp_path_factory.mktemp("evaluated")
    folders = {count: subset(demo_data, place / str(count), count) for count in COUNTS}
    return {n: ranks.on(n, tmp_path_factory.mktemp("evaluated"), ranks.evaluate, NAMES, folders) for n in (1, 2, 3, 4, 8)}


def by_image(arrays: dict[str, np.ndarray]) -> dict[int, list]:
    """Image id → its size and detections."""
    ends = arrays["counts"].cumsum()
    columns = [np.split(arrays[key], ends[:-1]) for key in Detections._fields]
    return {i: [size.tolist(), *(part.tolist() for part in found)] for i, size, *found in zip(arrays["ids"], arrays["sizes"], *columns, strict=True)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_ranks_evaluate_every_image_once(evaluated, name, world_size):
    for count in COUNTS:
        alone = evaluated[1][0][name, count]
        for arrays in (rank[name, count] for rank in evaluated[world_size]):
            assert len(arrays["ids"]) == count and by_image(arrays) == by_image(alone)
        assert len(by_image(alone)) == count and alone["counts"].min() > 0

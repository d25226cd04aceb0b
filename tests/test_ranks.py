"""Training over several ranks on the CPU: how it is split changes nothing that it should not."""

from collections.abc import Mapping

import pytest
import torch
from base.backends.reference.all_reduce import Average

from base.config import Config, validate
from base.errors import UserError
from tests import ranks
from tests.conftest import runs_here

NAMES = [name for name in ("reference", "cpu") if runs_here(name)]
CASES: dict[int, dict[str, dict]] = {  # ranks → cases
    1: {"whole": {}},
    2: {"whole": {}, "alone": {"norm_ranks": 1}, "bf16": {"compression": "bf16", "bucket_mb": 2}, "fp16": {"compression": "fp16"}},
    4: {"whole": {}, "pairs": {"norm_ranks": 2}, "alone": {"norm_ranks": 1}},
}
BUCKETS = {"one": {}, "small": {"bucket_mb": 1}, "large": {"bucket_mb": 100}}
PARTS = {"parts": {"accumulation": 2}, "parts in buckets": {"accumulation": 2, "bucket_mb": 4}}
for _name in NAMES:
    CASES[2] |= {f"{_name}, {case}": {"backend": _name, "norm_ranks": 1, **options} for case, options in (BUCKETS | PARTS).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(ranks, case) → mean loss of each step, and every rank's state."""
    found = {}
    for world_size, cases in CASES.items():
        folder = tmp_path_factory.mktemp("ranks")
        torch.multiprocessing.spawn(ranks.train, (world_size, str(folder), cases), nprocs=world_size)
        each = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
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


def test_groups_of_ranks_share_statistics(trained):
    """Two groups of two ranks are two ranks with twice the batch."""
    losses, wanted, alone = (trained[case][0] for case in ((4, "pairs"), (2, "alone"), (4, "alone")))
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert (alone - wanted).abs().max() > 1e-3  # what it would be otherwise


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

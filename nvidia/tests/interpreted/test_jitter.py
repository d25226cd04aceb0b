"""The jitter's kernels against the same in plain torch, which is PIL's to the bit (test_dali.py)."""

import itertools

import pytest
import torch
from base.backends.nvidia.jitter import HUE, JITTER, NEUTRAL, jitter, jitter_op, plain_jitter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def amounts(count: int, generator: torch.Generator) -> torch.Tensor:
    within = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.from_numpy(NEUTRAL) + within * torch.from_numpy(JITTER)


@pytest.mark.parametrize("kind", ["noise", "smooth", "grey", "few"])
def test_every_order_gives_the_same_bytes(kind):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (len(ORDERS), 31, 45, 3), generator=generator)
    if kind == "smooth":
        images = (torch.arange(31)[:, None, None] * 5 + torch.arange(45)[:, None] * torch.arange(1, 4)).expand_as(images) % 256
    if kind == "grey":
        images = images[..., :1].expand_as(images)
    if kind == "few":
        images = images // 200 * 127
    images, drawn = images.to(torch.uint8).contiguous(), amounts(len(ORDERS), generator)
    drawn[::5, HUE] = 0
    got = jitter(images.to(DEVICE), drawn, ORDERS)
    assert got.dtype == torch.uint8 and torch.equal(got.cpu(), plain_jitter(images, drawn, ORDERS))


def test_no_picture_and_no_pixel():
    for shape in ((0, 4, 4, 3), (2, 0, 4, 3)):
        images = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        assert jitter(images, amounts(shape[0], torch.Generator()), ORDERS[: shape[0]]).shape == shape


def test_pictures_do_not_mix():
    generator = torch.Generator().manual_seed(2)
    images, drawn = torch.randint(0, 256, (5, 20, 60, 3), dtype=torch.uint8, generator=generator), amounts(5, generator)
    together = jitter(images.to(DEVICE), drawn, ORDERS[:5])
    for number in range(5):
        some = slice(number, number + 1)
        assert torch.equal(together[some], jitter(images[some].to(DEVICE), drawn[some], ORDERS[:5][some]))


def test_the_operator_is_as_torch_wants_it():
    images = torch.randint(0, 256, (2, 3, 5, 3), dtype=torch.uint8, device=DEVICE)
    factors = amounts(2, torch.Generator()).float().to(DEVICE)
    torch.library.opcheck(jitter_op, (images, factors, ORDERS[:2].int().to(DEVICE)))

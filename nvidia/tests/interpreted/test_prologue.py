"""The prologue's kernel against torchvision's arithmetic as the reference writes it."""

import pytest
import torch
from base.backends.nvidia.prologue import prologue, prologue_op
from base.backends.reference.step import normalise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 29), (1, 1, 1), (0, 8, 8)], ids=str)
def test_numbers_and_memory(shape, dtype, tolerance, channels):
    images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = prologue(images, dtype, channels)
    assert x.dtype == dtype and x.shape == (shape[0], channels, *shape[1:]) and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[:, :3].float(), normalise(images), rtol=tolerance, atol=tolerance)
    assert not x[:, 3:].any()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("flips", [[True, False, True], [False] * 3, [True] * 3], ids=str)
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (3, 1)], ids=str)
def test_mirrored_images(size, flips, channels):
    """Of even and odd width; to the bit the same numbers in other places."""
    images = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    x = prologue(images, torch.float32, channels, torch.tensor(flips, device=DEVICE))
    plain = prologue(images, torch.float32, channels)
    assert x.shape == (3, channels, *size) and x.is_contiguous(memory_format=torch.channels_last)
    for number, flip in enumerate(flips):
        assert torch.equal(x[number], plain[number].flip(2) if flip else plain[number])
        want = normalise(images[number : number + 1].flip(2) if flip else images[number : number + 1])
        torch.testing.assert_close(x[number : number + 1, :3], want, rtol=1e-5, atol=1e-5)


def test_the_operator_is_as_torch_wants_it():
    images = torch.randint(0, 256, (1, 5, 4, 3), dtype=torch.uint8, device=DEVICE)
    torch.library.opcheck(prologue_op, (images, torch.bfloat16, 4))
    torch.library.opcheck(prologue_op, (images, torch.bfloat16, 3, torch.tensor([True], device=DEVICE)))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="uint8"):
        prologue(torch.zeros(1, 3, 4, 4), torch.float32)
    with pytest.raises(ValueError, match="3 channels or 4"):
        prologue(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.float32, 5)
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    for flips in (torch.zeros(2), torch.zeros(3, dtype=torch.bool), torch.zeros(2, dtype=torch.bool, device="meta")):
        with pytest.raises(ValueError, match=r"flips must be bool \(2\) on cpu"):
            prologue(images, torch.float32, flips=flips)

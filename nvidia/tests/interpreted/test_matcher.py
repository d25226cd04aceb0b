"""The matcher's kernels beyond what every backend is held to."""

import pytest
import torch
from base.backends.nvidia.matcher import match, match_op
from base.backends.reference.matcher import match as plain

from base.boxes import default_boxes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEVELS = ((6, 6), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1))


def truth(images, most, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, most, 2, generator=generator) * 0.7
    boxes = torch.cat([corner, corner + 0.02 + torch.rand(images, most, 2, generator=generator) * 0.3], 2)
    labels = torch.randint(1, 81, (images, most), generator=generator) * (torch.rand(images, most, generator=generator) < 0.8)
    return (boxes * (labels > 0)[..., None]).to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("images, most", [(1, 1), (3, 7), (2, 40)])
def test_targets_equal_the_references(images, most, seed):
    boxes, labels = truth(images, most, seed)
    defaults = default_boxes((96, 96), LEVELS).to(DEVICE)
    got, want = match(boxes, labels, defaults), plain(boxes, labels, defaults)
    assert torch.equal(got.labels, want.labels)
    torch.testing.assert_close(got.offsets, want.offsets, atol=1e-4, rtol=1e-5)


def test_batches_without_boxes():
    defaults = default_boxes((96, 96), LEVELS).to(DEVICE)
    for shape in ((2, 0), (0, 3), (2, 3)):
        found = match(torch.zeros(*shape, 4, device=DEVICE), torch.zeros(shape, dtype=torch.long, device=DEVICE), defaults)
        assert found.labels.shape == (shape[0], len(defaults)) and not found.labels.any() and not found.offsets.any()


def test_the_operator_is_as_torch_wants_it():
    boxes, labels = truth(2, 3, 0)
    defaults = default_boxes((96, 96), LEVELS).to(DEVICE)
    torch.library.opcheck(match_op, (boxes, labels, defaults.xywh, defaults.ltrb, defaults.mlperf_rank))


def test_shapes_that_do_not_fit_are_refused():
    defaults = default_boxes((96, 96), LEVELS).to(DEVICE)
    with pytest.raises(ValueError, match="boxes must be"):
        match(torch.zeros(2, 4), torch.zeros(2), defaults)
    with pytest.raises(ValueError, match="whole numbers"):
        match(torch.zeros(2, 1, 4), torch.zeros(2, 1), defaults)

"""The matcher of every backend, against a plain one in exact numbers."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.boxes import DefaultBoxes, encode, ltrb_to_xywh
from tests.conftest import DEVICE

GRID = 8  # corners on eighths: every IoU is a fraction of small integers, so that equal ones are equal in any precision
corners = st.tuples(*[st.integers(0, GRID)] * 4).map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))
solid = corners.filter(lambda c: c[0] < c[2] and c[1] < c[3])


def exact_iou(a, b) -> Fraction:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return Fraction(shared, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_match(boxes: list, defaults: list, order: list) -> list[int | None]:
    """Which box each default box is matched with: a statement of the rules in whole numbers."""
    matched: list[int | None] = []
    for default in defaults:
        best = max(range(len(boxes)), key=lambda n: exact_iou(boxes[n], default), default=None)  # the first of equals
        matched.append(best if best is not None and exact_iou(boxes[best], default) > Fraction(1, 2) else None)
    for number, box in enumerate(boxes):  # a later box takes it from an earlier one
        matched[max(order, key=lambda d: exact_iou(box, defaults[d]))] = number  # of equals, the first in the MLPerf order
    return matched


def on_grid(numbers: list, order: list) -> DefaultBoxes:
    ltrb = torch.tensor(numbers, dtype=torch.float32, device=DEVICE) / GRID
    return DefaultBoxes(ltrb_to_xywh(ltrb), ltrb, torch.tensor(order, device=DEVICE), ((1, len(numbers)),))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_matching_equals_a_plain_matcher_in_exact_numbers(backend, data):
    defaults = data.draw(st.lists(solid, min_size=1, max_size=20))
    order = data.draw(st.permutations(range(len(defaults))))
    images = data.draw(st.lists(st.lists(solid, max_size=5), min_size=1, max_size=3))
    boxes, labels = torch.zeros(len(images), 6, 4), torch.zeros(len(images), 6, dtype=torch.long)
    for n, image in enumerate(images):
        for m, box in enumerate(image):
            boxes[n, m], labels[n, m] = torch.tensor(box) / GRID, 10 * n + m + 1
    some = on_grid(defaults, list(order))
    targets = backend.matcher(boxes.to(DEVICE), labels.to(DEVICE), some)
    assert targets.offsets.dtype == torch.float32 and targets.labels.dtype == torch.int64
    for n, image in enumerate(images):
        matched = plain_match(image, defaults, list(order))
        assert targets.labels[n].tolist() == [0 if m is None else 10 * n + m + 1 for m in matched]
        want = torch.zeros(len(defaults), 4)
        for d, m in enumerate(matched):
            if m is not None:
                want[d] = encode(boxes[n, m], some.xywh[[d]].cpu())[0]
        torch.testing.assert_close(targets.offsets[n].cpu(), want, atol=1e-5, rtol=1e-5)


def test_the_later_of_two_boxes_wins_a_default_box_and_equals_go_to_the_first_in_mlperfs_order(backend):
    defaults = on_grid([(0, 0, 4, 8), (4, 0, 8, 8), (0, 0, 1, 1)], [1, 0, 2])
    boxes = torch.tensor([[(2, 0, 6, 8), (0, 0, 0, 0)], [(4, 0, 8, 8), (4, 0, 8, 8)]]) / GRID
    targets = backend.matcher(boxes.to(DEVICE), torch.tensor([[5, 0], [6, 7]], device=DEVICE), defaults)
    assert targets.labels.tolist() == [[0, 5, 0], [0, 7, 0]]

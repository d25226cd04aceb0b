"""The captured step on a GPU beside itself without a graph. It needs torch and Triton only, as all tests of this folder do."""

import os

import pytest
import torch
from base.backends.nvidia import step as steps
from base.backends.nvidia.loss import multibox_loss
from base.backends.nvidia.matcher import match
from base.backends.nvidia.model import FusedSSD

from base.clock import WARM_UP, Clock, Later
from base.contracts import Batch

on_a_gpu = pytest.mark.skipif(os.environ.get("SSD_TEST_DEVICE") != "cuda", reason="a graph is captured on a GPU only ($SSD_TEST_DEVICE=cuda)")
RATES = (0.01, 0.01, 0.005, 0.02, 0.0, 0.01, 0.01, 0.01)


class HalfStep(steps.GraphedStep):
    def precision(self, device):
        return torch.float16


def batch_of(boxes: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(8, boxes, 2, generator=random) * 0.6
    ltrb = torch.cat([corner, corner + 0.1 + torch.rand(8, boxes, 2, generator=random) * 0.3], -1)
    labels = torch.randint(1, 7, (8, boxes), generator=random)
    images = torch.randint(0, 256, (8, 96, 96, 3), dtype=torch.uint8, generator=random)
    return Batch(images, ltrb, labels, torch.arange(8), torch.full((8, 2), 96))


def trained(kind: type, graph: bool, accumulation: int) -> tuple[list[float], torch.Tensor, steps.GraphedStep]:
    """Losses and the way of the weights over RATES; the sixth batch has more boxes than there is room for."""
    torch.manual_seed(5)
    model = FusedSSD(num_classes=7, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18").cuda()
    optimizer = steps.build_optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = kind(model=model, optimizer=optimizer, matcher=match, loss=multibox_loss, device="cuda", accumulation=accumulation)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    losses = []
    for number, rate in enumerate(RATES):
        if not graph:
            step.steps = 0
        losses.append(step(batch_of(150 if number == 5 else 5, number), rate).item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]) - before, step


@on_a_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [steps.GraphedStep, HalfStep])
def test_the_graph_trains_as_the_step_without_one(kind, accumulation):
    losses, way, step = trained(kind, True, accumulation)
    wanted, plain, without = trained(kind, False, accumulation)
    assert step.graph is not None and without.graph is None and step.room == 256
    assert losses == pytest.approx(wanted, rel=0.02)
    assert torch.cosine_similarity(way, plain, dim=0) > 0.98 and way.norm().item() == pytest.approx(plain.norm().item(), rel=0.05)
    assert step.state_dict() == without.state_dict()  # the loss scale, if there is one


@on_a_gpu
def test_parts_of_a_step_are_timed_in_its_graph_too():
    torch.manual_seed(5)
    model = FusedSSD(num_classes=7, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18").cuda()
    optimizer = steps.build_optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = steps.GraphedStep(model=model, optimizer=optimizer, matcher=match, loss=multibox_loss, device="cuda")
    step.clock = clock = Clock(torch.device("cuda"))
    for number in range(10):  # the sixth has more boxes than there is room for
        clock.start()
        loss = Later(step(batch_of(150 if number == 5 else 5, number), 0.01))
        clock.mark("rest")
        assert loss.item() > 0 and clock.add(clock.marks, last=True) > 0
    told = clock.told()
    assert step.graph is not None and told.pop("steps") == 10 - WARM_UP
    assert {"forward_seconds", "loss_seconds", "backward_seconds", "optimizer_seconds"} <= told.keys()
    assert sum(told.values()) == pytest.approx(2 * told["step_seconds"], rel=0.01)

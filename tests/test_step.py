"""Optimizer and step of every backend, against those written out by hand."""

from dataclasses import replace

import pytest
import torch
import torchvision
from base.backends.reference.step import DEVIATION, MEAN, normalise

from base.backend import load_backend
from base.contracts import Batch
from tests.conftest import DEVICE, small_model
from tests.loss_scale import ScaledStep


def test_optimizer_is_sgd_with_momentum_and_decay(backend):
    torch.manual_seed(1)
    weight, bias = torch.nn.Parameter(torch.randn(3, 2, device=DEVICE)), torch.nn.Parameter(torch.randn(3, device=DEVICE))
    optimizer = backend.optimizer([weight, bias], momentum=0.9, weight_decay=0.01)
    want, speed = [p.detach().clone() for p in (weight, bias)], [torch.zeros_like(p) for p in (weight, bias)]
    for rate in (0.1, 0.1, 0.02):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for n, parameter in enumerate((weight, bias)):
            parameter.grad = torch.randn(parameter.shape, device=DEVICE)
            speed[n] = 0.9 * speed[n] + parameter.grad + 0.01 * want[n]
            want[n] = want[n] - rate * speed[n]
        optimizer.step()
        for got, expected in zip((weight, bias), want, strict=True):
            torch.testing.assert_close(got.detach(), expected, atol=1e-6, rtol=1e-5)
    again = backend.optimizer([weight, bias], momentum=0.9, weight_decay=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.02


def some_batch(count: int = 4, size: int = 96) -> Batch:
    draw = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=draw)
    corner = torch.rand(count, 3, 2, generator=draw) * 0.5
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(count, 3, 2, generator=draw)], 2)
    labels = torch.randint(1, 4, (count, 3), generator=draw)
    boxes[0, 2], labels[0, 2] = 0, 0
    return Batch(images, boxes, labels, torch.arange(count), torch.tensor([[50, 60]] * count))


def step_until_it_moves(step, model: torch.nn.Module, batch: Batch, rate: float) -> tuple[dict, torch.Tensor]:
    """Steps until the loss scale, where there is one, fits → the model's state before the last step, and that step's loss."""
    for _ in range(20 if step.state_dict() else 1):
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        loss = step(batch, rate)
        if any(not torch.equal(p, before[name]) for name, p in model.named_parameters()):
            break
    return before, loss


def stepped(backend, batch: Batch, accumulation: int, rate: float = 0.05):
    """A model before and after one step, that step's loss, and what a step written out by hand makes of the same model."""
    model, by_hand = small_model(backend), small_model(backend)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE, accumulation=accumulation)
    state, loss = step_until_it_moves(step, model, batch, rate)
    by_hand.load_state_dict(state)
    before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
    by_hand.train()
    total, parts = 0.0, batch.images.chunk(accumulation)
    for n, images in enumerate(parts):
        some = slice(n * len(parts[0]), n * len(parts[0]) + len(images))
        pixels = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2).float() / 255, MEAN, DEVIATION).contiguous()
        targets = backend.matcher(batch.boxes[some].to(DEVICE), batch.labels[some].to(DEVICE), by_hand.default_boxes)
        share = backend.loss(by_hand(pixels.to(DEVICE)), targets) * len(images) / len(batch.images)
        share.backward()
        total += share.item()
    want = {name: p.detach() - rate * (p.grad + 5e-4 * p.detach()) for name, p in by_hand.named_parameters()}
    return model, before, loss, by_hand, want, total


@pytest.mark.parametrize(("images", "accumulation"), [(4, 1), (4, 2), (3, 2)])
def test_a_step_equals_one_written_out(images, accumulation):
    """The reference, to rounding: parts add up to the mean over the batch, also if they are not equally long."""
    model, before, loss, by_hand, want, total = stepped(load_backend("reference"), some_batch(images), accumulation)
    assert loss.shape == () and not loss.requires_grad and loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = (want[name] - before[name]).norm()
        assert moved > 0 and (parameter.detach() - want[name]).norm() < 1e-3 * moved, name
    for (name, buffer), expected in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_goes_where_one_written_out_goes(backend, accumulation):
    """Every backend, in whatever precision: nearly the same loss, direction and length."""
    model, before, loss, _, want, total = stepped(backend, some_batch(), accumulation)
    assert loss.shape == () and not loss.requires_grad and loss.item() == pytest.approx(total, rel=0.03)
    moved = torch.cat([(p.detach().float() - before[name]).flatten() for name, p in model.named_parameters()])
    wanted = torch.cat([(want[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9  # bfloat16 has 8 bits, and batch norm over few pixels amplifies
    assert moved.norm().item() == pytest.approx(wanted.norm().item(), rel=0.1)


def test_steps_that_the_loss_scale_skips_change_nothing():
    backend = replace(load_backend("reference"), step=ScaledStep)
    test_a_step_goes_where_one_written_out_goes(backend, 1)
    test_the_second_step_uses_the_first_ones_momentum_and_its_own_rate(backend)


def test_the_second_step_uses_the_first_ones_momentum_and_its_own_rate(backend):
    model = small_model(backend)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=0.0)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    weight = next(model.parameters())
    places = [weight.detach().clone()]
    step_until_it_moves(step, model, some_batch(), 0.01)
    places.append(weight.detach().clone())
    for rate in (0.0, 0.01):
        step(some_batch(), rate)
        places.append(weight.detach().clone())
    assert not torch.equal(places[0], places[1]) and torch.equal(places[1], places[2]) and not torch.equal(places[2], places[3])


def test_prediction_changes_nothing_and_is_in_evaluation_mode(backend):
    model, batch = small_model(backend), some_batch()
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    step(batch, 0.01)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predictions = step.predict(batch.images)
    alone = step.predict(batch.images[1:2])  # evaluation batches may be ragged
    assert not predictions.logits.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    model.eval()
    with torch.no_grad():
        want = model(normalise(batch.images).to(DEVICE))
    for got, single, expected in zip(predictions, alone, want, strict=True):
        assert (got.float() - expected).norm() < 0.03 * expected.norm()
        assert (got[1:2].float() - single.float()).norm() < 0.03 * expected[1:2].norm()
    step(batch, 0.01)  # and training goes on in training mode
    assert not torch.equal(model.state_dict()["backbone.bn1.running_mean"], state["backbone.bn1.running_mean"])
    again = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=DEVICE)
    again.load_state_dict(step.state_dict())


def test_normalise_is_torchvisions():
    images = some_batch(2).images
    want = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2).float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    got = normalise(images)
    assert got.shape == (2, 3, 96, 96) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)

"""Checks of model, optimizer and step: the same weights and inputs as the reference's."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base import distributed, reach
from base.backend import Backend, load_backend
from base.contracts import Batch
from base.tools.ranks import on_ranks
from base.weights import from_mlperf
from conformance.parts import CLASSES, Found, Kit, NotChecked, apart, golden, random_truth, relative, wrong

SMALL = {"num_classes": CLASSES, "image_size": (96, 96), "strides": (1,) * 6, "backbone": "resnet18"}
COCO = {"num_classes": 81, "image_size": (300, 300), "strides": (1, 1, 2, 2, 2, 1), "backbone": "resnet34"}
LARGE = {**SMALL, "image_size": (1200, 1200), "strides": (3, 3, 2, 2, 2, 2)}
WIDE = {**SMALL, "image_size": (128, 200), "strides": (2, 2, 2, 1, 1, 1)}
SKIPPED = 20  # steps, at most, that a loss scale may be too large for
RATES = (0.02, 0.0, 0.005, 0.02, 0.01)
# Of a step in less than 32 bits: loss, and the length and direction of the way that the weights go (an error of 0.6 is a cosine of 0.82):
# 8 bits of mantissa go through batch norm over few pixels. The CPU backend's bf16 went up to 0.46 astray (seen, with a norm group).
LOW = {"loss": 0.03, "way of the weights": 0.6, "its length": 0.1, "running statistics": 0.01}
# In 32 bits: of twelve single steps beside float64, the reference's own went up to 2.7e-3 astray and a channels-last one 6.8e-3, where
# the last bits decided a ReLU, a maximum or a mined negative.
FULL = {"loss": 1e-4, "way of the weights": 0.02, "its length": 0.01, "running statistics": 1e-4}


def same_models(kit: Kit, options: dict = SMALL, backends: tuple[Backend, ...] = ()) -> list[nn.Module]:
    """A model of each backend (this one and the reference), with the same weights."""
    torch.manual_seed(kit.seed)
    models = [backend.model(**options).to(kit.device) for backend in backends or (kit.backend, kit.reference)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def default_boxes_of_a_wide_image(kit: Kit) -> Found:
    model, plain = (backend.model(**WIDE) for backend in (kit.backend, kit.reference))
    got, want = model.default_boxes, plain.default_boxes
    yield "default boxes of a wide image", max(apart(got.xywh, want.xywh), apart(got.ltrb, want.ltrb)), 1e-6
    yield "MLPerf order", apart(got.mlperf_order, want.mlperf_order), 0


def model_golden(kit: Kit) -> Found:
    coco, large = (kit.backend.model(**options).to(kit.device) for options in (COCO, LARGE))
    for name, model in (("default_boxes_300", coco), ("default_boxes_1200", large)):
        boxes, data = model.default_boxes, golden(name)
        yield f"golden: {name.replace('_', ' ')}", max(apart(getattr(boxes, key)[boxes.mlperf_order], kit.on(data[key])) for key in data), 1e-6
    theirs = from_mlperf({name: torch.empty(shape, device="meta") for name, shape in golden("mlperf_state_dict")})
    want, got = ({name: tensor.shape for name, tensor in state.items()} for state in (theirs, coco.state_dict()))
    yield "golden: names and shapes of weights", len(set(got.items()) ^ set(want.items())), 0


def random_images(kit: Kit, count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(kit.seed)).to(kit.device)


def results_and_slopes(model: nn.Module, images: Tensor) -> tuple[Any, Tensor]:
    """The model's predictions, and the gradients of its weights by a random pull at a tenth of the default boxes, as mining leaves."""
    model.zero_grad()
    results = model(images)
    pulls = [torch.randn(t.shape, generator=torch.Generator().manual_seed(n)).to(t.device) for n, t in enumerate(results)]
    some = torch.rand(pulls[0].shape[:2], generator=torch.Generator().manual_seed(2)).to(images.device) < 0.1
    sum((t * pull * some[..., None]).sum() for t, pull in zip(results, pulls, strict=True)).backward()
    return results, torch.cat([p.grad.flatten() for p in model.parameters()])


def forward_and_backward(kit: Kit) -> Found:
    for name, options, count in (("", SMALL, 4), (", wide, batch of 1", WIDE, 1)):
        models = same_models(kit, options)
        images = random_images(kit, count, options["image_size"])
        for mode in ("eval", "train"):
            results, slopes = zip(*(results_and_slopes(model.train(mode == "train"), images) for model in models), strict=True)
            yield f"forward, {mode}{name}", max(relative(*pair) for pair in zip(*results, strict=True)), 1e-4
            yield f"backward, {mode}{name}", relative(*slopes), 2e-3
        yield f"running statistics{name}", max(map(relative, models[0].buffers(), models[1].buffers())), 1e-4
        models[0].eval()
        with torch.no_grad():
            last = models[0](images.to(memory_format=torch.channels_last))
            yield f"channels-last images{name}", max(map(relative, last, models[0](images))), 1e-4


def steps_of_sgd(kit: Kit) -> Found:
    draw, ways = torch.Generator().manual_seed(kit.seed), []
    start = [torch.randn(shape, generator=draw) for shape in ((4, 3), (5,))]
    slopes = [[torch.randn(p.shape, generator=draw) for p in start] for _ in RATES]
    for backend in (kit.reference, kit.backend):
        parameters = [nn.Parameter(p.clone().to(kit.device)) for p in start]
        optimizer = backend.optimizer(parameters, momentum=0.9, weight_decay=0.05)
        ways.append([])
        for rate, given in zip(RATES, slopes, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            for parameter, slope in zip(parameters, given, strict=True):
                parameter.grad = slope.to(kit.device)
            optimizer.step()
            ways[-1].append(torch.cat([(p.detach().cpu() - q).flatten() for p, q in zip(parameters, start, strict=True)]))
    yield "momentum, weight decay, changing rates", max(map(relative, *reversed(ways))), 1e-5
    again = kit.backend.optimizer(parameters, momentum=0.9, weight_decay=0.05)
    again.load_state_dict(optimizer.state_dict())
    kept = [apart(again.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]) for p in parameters]
    yield "state is kept", max(kept), 0


def random_batch(kit: Kit, images: int) -> Batch:
    boxes, labels = random_truth(kit.rng(), images, 3, smallest=0.15)
    pixels = torch.from_numpy(kit.rng().integers(0, 256, (images, 96, 96, 3), dtype="uint8"))
    return Batch(pixels, torch.from_numpy(boxes).float(), torch.from_numpy(labels), torch.arange(images), torch.full((images, 2), 96))


def same_steps(kit: Kit, backends: tuple[Backend, Backend], norm_group: Any = None, **options) -> list[tuple]:
    """(step, model, optimizer) of two backends, with this backend's other components and the same weights, so that only the steps differ."""
    other, made = kit.backend, []
    for backend, model in zip(backends, same_models(kit, {**SMALL, "norm_group": norm_group}, (other, other)), strict=True):
        optimizer = other.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        parts = {"model": model, "optimizer": optimizer, "matcher": other.matcher, "loss": other.loss, "device": kit.device}
        made.append((backend.step(**parts, **options), model, optimizer))
    return made


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().flatten() for t in tensors if t.is_floating_point()])


def errors(losses: list[float], ways: list[Tensor], models: list[nn.Module]) -> dict[str, float]:
    """What `LOW` and `FULL` bound."""
    lengths = [way.norm().item() for way in ways]
    return {
        "loss": abs(losses[0] / losses[1] - 1),
        "way of the weights": relative(*ways),
        "its length": abs(lengths[0] - lengths[1]) / (lengths[1] or 1),
        "running statistics": relative(*(flat(model.buffers()) for model in models)),
    }


def tolerated(step, batch: Batch) -> dict[str, float]:
    """By the precision that a step's predictions have."""
    return FULL if step.predict(batch.images).logits.dtype == torch.float32 else LOW


def put_beside(plain: tuple, own: tuple) -> None:
    """Gives the reference the other's momentum; with `step_beside` rounding of one step does not add up over several."""
    (_, model, optimizer), (_, other, theirs) = plain, own
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in theirs.state[same].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # momentum; the copy has the parameter's memory format
                optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)


def step_beside(own: tuple, plain: tuple, batch: Batch, rate: float) -> tuple[dict[str, float], Tensor]:
    """One step of each from the same state → its errors, and the way of the first. It is the first step that the loss scale, where there
    is one, lets through; what it skips may change statistics, but neither weights nor momentum."""
    (step, model, _), (other, same, _) = own, plain
    put_beside(plain, own)
    for _ in range(SKIPPED if step.state_dict() else 1):
        same.load_state_dict(model.state_dict())
        before = flat(model.parameters())
        loss = step(batch, rate)
        way = flat(model.parameters()) - before
        if rate == 0 or way.any():
            break
    if loss.shape != () or loss.requires_grad:
        raise ValueError(f"a step returns a detached scalar, and this is {loss}")
    wanted = other(batch, rate).item()
    return errors([loss.item(), wanted], [way, flat(same.parameters()) - before], [model, same]), way


def training_steps(kit: Kit) -> Found:
    """Each from the same state: loss, way, statistics."""
    for accumulation in (1, 2):
        batch, worst = random_batch(kit, 8), dict.fromkeys(FULL, 0.0)
        own, plain = same_steps(kit, (kit.backend, kit.reference), accumulation=accumulation)
        for rate in RATES[: None if accumulation == 1 else 2]:
            found, _ = step_beside(own, plain, batch, rate)
            worst = {name: max(worst[name], error) for name, error in found.items()}
        name = "changing rates" if accumulation == 1 else "accumulation"
        for what, tolerance in tolerated(own[0], batch).items():
            yield f"{name}: {what}", worst[what], tolerance


def prediction(kit: Kit) -> Found:
    batch = random_batch(kit, 4)
    (own, model, _), (plain, other, _) = same_steps(kit, (kit.backend, kit.reference))
    own(batch, 0.01)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    got, want, alone = own.predict(batch.images), plain.predict(batch.images), own.predict(batch.images[1:2])
    bound = 1e-3 if got.logits.dtype == torch.float32 else 0.03
    yield "predict", max(map(relative, (t.float() for t in got), want)), bound
    yield "predict, ragged batch", max(relative(a.float(), b[1:2].float()) for a, b in zip(alone, got, strict=True)), bound
    moved = max(apart(value, state[name]) for name, value in model.state_dict().items())
    yield "predict changes nothing and takes no gradients", moved + got.logits.requires_grad, 0
    own(batch, 0.01)
    yield "training goes on after it", wrong(moves=relative(flat(model.buffers()), flat(other.buffers())) > 0), 0
    kit.backend.step(model=model, optimizer=None, matcher=None, loss=None, device=kit.device).load_state_dict(own.state_dict())


def rank_main(work: Callable, name: str, use: dict, kind: str, seed: int, folder: str):
    """What ``work(kit, ranks)`` returns on this rank."""
    backend = load_backend(name, use)
    torch.backends.cudnn.allow_tf32 = False  # as in the process that started this one
    ranks = reach.join(kind, "gloo" if kind == "cpu" else backend.distributed, 120)
    found = work(Kit(backend, load_backend("reference"), ranks.device, seed, Path(folder), use), ranks)
    reach.leave()
    return found


def on_two_ranks(kit: Kit, work: Callable) -> list:
    """What ``work`` returns on each of two ranks. Raises NotChecked without two devices."""
    kind = kit.device.type
    if kind != "cpu" and distributed.devices_here(kind) < 2:
        raise NotChecked("needs two devices")
    return on_ranks(2, rank_main, work, kit.backend.name, kit.use, kind, kit.seed, str(kit.scratch))


def model_of_a_rank(kit: Kit, ranks: distributed.Ranks) -> list[tuple]:
    """Of each backend's model: predictions of this rank's images, gradients, statistics."""
    models = same_models(kit, {**SMALL, "norm_group": ranks.neighbours(0)})
    images = random_images(kit, 8, SMALL["image_size"]).chunk(2)[ranks.rank]
    made = [results_and_slopes(model.train(), images) for model in models]
    return [([t.detach() for t in results], slopes, flat(model.buffers())) for (results, slopes), model in zip(made, models, strict=True)]


def norm_group_of_two_ranks(kit: Kit) -> Found:
    """Gradients of batch norm's weights may be shares in any way, so that their sum over the ranks is compared."""
    each = on_two_ranks(kit, model_of_a_rank)
    yield "norm group: forward", max(relative(*pair) for own, plain in each for pair in zip(own[0], plain[0], strict=True)), 1e-4
    yield "norm group: backward", relative(*(first[1] + second[1] for first, second in zip(*each, strict=True))), 2e-3
    yield "norm group: running statistics", max(relative(own[2], plain[2]) for own, plain in each), 1e-4


BUCKETS = {"bucket_mb": 1, "accumulation": 2}
RANKS = {"two ranks": {}, "norm group, buckets": BUCKETS, "norm group, bf16 buckets": {**BUCKETS, "compression": "bf16"}}  # the options of steps


def steps_of_a_rank(kit: Kit, ranks: distributed.Ranks) -> tuple[dict[str, tuple], dict[str, float]]:
    """A step on this rank's half of a batch by the backend and by the reference: case → (errors, way, state), and what is tolerated."""
    half, found = Batch(*(t.chunk(2)[ranks.rank] for t in random_batch(kit, 16))), {}
    for name, options in RANKS.items():
        group = ranks.neighbours(0) if options else None
        own, plain = same_steps(kit, (kit.backend, kit.reference), group, world_size=2, **options)
        found[name] = *step_beside(own, plain, half, 0.02), own[1].state_dict()
    return found, tolerated(own[0], half)


def two_ranks(kit: Kit) -> Found:
    (first, bounds), (second, _) = on_two_ranks(kit, steps_of_a_rank)
    for name in RANKS:
        (errors, _, state), (others, _, other) = first[name], second[name]
        for what, bound in bounds.items():
            yield f"{name}: {what}", max(errors[what], others[what]), bound
        yield f"{name}: they hold the same", sum(apart(state[key], other[key]) > 0 for key in state), 0
    # Beside its own uncompressed step from the same state, which differs by nothing but bf16's 8 bits: rounding in float32 is hundreds of times less
    rounding = relative(*(first[name][1] for name in list(RANKS)[:0:-1]))
    yield "compression rounds to bf16", wrong(rounded=rounding > 1e-4), 0


def timed_model(kit: Kit, backend: Backend) -> Callable:
    model, images = backend.model(**SMALL).to(kit.device).train(), torch.randn(4, 3, 96, 96, device=kit.device)
    return lambda: sum(t.square().sum() for t in model(images)).backward()


def timed_step(kit: Kit, backend: Backend) -> Callable:
    model, batch = backend.model(**SMALL).to(kit.device), random_batch(kit, 8)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=kit.device)
    return lambda: step(batch, 1e-3)


def timed_optimizer(kit: Kit, backend: Backend) -> Callable:
    parameters = [nn.Parameter(torch.randn(1 << 18, device=kit.device)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return backend.optimizer(parameters, momentum=0.9, weight_decay=5e-4).step


CHECKS = {
    "model": (model_golden, default_boxes_of_a_wide_image, forward_and_backward, norm_group_of_two_ranks),
    "optimizer": (steps_of_sgd,),
    "step": (training_steps, prediction, two_ranks),
}
SPEEDS = {"model": timed_model, "optimizer": timed_optimizer, "step": timed_step}

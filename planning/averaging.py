"""What ranks send in a training step, what sending costs on this machine, and `planning.formulas` beside steps that really average."""

import statistics
import time
from collections.abc import Callable

import torch
from base.backends.reference.all_reduce import COMPRESSED, Average
from torch import nn

from base import reach
from base.backend import load_backend
from base.contracts import Batch
from base.distributed import Ranks
from base.tools.ranks import on_ranks
from measuring.ssd300 import truth
from planning.formulas import Link, Network, Work, fitted

BACKWARD = 63.03 / 94.75  # of a step: GFLOP of SSD300-ResNet34's backward pass, of forward and backward together
SIZES = tuple(1 << power for power in (12, 16, 20, 22, 24, 25))  # bytes that a link is measured with
SMALL = {"num_classes": 6, "image_size": (64, 64), "strides": (1,) * 6, "backbone": "resnet18"}  # the detector of `check`
IMAGES, ACCURACY = 1, 2.0  # of a rank in `check`; by what factor a prediction may be wrong there
PROCESSES, BUCKETS = (1, 2, 4), (0, 4)  # of `check`; the buckets' sizes in MiB
ROUNDS = 15  # of which a time is the median


def work(detector: dict, seconds: float, batch: int, bucket_mb: int, compression: str, backward: float = BACKWARD, **options) -> Work:
    """The step of a detector (arguments of `base.contracts.MakeModel`) that takes ``seconds`` on one device.

    Gradients come in the order in which `Average` sends them, each after as much of the backward pass as its convolutions' share
    of the operations. ``options``: the rest of `Work`.
    """
    model = load_backend("reference").model(**detector).to("meta").eval()
    operations: dict[nn.Parameter, int] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, y: operations.update({layer.weight: layer.weight.numel() * y[0, 0].numel()}))
    model(torch.empty(1, 3, *detector["image_size"], device="meta"))
    average, done, buckets = Average(model, 2, bucket_mb, compression), 0, []
    width = (COMPRESSED[compression] or torch.float32).itemsize
    for bucket in average.buckets:
        done += sum(operations.get(parameter, 0) for parameter in bucket)
        buckets.append((done / sum(operations.values()), width * sum(parameter.numel() for parameter in bucket)))
    norms = tuple(4 * layer.num_features for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    running = 4 * sum(buffer.numel() for buffer in average.buffers)
    return Work(seconds, batch, tuple(buckets), backward, statistics=running, norms=norms, **options)


def together(ranks: Ranks, cases: dict, rounds: int) -> dict:
    """Seconds of each case, begun by all ranks at once, until the last is done: medians of interleaved rounds after one of warm-up."""
    own: dict = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            ranks.sums([0.0])
            began = time.perf_counter()
            case()
            if ranks.device.type != "cpu":
                torch.get_device_module(ranks.device.type).synchronize()
            own[name].append(time.perf_counter() - began)
    slowest = {name: map(max, zip(*(rank[name][1:] for rank in ranks.gathered(own)), strict=True)) for name in cases}
    return {name: statistics.median(seconds) for name, seconds in slowest.items()}


def averages(ranks: Ranks) -> dict[int, Callable]:
    """Bytes → the averaging of so many of gradients, as a step does it: put together, summed, and written back."""
    found = {}
    for size in SIZES:
        weight = nn.Parameter(torch.zeros(size // 4, device=ranks.device))
        weight.grad = torch.ones_like(weight)
        found[size] = Average(nn.ParameterList([weight]), ranks.world_size, 0, "none").finish
    return found


def rank_of_link(kind: str, group: str) -> dict[int, float]:
    """One rank of `link`: bytes → seconds."""
    torch.set_num_threads(1)
    ranks = reach.join(kind, group, 120)
    seconds = together(ranks, averages(ranks), ROUNDS)
    reach.leave()
    return seconds


def link(kind: str, group: str) -> Link:
    """The link between two devices of this machine, by their process group, as gradients see it."""
    seconds = on_ranks(2, rank_of_link, kind, group)[0]
    return fitted(2, list(seconds), list(seconds.values()))


def rank_of_check(rounds: int) -> dict:
    """One rank of `check`: "alone" (a step without other ranks, while theirs run too), each bucket size, each size of `averages` → seconds."""
    torch.set_num_threads(1)
    ranks, reference = reach.join("cpu", "gloo", 120), load_backend("reference")
    height, width = SMALL["image_size"]
    boxes, labels = truth(IMAGES, 7)
    images = torch.randint(0, 256, (IMAGES, height, width, 3), dtype=torch.uint8)
    batch = Batch(images, boxes, labels % (SMALL["num_classes"] - 1) + 1, torch.arange(IMAGES), torch.full((IMAGES, 2), height))
    cases = averages(ranks) if ranks.world_size > 1 else {}
    for name in ("alone", *BUCKETS):
        torch.manual_seed(1)
        model = reference.model(**SMALL)
        optimizer = reference.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        options = {} if name == "alone" else {"world_size": ranks.world_size, "bucket_mb": name}
        parts = {"model": model, "optimizer": optimizer, "matcher": reference.matcher, "loss": reference.loss, "device": ranks.device}
        step = reference.step(**parts, **options)
        cases[f"step {name}"] = lambda step=step: step(batch, 1e-6)
    seconds = together(ranks, cases, rounds)
    reach.leave()
    return seconds


def check(rounds: int = ROUNDS) -> list[dict]:
    """Predicted beside measured steps of a small detector by Gloo on this machine, one row for each number of processes and bucket size.

    The processes share the machine's cores, so each number of them has its own step without averaging and its own link.
    """
    rows = []
    for count in PROCESSES:
        seconds = on_ranks(count, rank_of_check, rounds)[0]
        here = fitted(count, list(SIZES), [seconds[size] for size in SIZES]) if count > 1 else None
        for size in BUCKETS:
            predicted = work(SMALL, seconds["step alone"], IMAGES, size, "none").on(count, Network(here))
            row = {"processes": count, "bucket_mb": size, "alone": seconds["step alone"], "predicted": predicted, "measured": seconds[f"step {size}"]}
            rows.append({**row, "latency": here and here.latency, "bandwidth": here and here.bandwidth})
    return rows

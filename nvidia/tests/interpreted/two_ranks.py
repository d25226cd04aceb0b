"""One of two processes that share batch statistics, for test_norm.py."""

from pathlib import Path

import torch
import torch.distributed as dist
from base.backends.nvidia.norm import norm_relu
from torch import nn


def run(rank: int, folder: str, device: str) -> None:
    """Does its half of folder/given.pt = (norm, x, shortcut, slope), twice, and leaves results and gradients in folder/<rank>.pt."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norm, *tensors = torch.load(Path(folder, "given.pt"), map_location=device, weights_only=False)
    x, shortcut, slope = (t.chunk(2)[rank].contiguous(memory_format=torch.channels_last) for t in tensors)
    found = []
    for inputs in ([x, shortcut], [x, None]):
        leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
        y = norm_relu(norm, *leaves, *[None] * (2 - len(leaves)), True, dist.group.WORLD)
        found.append([y, *torch.autograd.grad(y, [*leaves, norm.weight, norm.bias], slope)])
    with_nothing = nn.BatchNorm2d(3, device=device)
    far = torch.full((1, 3, 1, 1), 1000.0 + rank, device=device)  # one value a channel and rank, and a mean far from zero
    found.append([norm_relu(with_nothing, far, None, False, dist.group.WORLD), norm.running_mean, norm.running_var, norm.num_batches_tracked])
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()

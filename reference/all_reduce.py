"""Averages over ranks: gradients, running statistics, and the batch statistics of batch norm."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

COMPRESSED = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what gradients travel as; None: as they are


class Average:
    """Makes gradients and running statistics of a model their average over all ranks.

    Gradients travel in buckets that never change, so a resumed run adds in the same order (DistributedDataParallel regroups
    its own after the first step). With ``bucket_mb`` 0 there is one, sent by `finish`; else a bucket, of that many MiB or the
    last gradient more, is sent as soon as the backward pass has its gradients. ``compression`` halves the bytes, and each
    rank's share is divided before it is sent, so that sums stay in fp16's range.
    """

    def __init__(self, model: nn.Module, world_size: int, bucket_mb: int, compression: str):
        self.world_size, self.dtype = world_size, COMPRESSED[compression]
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        learned = [p for p in reversed(list(model.parameters())) if p.requires_grad]  # about as the backward pass comes to them
        self.buckets, room = [[]], 0
        for parameter in learned:
            if bucket_mb and room >= bucket_mb << 20:
                self.buckets.append([])
                room = 0
            self.buckets[-1].append(parameter)
            room += parameter.numel() * parameter.element_size()
        self.missing: list[int] = []  # gradients that each bucket still waits for; empty outside the backward pass
        self.sent: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        if bucket_mb:
            for number, bucket in enumerate(self.buckets):
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))

    def begin(self) -> None:
        """Gradients that arrive from here on are final: before the last backward pass of a step."""
        self.missing = [len(bucket) for bucket in self.buckets]

    def _arrived(self, number: int) -> None:
        if not self.missing:
            return
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:  # in one order on every rank
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        gradients = [p.grad for p in self.buckets[len(self.sent)] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / self.world_size
        flat = flat.to(self.dtype or flat.dtype)
        self.sent.append((gradients, flat, dist.all_reduce(flat, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Sends what has not been sent, waits for all of it, and writes the averages."""
        while len(self.sent) < len(self.buckets):
            self._send()
        if self.buffers:
            flat = torch.cat([b.flatten() for b in self.buffers]) / self.world_size
            self.sent.append((self.buffers, flat, dist.all_reduce(flat, async_op=True)))
        for tensors, flat, work in self.sent:
            work.wait()
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
        self.missing, self.sent = [], []


def group_norm(norm: nn.BatchNorm2d, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Batch norm of (N, C, H, W) in training, with statistics over the batches of all ranks of ``group``, equally large.

    As torch's SyncBatchNorm, which is for GPUs only. A gradient of weight or bias is this rank's share of the sum over ranks.
    """
    ranks = dist.get_world_size(group)
    wide = x.float()
    mean = _Sum.apply(wide.mean((0, 2, 3)), group) / ranks
    apart = wide - mean[:, None, None]
    variance = _Sum.apply(apart.square().mean((0, 2, 3)), group) / ranks
    count = x.numel() // x.shape[1] * ranks
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return (apart * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over a group's ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):
        total = slope.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None

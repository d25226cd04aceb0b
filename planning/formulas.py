"""How long a training step takes on N devices: pure functions of a one-device step, its gradients and a link. docs/scaling.md explains them."""

import math
from dataclasses import dataclass

import numpy as np

# MLPerf's reference convergence points for SSD: global batch → epochs to mAP 0.23. For 4096 both ends of what is given.
CONVERGENCE = {1024: (50, 50), 1536: (55, 55), 2048: (65, 65), 4096: (85, 90)}


@dataclass(frozen=True)
class Link:
    """What one end of a link sends, and receives at the same time."""

    latency: float  # seconds of a message without content
    bandwidth: float  # bytes a second

    def ring(self, ends: int, size: float) -> float:
        """Seconds to sum ``size`` bytes over ``ends`` in a ring: 2(N-1) messages of size / N (Patarasuk and Yuan 2009)."""
        return 2 * (ends - 1) * (self.latency + size / ends / self.bandwidth)

    def tree(self, ends: int, size: float) -> float:
        """The same in two binary trees that share the work, up and down (Sanders, Speck and Träff 2009)."""
        return 2 * (math.ceil(math.log2(ends)) * self.latency + size / self.bandwidth)


@dataclass(frozen=True)
class Network:
    """Devices in nodes. ``between`` is the link of a whole node to the others, all its cards together; None: one node."""

    inside: Link
    devices_per_node: int | None = None
    between: Link | None = None

    def all_reduce(self, devices: int, size: float) -> float:
        """Seconds to sum ``size`` bytes over ``devices`` in a row.

        Over several nodes: each sums up within itself (one half of a ring), then each device its share of the bytes with those in the
        same place of the other nodes, by ring or trees, whatever is faster; then the nodes spread the sums (the ring's other half).
        """
        here = min(devices, self.devices_per_node or devices)
        seconds = self.inside.ring(here, size)
        if (nodes := math.ceil(devices / here)) > 1:
            seconds += min(self.between.ring(nodes, size), self.between.tree(nodes, size))
        return seconds


@dataclass(frozen=True)
class Work:
    """A training step as measured on one device, and what its ranks would have to send."""

    seconds: float  # of a step
    batch: int  # images of it
    buckets: tuple[tuple[float, float], ...]  # in their order: part of the backward pass after which it is complete, bytes
    backward: float  # part of the step that is its backward pass
    parts: int = 1  # in which it computes its batch: only the last one's backward pass has gradients to send
    statistics: float = 0  # bytes of running statistics, averaged after the gradients
    norms: tuple[float, ...] = ()  # bytes of the batch statistics of each batch norm
    norm_ranks: int = 1  # whose batches share them; 0: all

    def on(self, devices: int, network: Network, batch: float | None = None) -> float:
        """Seconds of a step on so many devices with ``batch`` images each (default: as measured).

        Buckets travel one after the other, each as soon as it is complete, as in DistributedDataParallel (Li et al., VLDB 2020).
        """
        compute = self.seconds * (self.batch if batch is None else batch) / self.batch
        if devices == 1:
            return compute
        backward, sent = compute * self.backward / self.parts, 0.0
        for ready, size in self.buckets:
            sent = max(sent, ready * backward) + network.all_reduce(devices, size)
        waits = max(0.0, sent - backward) + (network.all_reduce(devices, self.statistics) if self.statistics else 0.0)
        group = min(self.norm_ranks or devices, devices)
        # mean and variance each have a message in the forward pass, and one in the backward pass
        shared = self.parts * sum(4 * network.all_reduce(group, size) for size in self.norms) if group > 1 else 0.0
        return compute + waits + shared


def epochs_to_target(global_batch: float) -> tuple[float, float] | None:
    """The fewest and the most epochs to mAP 0.23 by MLPerf's points and straight lines between them; None outside of them."""
    if not min(CONVERGENCE) <= global_batch <= max(CONVERGENCE):
        return None
    few, many = (float(np.interp(global_batch, list(CONVERGENCE), ends)) for ends in zip(*CONVERGENCE.values(), strict=True))
    return few, many


def fitted(ends: int, sizes: list[float], seconds: list[float]) -> Link:
    """The link whose `ring` takes about these seconds for these sizes, each size counting alike.

    Where the smallest take next to nothing the latency is a nanosecond: it cannot be negative."""
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    messages = 2 * (ends - 1)
    return Link(max(start / messages, 1e-9), messages / ends / max(slope, 1e-15))

"""Stochastic gradient descent with momentum, as MLPerf's rules ask; weight decay on every parameter."""

from collections.abc import Iterable

import torch


def build_optimizer(parameters: Iterable[torch.nn.Parameter], *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD whose learning rate the step sets each time."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay)

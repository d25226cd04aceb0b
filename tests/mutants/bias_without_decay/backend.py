"""Optimizer: no weight decay for biases and batch norm."""

import torch

from base.backend import Backend


def without(parameters, *, momentum, weight_decay):
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() > 1]}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


BACKEND = Backend(name="bias_without_decay", optimizer=without)

"""Optimizer: Nesterov's momentum."""

import torch

from base.backend import Backend


def nesterov(parameters, *, momentum, weight_decay):
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, nesterov=True)


BACKEND = Backend(name="nesterov", optimizer=nesterov)

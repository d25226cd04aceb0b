"""Step: running statistics are not averaged over ranks."""

import torch
from base.backends.altered import altered_step
from base.backends.reference.step import TrainStep

from base.backend import Backend


class Own(TrainStep):
    @torch.no_grad()
    def _average_over_ranks(self):
        kept = [buffer.clone() for buffer in self.model.buffers()]
        super()._average_over_ranks()
        for buffer, own in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(own)


BACKEND = Backend(name="statistics_of_a_rank", step=altered_step(Own))

"""Step: running statistics are not averaged over ranks."""

from base.backends.reference.step import TrainStep

from base.backend import Backend


class Own(TrainStep):
    def __init__(self, **parts):
        super().__init__(**parts)
        if self.average:
            self.average.buffers = []


BACKEND = Backend(name="statistics_of_a_rank", step=Own)

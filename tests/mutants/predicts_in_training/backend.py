"""Step: predicts with the batch's own statistics."""

import torch
from base.backends.reference.step import TrainStep

from base.backend import Backend


class Training(TrainStep):
    @torch.no_grad()
    def predict(self, images):
        self.model.train()
        return self.forward(images.to(self.device))


BACKEND = Backend(name="predicts_in_training", step=Training)

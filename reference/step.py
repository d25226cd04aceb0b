"""One training step in float32, with nothing clever in it."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from base.contracts import Batch, Loss, Matcher, Predictions

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) with ImageNet's mean and deviation, in channels-last memory as it came."""
    mean, deviation = (torch.tensor(values, device=images.device) for values in (MEAN, DEVIATION))
    return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


class TrainStep:
    """The plain step; see `base.contracts.Step`."""

    def __init__(self, model: nn.Module, optimizer: Any, matcher: Matcher, loss: Loss, device, accumulation: int, world_size: int):
        self.model, self.optimizer, self.matcher, self.loss = model, optimizer, matcher, loss
        self.device, self.accumulation, self.world_size = device, accumulation, world_size

    def __call__(self, batch: Batch, learning_rate: float) -> Tensor:
        """Trains on one batch and returns this rank's loss, a detached float32 scalar."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = zip(*(t.chunk(self.accumulation) for t in (batch.images, batch.boxes, batch.labels)), strict=True)
        for images, boxes, labels in parts:
            predictions = self.forward(images.to(self.device))
            targets = self.matcher(boxes.to(self.device), labels.to(self.device), self.model.default_boxes)
            loss = self.loss(predictions, targets) * len(images) / len(batch.images)
            loss.backward()
            total += loss.detach()
        if self.world_size > 1:
            self._average_over_ranks()
        self.optimizer.step()
        return total

    @torch.no_grad()
    def _average_over_ranks(self) -> None:
        """Averages gradients and running statistics in one all-reduce, so that all ranks always hold the same state."""
        tensors = [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [b for b in self.model.buffers() if b.is_floating_point()]
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Predictions:
        """uint8 (N, H, W, 3) → Predictions in evaluation mode."""
        self.model.eval()
        return self.forward(images.to(self.device))

    def forward(self, images: Tensor) -> Predictions:
        """uint8 (N, H, W, 3) on the device → Predictions; where precision and memory format are decided."""
        return self.model(normalise(images).contiguous())

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """float32 has no state of its own."""


def build_step(
    *, model: nn.Module, optimizer: Any, matcher: Matcher, loss: Loss, device, accumulation: int = 1, world_size: int = 1
) -> TrainStep:
    """A `TrainStep` for one rank; the caller has put ``model`` on ``device``."""
    return TrainStep(model, optimizer, matcher, loss, device, accumulation, world_size)

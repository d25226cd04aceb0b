"""One training step with nothing clever in it; backends state their precision and memory format, or override its parts."""

from typing import Any

import torch
from torch import Tensor, nn

from base.clock import Clock
from base.contracts import Batch, Loss, Matcher, Predictions
from base.errors import UserError

from .all_reduce import Average

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W) with ImageNet's mean and deviation, in channels-last memory as it came."""
    mean, deviation = (torch.tensor(values, device=images.device) for values in (MEAN, DEVIATION))
    return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


class TrainStep:
    """The plain step; see `base.contracts.MakeStep` and `Step`. Weights, gradients, statistics and momentum are float32.

    A subclass's `precision` decides what autocast multiplies in: bfloat16, or float16, which brings loss scaling.
    """

    memory_format = torch.contiguous_format  # of weights and images
    clock: Clock | None = None  # that the training loop sets, to know how long the parts take

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Any,
        matcher: Matcher,
        loss: Loss,
        device: torch.device | str,
        accumulation: int = 1,
        world_size: int = 1,
        bucket_mb: int = 0,
        compression: str = "none",
    ):
        self.model, self.optimizer, self.matcher, self.loss = model.to(memory_format=self.memory_format), optimizer, matcher, loss
        self.device, self.accumulation = torch.device(device), accumulation
        self.average = Average(model, world_size, bucket_mb, compression) if world_size > 1 else None
        self.dtype = self.precision(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def precision(self, device: torch.device) -> torch.dtype:
        """What the model multiplies in."""
        return torch.float32

    def __call__(self, batch: Batch, learning_rate: float) -> Tensor:
        """Trains on one batch and returns this rank's loss, a detached float32 scalar."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return self.train_on(*(t.to(self.device) for t in (batch.images, batch.boxes, batch.labels)))

    def mark(self, part: str) -> None:
        """A part of the step ends."""
        if self.clock is not None:
            self.clock.mark(part)

    def train_on(self, images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """Forward, loss, backward, all-reduce and optimizer, of what is on the device."""
        self.mark("transfer")
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = list(zip(*(t.chunk(self.accumulation) for t in (images, boxes, labels)), strict=True))
        for number, part in enumerate(parts):
            if self.average and number == len(parts) - 1:
                self.average.begin()
            targets = self.matcher(*part[1:], self.model.default_boxes)
            self.mark("matching")
            predictions = self.forward(part[0])
            self.mark("forward")
            loss = self.loss(predictions, targets) * (len(part[0]) / len(images))
            self.mark("loss")
            self.scaler.scale(loss).backward()
            total += loss.detach()
            self.mark("backward")
        if self.average:
            self.average.finish()
            self.mark("all_reduce")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.mark("optimizer")
        return total

    @torch.no_grad()
    def predict(self, images: Tensor) -> Predictions:
        """uint8 (N, H, W, 3) → Predictions in evaluation mode."""
        self.model.eval()
        return self.forward(images.to(self.device))

    def forward(self, images: Tensor) -> Predictions:
        """uint8 (N, H, W, 3) on the device → Predictions."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.model(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) on the device → what the model takes."""
        return normalise(images).contiguous(memory_format=self.memory_format)

    def state_dict(self) -> dict:
        """The loss scale, where there is one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError if the state is of a step with a loss scale and this one has none, or the other way round."""
        if bool(state) != self.scaler.is_enabled():
            has, this = ("a", "none") if state else ("no", "one")
            raise UserError(
                f"the checkpoint has {has} loss scale, and a step in {str(self.dtype).removeprefix('torch.')} on {self.device} has {this}: "
                "go on with the backend and on the kind of device that it was written with"
            )
        if state:
            self.scaler.load_state_dict(state)

"""The training step on NVIDIA GPUs: bf16 (fp16 with loss scaling before Ampere), channels-last, the whole step in one CUDA graph."""

import re

import torch
from base.backends.reference.step import TrainStep
from torch import Tensor
from torch.nn import functional

from base.clock import Clock
from base.contracts import Batch
from base.errors import UserError

from .prologue import prologue

EAGER_STEPS = 3  # before the capture: cuDNN chooses its algorithms, Triton compiles, momentum comes into being
LEAST_BOXES = 128  # boxes of an image that a step has room for, which is COCO's most; a batch with more makes a graph with twice the room


def precision(device: torch.device) -> torch.dtype:
    """What the device multiplies fastest with enough range: bfloat16 from Ampere on, float16 on Volta and Turing, float32 on a CPU.

    Raises UserError if this build of torch has no code for the device.
    """
    if device.type != "cuda":
        return torch.float32
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if not any(runs(code, major, minor) for code in built):
        raise UserError(
            f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)} (sm_{major}{minor}), only {' '.join(built)}; CUDA 13 "
            "left out Volta: install a build of torch for CUDA 12 in the environment, which prepare.py then keeps"
        )
    return torch.bfloat16 if major >= 8 else torch.float16


def runs(code: str, major: int, minor: int) -> bool:
    """Whether a GPU runs code for "sm_80" (of its generation, not newer) or "compute_80" (any not newer); letters at the end: exactly that GPU."""
    kind, number, letter = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", code).groups()
    than = int(number[:-1]), int(number[-1])
    return than == (major, minor) if letter else than <= (major, minor) and (kind == "compute" or than[0] == major)


class GraphedStep(TrainStep):
    """The reference's step in another precision, captured once and replayed; weights, statistics and momentum stay float32.

    The first steps run without a graph, and are training like any other. Nothing in the graph waits for the host: the rate is a
    number on the device, and so is the loss scale. On a CPU it runs eagerly, in float32.
    """

    memory_format = torch.channels_last

    def __init__(self, **parts):
        super().__init__(**parts)
        start_momentum(self.optimizer)
        self.rate = torch.zeros((), device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inside: list = []  # marks between the parts of the step, in the graph: each replay sets them anew
        self.inputs: tuple[Tensor, ...] = ()  # images, boxes and labels that the graph reads
        self.result: Tensor | None = None  # the loss that it writes
        self.steps, self.room = 0, LEAST_BOXES
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def precision(self, device: torch.device) -> torch.dtype:
        return precision(device)

    def __call__(self, batch: Batch, learning_rate: float) -> Tensor:
        """Trains on one batch and returns this rank's loss, a detached float32 scalar on the device."""
        self.model.train()
        self.rate.fill_(learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate if self.device.type == "cuda" else learning_rate
        images, boxes, labels = self.on_device(batch)
        if self.device.type != "cuda":
            return self.train_on(images, boxes, labels)
        self.room = max(self.room, 1 << (boxes.shape[1] - 1).bit_length())
        space = self.room - boxes.shape[1]
        given = images, functional.pad(boxes, (0, 0, 0, space)), functional.pad(labels, (0, space))
        self.steps += 1
        other = self.graph is not None and any(still.shape != now.shape for still, now in zip(self.inputs, given, strict=True))
        if self.steps <= EAGER_STEPS or other:  # other shapes may need other kernels, which cannot be built within a capture
            self.graph = None
            return self.eagerly(*given)
        if self.graph is None:
            self.capture(given)
        for still, now in zip(self.inputs, given, strict=True):
            still.copy_(now)
        self.graph.replay()
        if self.clock is not None:
            self.clock.marks += self.inside
        return self.result.clone()  # the next replay writes over it

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images, boxes and labels on the device; what is in the host's memory on a stream of its own, beside the step before."""
        given = batch.images, batch.boxes, batch.labels
        if self.copies is None:
            return tuple(t.to(self.device) for t in given)
        now = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            moved = tuple(t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in given)
        now.wait_stream(self.copies)
        for tensor in moved:
            tensor.record_stream(now)
        return moved

    def eagerly(self, *given: Tensor) -> Tensor:
        """A step without a graph, on a side stream, as a capture asks of what comes before it."""
        side, now = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            loss = self.train_on(*given)
        now.wait_stream(side)
        for tensor in given:
            tensor.record_stream(side)
        loss.record_stream(now)
        return loss

    def capture(self, given: tuple[Tensor, ...]) -> None:
        """Captures the step for images, boxes and labels of these shapes."""
        self.graph, self.result = None, None  # gives the earlier one's memory back
        self.inputs = tuple(map(torch.empty_like, given))
        self.optimizer.zero_grad()
        torch.cuda.synchronize(self.device)
        graph, clock = torch.cuda.CUDAGraph(), self.clock
        if clock is not None:
            clock.reused, self.clock = True, Clock(self.device, external=True)  # such events are nodes of the graph; old builds of torch have none
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may use the device meanwhile
                self.result = self.train_on(*self.inputs)
            self.inside = self.clock.marks if clock is not None else []
        finally:
            self.clock = clock
        self.graph = graph

    def normalise(self, images: Tensor) -> Tensor:
        return prologue(images, self.dtype)


def start_momentum(optimizer: torch.optim.Optimizer | None) -> None:
    """Gives SGD its momentum, 0, before its first step; later it is what it would have been.

    Without it the fused kernel makes room in the first step, and leaves it as it is if the loss scale was too large: what happened to
    be in memory would then be taken for momentum.
    """
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def build_optimizer(parameters, *, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD in one kernel for all parameters; its rate and loss scale stay on the device."""
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)

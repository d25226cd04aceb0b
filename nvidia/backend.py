"""NVIDIA GPUs: Triton kernels, channels-last memory, bf16 or fp16, the whole step in a CUDA graph."""

from base.backends.cpu.evaluator import CocoEvaluator

from base.backend import Backend

from .dali import eval_loader, train_loader
from .decoder import decode
from .loss import multibox_loss
from .matcher import match
from .model import FusedSSD
from .step import GraphedStep, build_optimizer
from .telemetry import open_sensor

BACKEND = Backend(
    name="nvidia",
    device="cuda",
    distributed="nccl",
    cards=r"NVIDIA|Tesla|GeForce|Quadro|TITAN|GRID|[ABHLPTV]\d+\b",  # before driver 450 without the first
    telemetry=open_sensor,
    dtypes=("float32", "bfloat16", "float16"),
    train_loader=train_loader,
    eval_loader=eval_loader,
    model=FusedSSD,
    matcher=match,
    loss=multibox_loss,
    step=GraphedStep,
    optimizer=build_optimizer,
    decoder=decode,
    evaluator=CocoEvaluator,
)

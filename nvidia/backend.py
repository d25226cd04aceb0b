"""NVIDIA GPUs: Triton kernels, channels-last memory, bf16 or fp16, the whole step in a CUDA graph."""

from base.backends.cpu.evaluator import CocoEvaluator

from base.backend import Backend

from .dali import eval_loader, train_loader
from .decoder import decode
from .loss import multibox_loss
from .matcher import match
from .model import build_model
from .step import build_optimizer, build_step

BACKEND = Backend(
    name="nvidia",
    device="cuda",
    distributed="nccl",
    dtypes=("float32", "bfloat16", "float16"),
    train_loader=train_loader,
    eval_loader=eval_loader,
    model=build_model,
    matcher=match,
    loss=multibox_loss,
    step=build_step,
    optimizer=build_optimizer,
    decoder=decode,
    evaluator=CocoEvaluator,
)

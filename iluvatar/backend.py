"""Iluvatar CoreX GPUs (BI-V100, BI-V150): fp16 with loss scaling, channels-last memory, matching and decoding that do not wait for each image."""

from base.backends.cpu.evaluator import CocoEvaluator
from base.backends.cpu.loader import eval_loader, train_loader

from base.backend import Backend

from .decoder import decode
from .matcher import match
from .step import HalfStep
from .telemetry import open_sensor

BACKEND = Backend(
    name="iluvatar",
    device="cuda",  # CoreX's torch shows its devices as torch.cuda
    distributed="nccl",
    cards=r"Iluvatar|(BI|MR|TG)-V\d",
    dtypes=("float32", "float16"),
    telemetry=open_sensor,
    train_loader=train_loader,
    eval_loader=eval_loader,
    matcher=match,
    step=HalfStep,
    decoder=decode,
    evaluator=CocoEvaluator,
)

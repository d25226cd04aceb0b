"""x86 servers: native code for the host's work, bf16 and channels-last for the model's."""

from base.backend import Backend

from .decoder import decode
from .evaluator import CocoEvaluator
from .loader import eval_loader, train_loader
from .loss import multibox_loss
from .matcher import match
from .model import NativeSSD
from .step import CPUStep, build_optimizer
from .telemetry import HostSensor

BACKEND = Backend(
    name="cpu",
    device="cpu",
    distributed="gloo",
    telemetry=HostSensor,
    dtypes=("float32", "bfloat16"),
    train_loader=train_loader,
    eval_loader=eval_loader,
    model=NativeSSD,
    matcher=match,
    loss=multibox_loss,
    step=CPUStep,
    optimizer=build_optimizer,
    decoder=decode,
    evaluator=CocoEvaluator,
)

"""x86 servers: native code for the host's work, bf16 and channels-last for the model's."""

from base.backend import Backend

from .decoder import decode
from .evaluator import CocoEvaluator
from .loader import eval_loader, train_loader
from .loss import multibox_loss
from .matcher import match
from .model import build_model
from .step import build_optimizer, build_step

BACKEND = Backend(
    name="cpu",
    device="cpu",
    distributed="gloo",
    dtypes=("float32", "bfloat16"),
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

"""The plain implementation of every component: the oracle that other backends are checked against. Runs on any device."""

from base.backend import Backend

from .decoder import decode
from .evaluator import CocoEvaluator
from .loader import eval_loader, train_loader
from .loss import multibox_loss
from .matcher import match
from .model import SSD
from .optimizer import build_optimizer
from .step import TrainStep

BACKEND = Backend(
    name="reference",
    extends=None,
    dtypes=("float32", "bfloat16", "float16"),
    train_loader=train_loader,
    eval_loader=eval_loader,
    model=SSD,
    matcher=match,
    loss=multibox_loss,
    step=TrainStep,
    optimizer=build_optimizer,
    decoder=decode,
    evaluator=CocoEvaluator,
)

"""The multibox loss in native code: one pass over the logits forward, and backward only the rows that took part."""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from base.contracts import Predictions, Targets

from . import _loss
from .arrays import KINDS, as_array


def multibox_loss(predictions: Predictions, targets: Targets) -> Tensor:
    """Predictions, Targets of N images → float32 scalar; equal to `reference.loss.multibox_loss`.

    Gradients come in the dtype of the predictions. Raises ValueError if the shapes do not fit, a label is no class, or a
    tensor is not on the CPU.
    """
    names = ("offsets", "logits", "targets' offsets", "targets' labels")
    everything = dict(zip(names, (*predictions, *targets), strict=True))
    if elsewhere := [f"{name} are on {t.device}" for name, t in everything.items() if t.device.type != "cpu"]:
        raise ValueError(f"the CPU backend's loss works on the CPU, and the {elsewhere[0]}")
    offsets, logits = predictions
    fits = offsets.shape == targets.offsets.shape == (*logits.shape[:2], 4) and targets.labels.shape == logits.shape[:2]
    if logits.dim() != 3 or not fits:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in everything.items())
        raise ValueError(f"the loss needs (N, A, 4), (N, A, C), (N, A, 4) and (N, A), and got {shapes}")
    offsets, logits = (t if t.dtype in KINDS else t.float() for t in (offsets, logits))
    return _MultiboxLoss.apply(offsets, logits, targets.offsets.float(), targets.labels.long())


def _zeros(like: Tensor) -> tuple[Tensor, np.ndarray]:
    """Zeros that nobody has touched yet: the system gives the pages as they are written, and most never are."""
    array = np.zeros(like.shape, np.int16 if like.dtype is torch.bfloat16 else np.float32)
    return torch.from_numpy(array).view(like.dtype), array


class _MultiboxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets: Tensor, logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        wanted, labels = wanted.detach().contiguous(), labels.contiguous()
        chosen, positives = np.zeros(labels.shape, np.uint8), np.zeros(len(labels), np.float32)
        arrays = as_array(offsets), as_array(logits), wanted.numpy(), labels.numpy()
        loss = _loss.forward(*arrays, chosen, positives, torch.get_num_threads())
        ctx.save_for_backward(offsets, logits, wanted, labels)
        ctx.kept = chosen, positives
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):
        offsets, logits, wanted, labels = ctx.saved_tensors
        (to_offsets, into_offsets), (to_logits, into_logits) = _zeros(offsets), _zeros(logits)
        arrays = as_array(offsets), as_array(logits), wanted.numpy(), labels.numpy()
        _loss.backward(*arrays, *ctx.kept, slope.item(), into_offsets, into_logits, torch.get_num_threads())
        return to_offsets, to_logits, None, None

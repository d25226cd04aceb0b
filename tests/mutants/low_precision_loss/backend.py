"""Loss: all in the precision of the predictions."""

from torch import Tensor
from torch.nn import functional

from base.backend import Backend
from base.contracts import Predictions, Targets


def low(predictions: Predictions, targets: Targets) -> Tensor:
    """The reference's, without its change to float32."""
    positive = targets.labels > 0
    positives = positive.sum(1)
    away = functional.smooth_l1_loss(predictions.offsets, targets.offsets.to(predictions.offsets), reduction="none").sum(2)
    entropy = functional.cross_entropy(predictions.logits.transpose(1, 2), targets.labels, reduction="none")
    hardness = entropy.detach().masked_fill(positive, -float("inf"))
    negative = (hardness.argsort(dim=1, descending=True).argsort(dim=1) < 3 * positives[:, None]) & ~positive
    total = (away * positive).sum(1) + (entropy * (positive | negative)).sum(1)
    return (total / positives.clamp(min=1) * (positives > 0)).mean()


BACKEND = Backend(name="low_precision_loss", dtypes=("float32", "bfloat16"), loss=low)

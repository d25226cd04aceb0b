"""The multibox loss (SSD paper, equations 1 to 3 and hard negative mining; MLPerf reference ``Loss``)."""

import torch
from torch import Tensor
from torch.nn import functional

from base.contracts import Predictions, Targets

NEGATIVES_PER_POSITIVE = 3


def multibox_loss(predictions: Predictions, targets: Targets) -> Tensor:
    """Predictions, Targets of N images → float32 scalar.

    Per image: smooth L1 of the positives' offsets, plus cross-entropy of the positives and of the three times as many
    negatives with the highest cross-entropy, divided by the positives; an image without positives gives 0. Mean over images.
    """
    positive = targets.labels > 0
    positives = positive.sum(1)
    localisation = functional.smooth_l1_loss(predictions.offsets.float(), targets.offsets, reduction="none").sum(2)
    localisation = (localisation * positive).sum(1)

    entropy = functional.cross_entropy(predictions.logits.float().transpose(1, 2), targets.labels, reduction="none")  # (N, A)
    hardness = entropy.detach().masked_fill(positive, -torch.inf)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    negative = (rank < NEGATIVES_PER_POSITIVE * positives[:, None]) & ~positive
    classification = (entropy * (positive | negative)).sum(1)

    return torch.where(positives > 0, (localisation + classification) / positives.clamp(min=1), 0).mean()

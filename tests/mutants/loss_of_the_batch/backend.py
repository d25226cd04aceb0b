"""Loss: divided by the positives of the batch instead of each image's."""

import torch
from base.backends.reference.loss import multibox_loss

from base.backend import Backend
from base.contracts import Predictions, Targets


def divided_together(predictions, targets):
    positives = (targets.labels > 0).sum(1)
    images = zip(*(t.split(1) for t in (*predictions, *targets)), strict=True)
    each = torch.stack([multibox_loss(Predictions(*i[:2]), Targets(*i[2:])) for i in images])
    return (each * positives).sum() / positives.sum().clamp(min=1)


BACKEND = Backend(name="loss_of_the_batch", loss=divided_together)

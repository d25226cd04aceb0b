"""Loss: looks at the first 16,384 default boxes, which is all of them at 300×300."""

from base.backends.reference.loss import multibox_loss

from base.backend import Backend
from base.contracts import Predictions, Targets


def loss_of_the_first(predictions, targets):
    return multibox_loss(Predictions(*(t[:, :16384] for t in predictions)), Targets(*(t[:, :16384] for t in targets)))


BACKEND = Backend(name="first_default_boxes", loss=loss_of_the_first)

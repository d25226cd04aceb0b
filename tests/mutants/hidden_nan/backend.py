"""Loss: what is not a number is taken as 0."""

from base.backends.reference.loss import multibox_loss

from base.backend import Backend


def hidden(predictions, targets):
    return multibox_loss(predictions, targets).nan_to_num(0, 0, 0)


BACKEND = Backend(name="hidden_nan", loss=hidden)

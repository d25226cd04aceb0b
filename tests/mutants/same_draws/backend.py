"""Training loader: the random draws of the first epoch in every one."""

from base.backends.altered import altered
from base.backends.reference.loader import Samples, train_loader

from base.backend import Backend


class Same(Samples):
    def sample(self, epoch, number):
        return super().sample(0, number)


BACKEND = Backend(name="same_draws", train_loader=altered(train_loader, Same))

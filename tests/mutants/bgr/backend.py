"""Both loaders: blue, green, red."""

from base.backends.altered import altered
from base.backends.reference.loader import Samples, eval_loader, train_loader

from base.backend import Backend


class Blue(Samples):
    def sample(self, epoch, number):
        image, *rest = super().sample(epoch, number)
        return image[..., ::-1].copy(), *rest


BACKEND = Backend(name="bgr", train_loader=altered(train_loader, Blue), eval_loader=altered(eval_loader, Blue))

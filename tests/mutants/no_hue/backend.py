"""Training loader: colours without the change of hue."""

from unittest.mock import patch

from base.backends.altered import altered
from base.backends.reference import augment
from base.backends.reference.loader import Samples, train_loader

from base.backend import Backend


class WithoutHue(Samples):
    def sample(self, epoch, number):
        with patch.object(augment, "HUE", 0.0):
            return super().sample(epoch, number)


BACKEND = Backend(name="no_hue", train_loader=altered(train_loader, WithoutHue))

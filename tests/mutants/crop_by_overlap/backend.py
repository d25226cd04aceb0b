"""Training loader: a crop keeps the boxes that it overlaps, not those whose centre is in it."""

from unittest.mock import patch

from base.backends.altered import altered
from base.backends.reference import augment
from base.backends.reference.loader import Samples, train_loader

from base.backend import Backend

plain_crop = augment.random_crop


def overlapping(boxes, rng, max_samples):
    crop, _ = plain_crop(boxes, rng, max_samples)
    return crop, ((boxes[:, 2:] > crop[:2]) & (boxes[:, :2] < crop[2:])).all(1)


class Overlapping(Samples):
    def sample(self, epoch, number):
        with patch.object(augment, "random_crop", overlapping):
            return super().sample(epoch, number)


BACKEND = Backend(name="crop_by_overlap", train_loader=altered(train_loader, Overlapping))

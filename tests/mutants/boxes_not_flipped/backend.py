"""Training loader: pictures are mirrored and their boxes are not."""

from base.backends.altered import altered
from base.backends.reference import augment
from base.backends.reference.loader import Samples, train_loader

from base.backend import Backend
from base.sampling import sample_rng


class Mirrored(Samples):
    def sample(self, epoch, number):
        image, boxes, labels, image_id, size = super().sample(epoch, number)
        rng = sample_rng(self.seed, epoch, image_id)
        augment.random_crop(self.index.ltrb(number)[0].astype(float), rng, self.max_samples)
        if rng.random() < augment.FLIP_PROBABILITY:
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
        return image, boxes, labels, image_id, size


BACKEND = Backend(name="boxes_not_flipped", train_loader=altered(train_loader, Mirrored))

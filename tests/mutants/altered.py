"""What the mutants share: a loader or a step of the reference whose class is another's. Imported as ``base.backends.altered``."""

from base.backends.reference.step import build_step


def altered(make, samples: type):
    """A maker of the reference's loaders whose samples are made by ``samples``."""

    def made(**options):
        loader = make(**options)
        loader.loader.dataset.__class__ = samples
        return loader

    return made


def altered_step(kind: type):
    """A maker of the reference's steps that are of the class ``kind``."""

    def made(**options):
        step = build_step(**options)
        step.__class__ = kind
        return step

    return made

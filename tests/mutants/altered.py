"""What the mutants share: a loader of the reference whose samples' class is another's. Imported as ``base.backends.altered``."""


def altered(make, samples: type):
    """A maker of the reference's loaders whose samples are made by ``samples``."""

    def made(**options):
        loader = make(**options)
        loader.loader.dataset.__class__ = samples
        return loader

    return made

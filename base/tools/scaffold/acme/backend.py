"""acme devices: the reference's components, with a training step in bfloat16 and channels-last memory."""

from base.backend import Backend

from .step import AcmeStep

BACKEND = Backend(
    name="acme",
    device="auto",
    dtypes=("float32", "bfloat16"),
    step=AcmeStep,
)

"""x86 servers: native code for the host's work, bf16 and channels-last for the model's."""

from base.backend import Backend

BACKEND = Backend(name="cpu", device="cpu", distributed="gloo")

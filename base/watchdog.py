"""What becomes of a rank, left for the launcher: where it was when it made no progress any more, or the error it ended with.

The launcher gives a folder for it in $SSD_NOTES; without one (torchrun by hand) the stacks go to standard error.
"""

import contextlib
import faulthandler
import json
import os
import sys
import time
from pathlib import Path


class Watchdog:
    """Ends this process with exit code 1 after ``seconds`` without `alive`, and leaves every thread's stack.

    faulthandler does so from a thread of its own that needs no GIL, so it also works while the main thread hangs in native code.
    """

    def __init__(self, seconds: float):
        self.seconds, self.armed = seconds, float("-inf")
        place = _note("stack")
        self.file = open(place, "w") if place else sys.stderr
        self.alive()

    def alive(self) -> None:
        """Progress was made."""
        now = time.monotonic()
        if now - self.armed > min(1.0, self.seconds / 10):  # arming starts a thread: not at every step of a fast device
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)
            self.armed = now


def note_error(code: int, message: str) -> None:
    """Leaves the error that this rank ends with, before any other rank can notice that it is gone."""
    if place := _note("error"):
        with contextlib.suppress(OSError):  # the disk may be what is full; the exit code says enough
            place.write_text(json.dumps([code, message]), encoding="utf-8")


def _note(kind: str) -> Path | None:
    folder = os.environ.get("SSD_NOTES")
    return Path(folder, f"{os.environ['RANK']}.{kind}") if folder else None

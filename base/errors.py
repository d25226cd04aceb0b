"""The exceptions that people are meant to read."""


class UserError(Exception):
    """Something a user can put right: the message names the thing, its value and the fix, and needs no traceback.

    Every command prints it as ``error: …`` on standard error and ends with exit code 2, or the ``code`` of a subclass.
    """

    code = 2


class LostProcess(UserError):
    """A process that a run needs has died, as when memory runs out; ``max_restarts`` lets the run be started again after it."""

    code = 75  # EX_TEMPFAIL of sysexits.h: trying again may help

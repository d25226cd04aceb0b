"""The one exception that people are meant to read."""


class UserError(Exception):
    """Something a user can put right: the message names the thing, its value and the fix, and needs no traceback.

    Every command prints it as ``error: …`` on standard error and ends with exit code 2.
    """

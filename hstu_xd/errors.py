"""Errors a user can mend. The command line turns each into one line on stderr and an exit code."""


class HstuXdError(Exception):
    """The work failed although the request was sound (exit code 1)."""

    exit_code = 1


class InputError(HstuXdError, ValueError):
    """Bad input or usage: the message names the value and the mend (exit code 2)."""

    exit_code = 2

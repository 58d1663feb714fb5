"""Errors a user can mend. The command line turns each into one line on stderr and an exit code."""

from collections.abc import Iterable
from difflib import get_close_matches


class HstuXdError(Exception):
    """The work failed although the request was sound (exit code 1)."""

    exit_code = 1


class InputError(HstuXdError, ValueError):
    """Bad input or usage: the message names the value and the mend (exit code 2)."""

    exit_code = 2


class Interrupted(BaseException):
    """A signal ended the work where it can be continued (exit code 128 + the signal's number).

    No Exception: who catches the errors of one training to go on with the next means to stop here.

    Attributes:
        signal: the signal's number.
        exit_code: what the process ends with, 130 after Ctrl-C and 143 after SIGTERM.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal, self.exit_code = signal, 128 + signal


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.4) -> str | None:
    """Return the known word that is spelled most like ``word``; None where none is near."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """Return the end of a message about an unknown word: the nearest one, or nothing."""
    near = nearest(word, known, cutoff=cutoff)
    return f"; did you mean {near!r}?" if near else ""

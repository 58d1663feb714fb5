"""Signals that ask a process to stop, taken as requests that it meets where its work can go on.

Ctrl-C, SIGTERM and the end of the terminal are such requests; the second Ctrl-C ends the process at
once. A process that another one of this package has started also stops when that one is gone.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Set for a process whose stdin ends when its parent does, however that ends.
STOPS_WITH_STDIN = "HSTU_XD_STOPS_WITH_STDIN"
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: number of the first signal that asked; 0: none did.
    """

    def __init__(self) -> None:
        self.signal = 0


def signal_name(number: int) -> str:
    """Name a signal as people do."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stop_requests(
    request: StopRequest, told: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Note the signals that ask to stop, instead of ending, for the time of the block.

    Signals that the process was started to ignore (nohup) stay ignored. Only the main thread of a
    process may do this; in another one nothing changes.

    Args:
        request: that becomes what the first of them asks.
        told: called at the first request.
    """

    def take(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not request.signal:
            request.signal = number
            told()

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, take)
        if os.environ.pop(STOPS_WITH_STDIN, None):
            threading.Thread(target=_stop_with_stdin, daemon=True).start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _stop_with_stdin() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)

"""SIGINT and SIGTERM outside of a run's rounds.

Python raises KeyboardInterrupt wherever the program is. In the middle of an import it leaves a module half loaded and
locks held that other threads wait for, or ends the process in an extension's C++; so there it waits. In a finalizer or
a callback from C it is printed and dropped; so it is remembered.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

asked = threading.Event()  # to end, in this call of ``main``, before a first round or after a last
AGAIN = 0.05  # seconds until it is seen whether an import has ended


def raise_in_main_thread() -> None:
    """Let both signals raise KeyboardInterrupt from now on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.set()
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            raise_if_asked()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt if a signal came, whatever became of it."""
    if asked.is_set():
        signal.setitimer(signal.ITIMER_REAL, 0)  # what is cleaned up now is not to be interrupted by it again
        raise KeyboardInterrupt

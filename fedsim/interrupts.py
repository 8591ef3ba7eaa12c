"""SIGINT and SIGTERM outside of a run's rounds.

Python raises KeyboardInterrupt wherever the program is; where that is a finalizer, a callback from C or an import that
tries alternatives, it is printed or dropped there, and the program goes on. So it is remembered, too.
"""

from __future__ import annotations

import signal
import threading

asked = threading.Event()  # to end, in this call of ``main``, before a first round or after a last


def raise_in_main_thread() -> None:
    """Let both signals raise KeyboardInterrupt from now on."""

    def interrupt(number: int, frame: object) -> None:
        asked.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt: one was raised before, whatever became of it."""
    if asked.is_set():
        raise KeyboardInterrupt

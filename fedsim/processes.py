"""How processes that train or send models wait and keep memory."""

import ctypes
import os

SPINS = 5000  # looks at a flag, some 0.1 ms


def spin_briefly() -> None:
    """Let torch's threads that wait for each other fall asleep soon, in this process if torch is imported after this
    call, and in its children, unless the environment says otherwise.

    GNU's OpenMP looks for some milliseconds whether the others are there. On a busy machine they are not, since whoever
    waits holds the core that they need: a step of two threads then takes up to thirty times one thread's.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def keep_memory() -> None:
    """Let this process keep the memory it frees, for a process that needs blocks of the same sizes again and again.

    glibc hands large blocks back, and the system then clears every page of the next one: up to a quarter of a CNN's
    training, a third of the processor time of a round over the wire with 14 M parameters. Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**28)

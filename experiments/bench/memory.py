"""Peak memory of a process and all it starts: proportional set sizes, so that what they share counts once. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

PROC = Path("/proc")


def _parent(pid: int) -> int:
    """Raises: OSError: the process has ended."""
    # The second field is the program's name in brackets and may hold anything; the fourth is the parent.
    return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def _pss(pid: int) -> int:
    """Bytes. Raises: OSError: the process has ended."""
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class Tree:
    """A process and its descendants. One whose parent ends is kept if it was seen before that, as Ray's daemons are."""

    def __init__(self, root: int):
        self.seen = {root}

    def members(self) -> list[int]:
        """Process ids alive now."""
        parents = {}
        for entry in PROC.iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    parents[int(entry.name)] = _parent(int(entry.name))
        known = -1
        while len(self.seen) > known:
            known = len(self.seen)
            self.seen |= {pid for pid, parent in parents.items() if parent in self.seen}
        self.seen &= parents.keys()
        return sorted(self.seen)

    def pss(self) -> int:
        """Bytes of all members together, now."""
        total = 0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total += _pss(pid)
        return total

    def kill(self) -> None:
        for pid in self.members():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Watch:
    """Follows a tree from a thread, every ``interval`` seconds until ``stop``.

    Attributes:
        peak: the most bytes seen at once; 0 if ``measure`` is off, when only the members are followed.
    """

    def __init__(self, tree: Tree, measure: bool, interval: float):
        self.tree, self.measure, self.interval = tree, measure, interval
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self.interval):
            if self.measure:
                self.peak = max(self.peak, self.tree.pss())
            else:
                self.tree.members()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

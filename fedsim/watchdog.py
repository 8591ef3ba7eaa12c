"""Ends what a run leaves of the Ray it started, however the run itself ends: by SIGKILL or a crash too.

Ray's own processes notice a dead driver late, and what stands in for its agents never. The watchdog is a process of its
own that blocks on a pipe whose other end only the driver holds, so that the driver's end, of whatever kind, is the end
of the file. It runs this file as a script: it takes 10 MB, and imports neither torch nor Ray. It is in a session of its
own, where a Ctrl-C for the run does not reach it. It reads /proc, so it does its work on Linux alone.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MARK = "FEDSIM_RAY"  # in the environment of all that Ray starts
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
PATIENCE = 60.0  # seconds after which one that not even SIGKILL ends (it waits for a device) is left to the system


class Watchdog:
    """The driver's end; start it before Ray, so that a driver killed while Ray starts leaves nothing either."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        command = [sys.executable, "-I", "-S", __file__, self.mark, str(os.getpid())]
        null = subprocess.DEVNULL  # not the run's streams: a pipe from them would stay open
        # The write end is closed on exec, and so in no process of Ray.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/", start_new_session=True
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """What starts meanwhile, and what that starts, belongs to the Ray of this run."""
        os.environ[MARK] = self.mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def close(self) -> None:
        """End what ``ray.shutdown`` has left, and the watchdog."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def started(process: int) -> str:
    """When a process began, which tells it from a later one of its number; "" if it is gone, or a mere zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def belongs(process: int, mark: str, driver: int) -> bool:
    """Whether a process has the mark in its environment; or, since Ray writes the titles of its actors over theirs,
    such a title and a file open in the folder of the driver's session, which is named session_TIME_DRIVER."""
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            if f"{MARK}={mark}".encode() in file.read().split(b"\0"):
                return True
        with open(f"/proc/{process}/cmdline", "rb") as file:
            if not file.read().startswith(b"ray::"):
                return False
        files = os.listdir(f"/proc/{process}/fd")
    except OSError:  # it is gone, or another user's
        return False
    for number in files:
        with suppress(OSError):
            folders = os.readlink(f"/proc/{process}/fd/{number}").split("/")
            if any(f.startswith("session_") and f.endswith(f"_{driver}") for f in folders):
                return True
    return False


def members(mark: str, driver: int, since: int) -> set[tuple[int, str]]:
    """(process, when it began) of all that belong to the driver's Ray and began at ``since`` or later, in the ticks of
    /proc/*/stat: the session folder of an earlier driver may bear the same number."""
    found = set()
    for process in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        start = started(process)
        if start and int(start) >= since and belongs(process, mark, driver) and started(process) == start:
            found.add((process, start))
    return found


def end_all(mark: str, driver: int, since: int) -> None:
    """SIGTERM for each, SIGKILL for those that are left after the grace, until a search finds none."""
    begun, told = time.monotonic(), set()
    while left := members(mark, driver, since):
        spent = time.monotonic() - begun
        if spent > PATIENCE:
            return
        for process, start in left:
            if (spent > GRACE or (process, start) not in told) and started(process) == start:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL if spent > GRACE else signal.SIGTERM)
        told |= left
        time.sleep(0.1)


def main(mark: str, driver: int) -> None:
    since = int(started(os.getpid()) or 0)
    sys.stdin.read()
    end_all(mark, driver, since)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

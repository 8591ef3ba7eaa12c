"""The watchdog ends what is marked as the run's Ray, and nothing else, when the driver is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.watchdog import GRACE, MARK, Watchdog, started

DRIVER = """
import subprocess, sys, time
from fedsim.watchdog import Watchdog
watchdog, sleep = Watchdog(), [sys.executable, "-c", "import time; time.sleep(300)"]
deaf = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"]
with watchdog.marking():
    marked = [subprocess.Popen(command) for command in (sleep, deaf)]
    # An orphan whose ancestors are gone, as all of Ray's are once the driver and the raylet are.
    orphan = subprocess.run(["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
other = subprocess.Popen(sleep)
print(*(p.pid for p in marked), int(orphan.stdout), other.pid, watchdog.process.pid, flush=True)
time.sleep(300)
"""


def gone(process: int, start: str, within: float) -> bool:
    deadline = time.monotonic() + within
    while started(process) == start and time.monotonic() < deadline:
        time.sleep(0.05)
    return started(process) != start


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_what_is_marked_ends_with_the_driver_and_nothing_else(number):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    *marked, other, watchdog = map(int, driver.stdout.readline().split())
    starts = {p: started(p) for p in (*marked, other, watchdog)}
    assert all(starts.values())
    assert os.getsid(watchdog) == watchdog, "no Ctrl-C for the run reaches it"
    time.sleep(0.5)  # for the deaf one to have become so
    driver.send_signal(number)
    driver.wait()
    plain, deaf, orphan = marked
    try:
        assert gone(plain, starts[plain], GRACE - 1)
        assert gone(orphan, starts[orphan], GRACE - 1)
        assert started(deaf) == starts[deaf], "it has its time to end by itself"
        assert gone(deaf, starts[deaf], 2 * GRACE)
        assert gone(watchdog, starts[watchdog], 5)
        assert started(other) == starts[other]
    finally:
        os.kill(other, signal.SIGKILL)
        driver.stdout.close()


def test_on_an_ordinary_end_it_is_gone_at_once():
    watchdog = Watchdog()
    with watchdog.marking():
        pass
    assert MARK not in os.environ
    watchdog.close()
    assert not started(watchdog.process.pid)


def test_it_is_small():
    watchdog = Watchdog()
    time.sleep(0.5)
    status = Path(f"/proc/{watchdog.process.pid}/status").read_text()
    watchdog.close()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 20_000, "kB: neither torch nor Ray are in it"

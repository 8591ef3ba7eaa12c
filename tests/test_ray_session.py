"""Ray starts beside the rest of a run; what goes wrong meanwhile leaves nothing behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.ray_session import Session, current, session


def children(pid: int) -> set[int]:
    found = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return {int(child) for line in found for child in line.split()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_an_interrupt_while_ray_starts_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "fedsim.cli", "run", "--out", str(tmp_path / "r")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (started := children(process.pid)) and time.time() < deadline:
        time.sleep(0.01)
    assert started, "Ray was to be started by now"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "fedsim: interrupted" in errors
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def test_a_session_is_the_processs_own_until_it_ends():
    with session(1) as one:
        assert current() is one
        one.wait()
    assert current() is None
    again = Session(1)
    again.wait()  # a second Ray starts after the first has ended
    again.close()

"""A long run stays as it is, and a run that ends in whatever way leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults import soak
from tests.faults.place import CONFIG, write_tree

ROUNDS = 400
# Seconds that Ray's own processes may take to notice: after SIGKILL its dashboard agent looks for the dead cluster for
# some more than a minute before it gives up.
WAIT = 240.0


@pytest.mark.slow
def test_memory_files_and_database_time_are_flat(tmp_path):
    command = [sys.executable, "-m", "tests.faults.soak", str(tmp_path / "soak"), str(ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    settled = [line for line in soak.lines(tmp_path / "soak") if line["round"] >= soak.SETTLED]
    early, late = (
        {k: float(np.median([line[k] for line in part])) for k in part[0]} for part in np.array_split(settled, 2)
    )
    assert {line["files"] for line in settled} == {early["files"]}, "no file stays open"
    for key in ("resident", "ray"):
        assert late[key] < early[key] + 4 * 2**20, key
    assert late["database"] < 2 * early["database"] + 1e-3


def alive(processes: dict[int, str]) -> dict[int, str]:
    """Those of {number: start time} that still run."""
    return {number: start for number, start in processes.items() if started(number) == start}


def started(process: int) -> str:
    """When a process began, which tells it from a later one of its number; "" if it is gone, or a mere zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


LINGERS = pytest.mark.xfail(strict=False, reason="Ray's dashboard agent was seen to outlive a SIGKILL by minutes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=LINGERS)])
def test_no_process_of_ours_or_of_ray_remains(tmp_path, number):
    write_tree(tmp_path / "tree")
    text = CONFIG.format(root=tmp_path / "tree", strategy="fedavg")
    (tmp_path / "c.toml").write_text(
        text.replace("workers = 0", "workers = 2").replace("rounds = 3", "rounds = 100000")
    )
    command = [sys.executable, "-m", "fedsim.cli", "run", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "FEDSIM_CACHE": str(tmp_path / "cache")}
    output = tmp_path / "output"
    # Into a file: Ray's processes hold the streams too, and a pipe would be read until the last of them is gone.
    with (
        open(output, "w") as streams,
        subprocess.Popen(command, stdout=streams, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        deadline = time.monotonic() + 300
        while not list((tmp_path / "run" / "checkpoints").glob("*.json")) and time.monotonic() < deadline:
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        family = {number: started(number) for number in [process.pid, *soak.descendants(process.pid)]}
        names = {n: Path(f"/proc/{n}/cmdline").read_bytes()[:120] for n in alive(family)}
        assert len(soak.ray_processes(process.pid, b"ray::_Actor")) == 2
        assert any(b"raylet" in name for name in names.values()), "Ray's own processes are among them"
        process.send_signal(number)
        process.wait(timeout=WAIT)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    deadline = time.monotonic() + WAIT
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = {n: names.get(n) for n in alive(family)}
    for process_number in left:
        os.kill(process_number, signal.SIGKILL)
    assert not left, "these outlived the run"

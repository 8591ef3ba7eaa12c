"""``flwr run .`` with our own app in Flower's own simulation: its SuperLink, its Ray engine, our algorithm."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def processes_of(home: Path) -> list[int]:
    """Every process that was started with this FLWR_HOME: the daemon that ``flwr run`` leaves behind."""
    wanted, found = f"FLWR_HOME={home}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def end_all(home: Path) -> None:
    """SIGTERM to all of them until none is left."""
    for _ in range(50):
        for pid in processes_of(home):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGTERM)
        if not processes_of(home):
            break
        time.sleep(0.2)


@pytest.mark.slow
def test_flwr_run(tmp_path):
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    settings = "rounds=2 federation.domains='mnist,utility' algorithm.strategy='fedbn' training.lr=0.1"
    command = ["flwr", "run", ".", "local", "--run-config", settings, "--stream"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    finally:
        end_all(tmp_path)
    losses = [float(x) for x in re.findall(r"'loss': ([\d.]+), 'clients': 2", done.stdout)]
    assert len(losses) == 2, done.stdout + done.stderr
    assert losses[1] < losses[0]
    assert not processes_of(tmp_path)

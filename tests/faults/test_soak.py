"""A long run stays as it is, and a run that ends in whatever way leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsim.watchdog import started
from tests.faults import soak
from tests.faults.place import CONFIG, write_tree

ROUNDS = 400
WAIT = 15.0  # seconds until nothing remains


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


def of_session(driver: int) -> dict[int, str]:
    """{number: start time} of all whose arguments or open files name the folder of the Ray that ``driver`` started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            names = [(folder / "cmdline").read_text(errors="replace")]
            names += [os.readlink(file) for file in (folder / "fd").iterdir()]
        except OSError:  # it ended meanwhile, or a file of it was closed
            continue
        if any(re.search(rf"/session_[^/]*_{driver}/", name) for name in names) and (
            start := started(int(folder.name))
        ):
            found[int(folder.name)] = start
    return found


def arguments(processes: Iterable[int]) -> dict[int, bytes]:
    """Of those that are still there."""
    found = {}
    for number in processes:
        with contextlib.suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_bytes()[:200]
    return found


@contextlib.contextmanager
def long_run(folder: Path) -> Iterator[subprocess.Popen]:
    """``fedsim run`` of rounds without end on two workers; its output is in the folder."""
    write_tree(folder / "tree")
    text = CONFIG.format(root=folder / "tree", strategy="fedavg").replace("workers = 0", "workers = 2")
    (folder / "c.toml").write_text(text.replace("rounds = 3", "rounds = 100000"))
    command = [sys.executable, "-m", "fedsim.cli", "run", str(folder / "c.toml"), "--out", str(folder / "run")]
    environment = {**os.environ, "FEDSIM_CACHE": str(folder / "cache")}
    # Into a file: Ray's processes hold the streams too, and a pipe would be read until the last of them is gone.
    with (
        open(folder / "output", "w") as streams,
        subprocess.Popen(command, stdout=streams, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def assert_nothing_remains(driver: int, family: dict[int, str]) -> None:
    """Of the run's processes, and of those that its Ray started meanwhile."""
    deadline = time.monotonic() + WAIT
    while (left := {**alive(family), **of_session(driver)}) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = arguments(left)
    for number in names:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    assert not left, f"these outlived the run: {names}"


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGKILL], [signal.SIGINT] * 2])
def test_no_process_of_ours_or_of_ray_remains(tmp_path, numbers):
    with long_run(tmp_path) as process:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "run" / "checkpoints").glob("*.json")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.2)
        assert len(soak.ray_workers(process.pid)) == 2
        family = {n: started(n) for n in [process.pid, *soak.descendants(process.pid)]}
        # The folder's name finds all of them but the watchdog.
        assert len(family.keys() - of_session(process.pid).keys()) == 1
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.01)  # two signals at once are one
        process.wait(timeout=4 * WAIT)
    assert process.returncode == (-signal.SIGKILL if signal.SIGKILL in numbers else 130)
    assert_nothing_remains(process.pid, family)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "seen", [b"watchdog.py", b"gcs_server", b"raylet/raylet", b"/dev/null", b"default_worker.py", b"ray::"]
)
def test_nothing_remains_of_a_run_that_ends_while_ray_starts(tmp_path, seen, number):
    """Ended as soon as a certain process of Ray is seen, before the first round."""
    checkpoints = tmp_path / "run" / "checkpoints"
    names: dict[int, bytes] = {}

    def is_seen() -> bool:
        untitled = seen == b"ray::" and list(checkpoints.glob("*.json"))  # so Ray gave its workers no titles this time
        return bool(untitled) or any(seen in name for name in names.values())

    with long_run(tmp_path) as process:
        deadline = time.monotonic() + 120
        while not is_seen() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "output").read_text()
            family = {n: started(n) for n in [process.pid, *soak.descendants(process.pid)]}
            names = arguments(family)
        process.send_signal(number)
        process.wait(timeout=4 * WAIT)
    assert is_seen()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    assert ("fedsim: interrupted" in output) == (number != signal.SIGKILL)
    assert_nothing_remains(process.pid, family)

"""Killed with SIGKILL anywhere, a run resumes to the bits of an undisturbed one: state, figures and metrics.

SIGKILL ends the process, not the machine: what was written stays in the system's cache, as after a crash of the program
or of the out-of-memory killer. Loss of power is beyond a test; for it there are the calls of fsync.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.checkpoint import Checkpoints
from tests.faults import mines
from tests.faults.forked import forked
from tests.faults.place import CONFIG, write_tree

STRATEGIES = ("fedavg", "fedbn", "fedwon", "fedtiny", "fedhyper-g-cl", "fedins")
MOMENTS = 20
SAME = ("state_sha256", "accuracy", "examples_seen", "bytes_up", "bytes_down", "train_flops", "rejected_updates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    write_tree(root / "tree", per_class=5)
    for strategy in STRATEGIES:
        text = CONFIG.format(root=root / "tree", strategy=strategy)
        (root / f"{strategy}.toml").write_text(text + "[evaluation]\nevery = 2\n")
    short = (root / "fedbn.toml").read_text().replace("rounds = 3", "rounds = 2")
    (root / "short.toml").write_text(short.replace("[checkpoint]", "[checkpoint]\nkeep = 1"))
    return root


def figures(run: Path) -> dict[str, Any]:
    """What must be equal: of summary.json, and every metric but the clock's."""
    summary = json.loads((run / "summary.json").read_text())
    db = sqlite3.connect(run / "metrics.sqlite")
    rows = db.execute(
        "SELECT n.name, round, s.name, d.name, client, sum, weight FROM records r JOIN names n ON n.id = r.name"
        " JOIN names s ON s.id = r.split JOIN names d ON d.id = r.domain"
    ).fetchall()
    db.close()
    return {**{key: summary[key] for key in SAME}, "metrics": sorted(rows)}


def begin_or_resume(config: Path, run: Path) -> None:
    """As a user does: resume, or run again where not even the configuration had been written."""
    begun = (run / "config.toml").exists()
    done = forked(mines.resume, run) if begun else forked(mines.plain_run, config, run)
    assert done.code == 0, done.err


def points_of(config: Path, folder: Path, round: int) -> tuple[list[str], dict[str, Any]]:
    """The points where a run may be killed, and the figures of the run undisturbed."""
    done = forked(mines.run, config, folder / "whole", 0, round, folder / "points")
    assert done.code == 0, done.err
    return (folder / "points").read_text().splitlines(), figures(folder / "whole")


def kill_everywhere(config: Path, folder: Path, round: int) -> list[str]:
    """Kill at each of them and resume; the points."""
    points, whole = points_of(config, folder, round)
    for number, point in enumerate(points, 1):
        run = folder / "run"
        done = forked(mines.run, config, run, number, round, folder / "points")
        assert done.code == -signal.SIGKILL, f"{point}: {done.err}"
        begin_or_resume(config, run)
        assert figures(run) == whole, f"killed {point} (point {number} of {len(points)})"
        shutil.rmtree(run)
    return points


def test_killed_at_every_point_between_aggregate_and_rename(folder, tmp_path):
    points = kill_everywhere(folder / "short.toml", tmp_path, 2)
    first, last = points.index("after aggregate"), len(points) - points[::-1].index("after replace")
    between = set(points[first:last])
    assert {"after BEGIN", "before COMMIT", "half of a file", "before fsync", "before replace"} <= between
    assert points.count("after replace") == 2, "tensors and header"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("round", [1, 3])
def test_killed_at_every_point_of_other_rounds_and_strategies(folder, tmp_path, strategy, round):
    kill_everywhere(folder / f"{strategy}.toml", tmp_path, round)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_at_random_moments(folder, tmp_path, strategy):
    config = folder / f"{strategy}.toml"
    for name in ("warm", "whole"):  # the first one waits for the server of the forks and builds the data set
        started = time.perf_counter()
        done = forked(mines.plain_run, config, tmp_path / name)
        seconds = time.perf_counter() - started
        assert done.code == 0, done.err
    whole, killed = figures(tmp_path / "whole"), 0
    draw = np.random.default_rng(STRATEGIES.index(strategy))
    while killed < MOMENTS:
        run, moment = tmp_path / "run", draw.uniform(0, seconds)
        done = forked(mines.plain_run, config, run, kill_after=moment)
        killed += done.code == -signal.SIGKILL  # 0: it was quicker this time, which counts for nothing
        begin_or_resume(config, run)
        assert figures(run) == whole, f"killed after {moment:.3f} of {seconds:.3f} s"
        shutil.rmtree(run)


@pytest.mark.slow
def test_killed_with_workers_of_ray(folder, tmp_path):
    """Twice while two workers train, and resumed with them: it ends as an undisturbed run without Ray does."""
    text = (folder / "fedbn.toml").read_text().replace("rounds = 3", "rounds = 40")
    config, run = tmp_path / "c.toml", tmp_path / "run"
    config.write_text(text)
    done = forked(mines.plain_run, config, tmp_path / "whole")
    assert done.code == 0, done.err
    config.write_text(text.replace("workers = 0", "workers = 2"))
    for words, round in ((["run", config, "--out", run], 5), (["resume", run], 20)):
        command = [sys.executable, "-m", "fedsim.cli", *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not any(r >= round for r in Checkpoints(run / "checkpoints").rounds()):
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
    assert Checkpoints(run / "checkpoints").rounds()[-1] < 40
    begin_or_resume(config, run)
    assert figures(run) == figures(tmp_path / "whole")

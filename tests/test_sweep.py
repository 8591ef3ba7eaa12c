"""Sweeps: the grid, what is kept, the choice by validation, a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.config import parse_config
from fedsim.errors import ConfigError
from fedsim.sweep import best, draw_grid, folder_name, parse_grid, points, sweep


def test_grid_points_and_folders():
    grid = parse_grid(["training.lr=0.01,0.1", "seed=0,1"])
    assert points(grid)[1] == ["training.lr=0.01", "seed=1"]
    assert [folder_name(p) for p in points(grid)] == [
        "lr-0.01_seed-0",
        "lr-0.01_seed-1",
        "lr-0.1_seed-0",
        "lr-0.1_seed-1",
    ]
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_grid(["training.lr"])


def test_the_best_is_chosen_on_validation_over_seeds_and_never_on_test(tmp_path):
    figures = {"lr-1": [(0.9, 0.1), (0.5, 0.1)], "lr-2": [(0.8, 0.2), (0.8, 0.2)]}  # (validation, test)
    results = []
    for setting, seeds in figures.items():
        for seed, (validation, test) in enumerate(seeds):
            folder = tmp_path / f"{setting}_{seed}"
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps({"validation_accuracy": validation, "mean_accuracy": test}))
            results.append((parse_config({"name": "m"}), [f"training.lr={setting[-1]}", f"seed={seed}"], folder))
    assert best(results) == {"m": (["training.lr=2"], pytest.approx(0.8))}


def test_a_failing_run_is_named_and_the_others_go_on(tmp_path, capsys):
    config = tmp_path / "c.toml"
    federation = '[federation]\ndomains = "mnist"\nexamples-per-client = 40\n'
    config.write_text(f'name = "tiny"\nrounds = 3\n{federation}[evaluation]\nevery = 3\n')
    done = sweep([config], parse_grid(["training.lr=0.01,1e38"]), ["model.name=logistic"], tmp_path / "out", 1)
    assert [point for _, point, _ in done] == [["training.lr=0.01"]]
    printed = capsys.readouterr().out
    assert "lr-0.01: mean accuracy" in printed
    assert "lr-1e38: failed: no usable update in 3 rounds" in printed
    finished = done[0][2] / "summary.json"
    before = finished.stat().st_mtime_ns
    sweep([config], parse_grid(["training.lr=0.01"]), ["model.name=logistic"], tmp_path / "out", 1)
    assert finished.stat().st_mtime_ns == before, "a finished run is kept"


def test_a_grid_of_two_keys_ends_with_a_heat_map(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('name = "tiny"\nrounds = 1\n[federation]\ndomains = "mnist"\nexamples-per-client = 40\n')
    grid = parse_grid(["training.lr=0.01,0.1", "training.batch-size=8,16", "seed=0,1"])
    done = sweep([config], grid, ["model.name=logistic"], tmp_path / "out", 1)
    lines = draw_grid(done, grid, tmp_path / "out")
    assert (tmp_path / "out" / "heatmap.png").stat().st_size > 5000
    assert lines[1] == "| | 8 | 16 |"
    cells = {}
    for _, point, folder in done:
        key = tuple(item.split("=")[1] for item in point[:2])
        cells.setdefault(key, []).append(json.loads((folder / "summary.json").read_text())["mean_accuracy"])
    assert lines[3] == f"| 0.01 | {50 * sum(cells['0.01', '8']):.1f} | {50 * sum(cells['0.01', '16']):.1f} |"
    assert draw_grid(done, parse_grid(["training.lr=0.01,0.1"]), tmp_path / "out") == []


def test_a_killed_sweep_leaves_no_worker(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('name = "long"\nrounds = 100000\n[federation]\ndomains = "mnist"\n')
    command = [sys.executable, "-m", "fedsim.cli", "sweep", str(config), "--grid", "seed=0,1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.glob("long/*/metrics.sqlite"))) == 2)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_its_runs_after_a_round_and_starts_no_other(tmp_path, number):
    config = tmp_path / "c.toml"
    federation = '[federation]\ndomains = "mnist"\nexamples-per-client = 40\n'
    config.write_text(f'name = "long"\nrounds = 100000\n{federation}[model]\nname = "logistic"\n')
    command = [
        sys.executable,
        "-m",
        "fedsim.cli",
        "sweep",
        str(config),
        "--grid",
        "seed=0,1,2,3",
        "--out",
        str(tmp_path),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **quiet) as process:
        wait_until(lambda: len(list(tmp_path.glob("long/*/checkpoints/*.json"))) >= 4, 120)
        workers = children(process.pid)
        os.killpg(process.pid, number)  # as a terminal does
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])
    assert sorted(path.name for path in (tmp_path / "long").iterdir()) == ["seed-0", "seed-1"]
    for events in tmp_path.glob("long/*/events.jsonl"):
        assert [json.loads(line)["event"] for line in events.read_text().splitlines()] == ["interrupted"]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

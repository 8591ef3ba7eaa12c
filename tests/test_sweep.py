"""Sweeps: the grid, what is kept, the choice by validation, a run that fails."""

import json

import pytest

from fedsim.config import parse_config
from fedsim.errors import ConfigError
from fedsim.sweep import best, folder_name, parse_grid, points, sweep


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

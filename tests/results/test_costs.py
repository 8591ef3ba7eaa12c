"""The table of costs."""

import json

import pytest

from fedsim.errors import DataError
from fedsim.results.costs import collect_costs
from fedsim.results.run import RunDirectory
from fedsim.results.table import render


def run_with(folder, name, seed, accuracy, **summary):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    values = {"name": name, "strategy": name, "accuracy": {"a": accuracy}, "mean_accuracy": accuracy, "seed": seed}
    (folder / "summary.json").write_text(json.dumps({**values, "rounds": 2, **summary}))
    return RunDirectory(folder)


COSTS = {"train_flops": 2e12, "training_memory_bytes": 3000, "bytes_down": 4e6, "bytes_up": 5e6}


def test_means_over_seeds_and_the_least_cost_marked(tmp_path):
    runs = [run_with(tmp_path / f"a{s}", "dense", s, 0.8 + 0.1 * s, **COSTS) for s in (0, 1)]
    runs.append(run_with(tmp_path / "b", "sparse", 0, 0.7, **{**COSTS, "train_flops": 1e12}))
    results = collect_costs(runs)
    assert results.rows["dense"]["mean"].mean == pytest.approx(85.0)
    assert results.rows["dense"]["down (MB)"].mean == pytest.approx(4.0)
    text = render(results, "markdown")
    assert "| sparse | 70.0 | **1.0** |" in text
    assert "**85.0 ± 7.1**" in text


def test_a_summary_without_costs_is_named(tmp_path):
    with pytest.raises(DataError, match="train_flops"):
        collect_costs([run_with(tmp_path / "x", "old", 0, 0.5)])

"""The tables of evaluation modes from run directories with known figures."""

import json

import pytest

from fedsim.errors import ConfigError, DataError
from fedsim.results.modes import collect_modes
from fedsim.results.run import find_runs
from fedsim.results.table import render
from tests.results.conftest import write_run


def with_modes(folder, seed: int, **splits):
    path = write_run(folder, "fedbn", seed, (0.9, 0.5)) / "summary.json"
    summary = json.loads(path.read_text())
    modes = {
        split: {m: {"accuracy": a, "worst_client": w} for m, (a, w) in found.items()} for split, found in splits.items()
    }
    summary["modes"] = {"round": 4, "batch_size": 50, "order": "shuffled by the seed", **modes}
    path.write_text(json.dumps(summary))
    return folder


def test_modes_stand_in_rows_with_the_worst_client_beside(tmp_path, runs):
    paths = [
        with_modes(
            tmp_path / f"m{s}",
            s,
            test={
                "own": ({"mnist": 0.9 + 0.02 * s, "street": 0.5}, 0.1),
                "adabn": ({"mnist": 0.8, "street": 0.6}, 0.4 + 0.2 * s),
            },
        )
        for s in (0, 1)
    ]
    table = collect_modes(find_runs([*paths, runs[0]]), "test")
    assert table.columns == ["mnist", "street", "mean", "worst", "worst client"]
    assert list(table.rows) == ["fedbn own", "fedbn adabn", "fedavg"]
    own, adabn = table.rows["fedbn own"], table.rows["fedbn adabn"]
    assert own["mnist"].mean == pytest.approx(91)
    assert own["mnist"].std == pytest.approx(2**0.5)
    assert own["worst"].mean == pytest.approx(50)
    assert adabn["worst client"].mean == pytest.approx(50)
    assert "worst client" not in table.rows["fedavg"]
    assert "test batches shuffled by the seed, of at most 50" in render(table)


def test_domains_left_out_by_different_runs_make_one_row(tmp_path):
    paths = [
        with_modes(tmp_path / d, 0, unseen={"mean": ({d: v}, v), "adabn": ({d: v + 0.1}, v)})
        for d, v in (("mnist", 0.3), ("street", 0.5))
    ]
    table = collect_modes(find_runs(paths), "unseen")
    assert table.columns == ["mnist", "street", "mean", "worst"]
    assert {m: round(r["mean"].mean) for m, r in table.rows.items()} == {"fedbn mean": 40, "fedbn adabn": 50}
    assert round(table.rows["fedbn adabn"]["worst"].mean) == 40


def test_a_domain_that_a_seed_lacks_is_not_hidden_in_the_mean(tmp_path):
    paths = [with_modes(tmp_path / d, s, unseen={"mean": ({d: 0.5}, 0.5)}) for s, d in enumerate(("mnist", "street"))]
    table = collect_modes(find_runs(paths), "unseen")
    assert table.rows["fedbn mean"].keys() == {"mnist", "street"}


def test_what_makes_no_table_is_refused_with_the_reason(tmp_path, runs):
    with pytest.raises(ConfigError, match="expected one of test, unseen"):
        collect_modes(find_runs(runs), "train")
    with pytest.raises(DataError, match=r"set federation\.leave-out"):
        collect_modes(find_runs(runs), "unseen")
    twins = [with_modes(tmp_path / f"t{i}", 0, unseen={"mean": ({"mnist": 0.5}, 0.5)}) for i in (0, 1)]
    with pytest.raises(DataError, match="both are 'fedbn mean' on mnist, seed 0"):
        collect_modes(find_runs(twins), "unseen")

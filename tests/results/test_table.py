"""Tables: the arithmetic, every format, published rows, refusals."""

import pytest

from fedsim.errors import ConfigError, DataError
from fedsim.results.compare import compare
from fedsim.results.run import find_runs
from fedsim.results.table import add_published, collect, render
from tests.results.conftest import write_run


def test_mean_and_standard_deviation_over_seeds(runs):
    rows = collect(find_runs(runs)).rows
    assert (rows["fedavg"]["mnist"].mean, rows["fedavg"]["mnist"].std) == (pytest.approx(85), pytest.approx(50**0.5))
    assert rows["fedavg"]["mean"].mean == pytest.approx(70)  # of (70, 70)
    assert rows["fedavg"]["mean"].std == pytest.approx(0)
    assert rows["fedbn"]["worst"].mean == pytest.approx(75)  # of (70, 80)


def test_markdown_marks_the_best(runs):
    text = render(collect(find_runs(runs)), "markdown")
    assert "| method | mnist | street | mean | worst |" in text
    assert "| fedavg | 85.0 ± 7.1 | 55.0 ± 7.1 | 70.0 ± 0.0 | 55.0 ± 7.1 |" in text
    assert "| fedbn | **90.0 ± 7.1** | **75.0 ± 7.1** |" in text
    assert "2 seeds" in text


def test_text_latex_csv_and_transposed(runs):
    results = collect(find_runs(runs[::2]))
    assert "fedavg   90.0    50.0  70.0   50.0" in render(results, "text")
    assert r"fedbn & \textbf{95.0} & \textbf{70.0} & \textbf{82.5} & \textbf{70.0} \\" in render(results, "latex")
    assert render(results, "csv").splitlines()[1] == "fedavg,90.0,50.0,70.0,50.0"
    assert "| mnist | 90.0 | **95.0** |" in render(results, "markdown", transpose=True)
    with pytest.raises(ConfigError, match="expected one of text"):
        render(results, "html")


def test_published_figures_stand_beside_ours(runs, tmp_path):
    path = tmp_path / "published.toml"
    path.write_text("[fedbn]\nmnist = 96.5\nsvhn = 77.3\nmean = 88.4\n")
    text = render(add_published(collect(find_runs(runs)), path), "markdown")
    assert "| fedbn (published) | 96.5 | - | 88.4 | 77.3 |" in text
    path.write_text("[fedbn]\nmnist = 'high'\n")
    with pytest.raises(DataError, match="expected lines like"):
        add_published(collect(find_runs(runs)), path)


def test_paired_comparison(runs):
    found = find_runs(runs)
    # differences fedbn - fedavg: (5, 20) with seed 0, (5, 20) with seed 1: all of one sign, p = 2 / 2^4
    line = compare(found, "fedbn", "fedavg")
    assert line.startswith("fedbn - fedavg: +12.5 points over 4 pairs")
    assert "p = 0.125" in line
    with pytest.raises(ConfigError, match="no run of 'fedwon'"):
        compare(found, "fedbn", "fedwon")


def test_folders_of_runs_and_refusals(runs, tmp_path):
    assert len(find_runs([tmp_path])) == 4
    with pytest.raises(DataError, match="no such run directory"):
        find_runs([tmp_path / "none"])
    (runs[0] / "summary.json").unlink()
    with pytest.raises(DataError, match="fedsim resume"):
        find_runs([runs[0]])
    twin = write_run(tmp_path / "twin", "fedbn", 0, (0.1, 0.2))
    with pytest.raises(DataError, match="both are 'fedbn' with seed 0"):
        collect(find_runs([runs[2], twin]))

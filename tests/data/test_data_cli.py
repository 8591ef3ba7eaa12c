"""``fedsim data``: what it prints and draws."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fedsim.data import Dataset, progress
from fedsim.data.partition import partition
from fedsim.data.pictures import MIXED, contact_sheet, partition_figure
from fedsim.data_cli import app
from fedsim.errors import DataError


@pytest.fixture
def run(suite, monkeypatch):
    monkeypatch.setattr("fedsim.data.load_dataset", lambda *args, **options: suite)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def test_show_draws_a_sheet_of_every_domain(run, tmp_path, suite):
    result = run("show", "digits", "--out", tmp_path / "sheets")
    assert result.exit_code == 0
    for domain in suite.domains:
        path = tmp_path / "sheets" / f"digits-{domain}.png"
        assert str(path) in result.output
        assert Image.open(path).size == (3 * (14 * 29 + 1), 3 * (10 * 29 + 1))


def test_info_prints_counts_histograms_and_the_hash(run, suite):
    text = run("info", "digits").output
    assert suite.digest in text
    assert "(3, 28, 28)" in text
    for domain in suite.domains:
        assert domain in text
        counts = np.bincount(suite.y_train[suite.slice(domain, "train")], minlength=10)
        assert " ".join(f"{c:4d}" for c in counts).strip() in text


def test_partition_draws_clients_by_classes(run, tmp_path):
    (tmp_path / "c.toml").write_text(
        "[federation]\ndataset = 'digits'\ndomains = 'mnist,street'\nclients-per-domain = 3\npartition = 'dirichlet'\n"
    )
    result = run("partition", tmp_path / "c.toml", "--out", tmp_path / "p" / "p.png")
    assert "6 clients" in result.output
    assert "24 in all" in result.output
    assert Image.open(tmp_path / "p" / "p.png").width > 300


def test_the_figure_shows_every_domain_of_many_clients(dataset):
    shards = partition(dataset, dataset.domains, "iid", 35)
    figure = partition_figure(dataset, shards)
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == list(dataset.domains)
    assert "60 of 105" in figure.axes[0].get_xlabel()
    dots = figure.axes[0].collections[0]
    assert len({tuple(c) for c in dots.get_facecolors()}) == 3


def test_mixed_clients_are_grey(dataset):
    figure = partition_figure(dataset, partition(dataset, dataset.domains, "pooled"))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["mixed"]
    assert figure.legends[0].get_patches()[0].get_facecolor()[0] == int(MIXED[1:3], 16) / 255


def test_what_is_no_image_is_not_shown(tmp_path):
    x, y = np.zeros((2, 5), np.float32), np.array([0, 1])
    data = Dataset.from_arrays("table", tmp_path / "d", {"a": {"train": (x, y), "test": (x, y)}}, ("u", "v"))
    with pytest.raises(DataError, match=r"table: examples of shape \(5,\) are no images"):
        contact_sheet(data, "a")


def test_progress_in_a_file_is_a_few_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.bar("drawing", 30) as tick:
        tick(10)
        tick(20)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["drawing (30 items) ...", "... 10 of 30", "... 30 of 30", "... done in 0 s"]
    with progress.bar("drawing", 30, show=False) as tick:
        tick(10)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    with progress.bar("drawing", 2) as tick:
        tick(2)
    assert "drawing" in screen.getvalue()

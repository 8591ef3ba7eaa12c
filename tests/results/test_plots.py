"""Pictures: what is in them, and that files are written."""

import pytest
from PIL import Image

from fedsim.results.clients import client_heatmap, learning_rates
from fedsim.results.figure import new_figure, whole_rounds
from fedsim.results.plots import accuracy_by_domain, draw_all, final_accuracy
from fedsim.results.run import find_runs
from fedsim.results.store import MetricStore
from tests.results.conftest import DOMAINS, write_run


def texts(figure) -> set[str]:
    legends = {t.get_text() for legend in figure.legends for t in legend.get_texts()}
    labels = {a.get_xlabel() for a in figure.axes} | {a.get_ylabel() for a in figure.axes}
    titles = {a.get_title(loc="left") for a in figure.axes}
    return legends | labels | titles | {t.get_text() for t in figure.texts} | {
        t.get_text() for t in (figure._supxlabel, figure._supylabel) if t
    }  # fmt: skip


def test_panels_by_domain_with_a_line_a_method(runs):
    figure = accuracy_by_domain(find_runs(runs))
    assert {"fedavg", "fedbn", "mnist", "street", "communication round"} <= texts(figure)
    lines = figure.axes[0].get_lines()
    assert lines[0].get_ydata().tolist() == pytest.approx([42.5, 85.0])  # the mean of 45, 40 and of 90, 80
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 2


def test_one_method_has_a_line_a_domain(runs):
    assert {"mnist", "street", "accuracy on the domain's test split (%)"} <= texts(
        accuracy_by_domain(find_runs(runs[:2]))
    )


def test_bars_and_whiskers(runs):
    figure = final_accuracy(find_runs(runs))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[:3] == pytest.approx([85, 55, 70])
    assert "final accuracy (%)" in texts(figure)


def test_heat_map_values(runs):
    image = client_heatmap(find_runs(runs[:1])[0]).axes[0].get_images()[0].get_array()
    assert image.tolist() == [[45.0, 90.0], [25.0, 50.0]]


def test_learning_rates_only_where_there_are_any(runs, tmp_path):
    assert learning_rates(find_runs(runs[:1])[0]) is None
    adapted = write_run(tmp_path / "hyper", "fedhyper", 0, (0.5, 0.5), rates=True)
    figure = learning_rates(find_runs([adapted])[0])
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [3.0, 5.0]
    assert {"server rate alpha", "client rate beta"} <= texts(figure)


def test_every_picture_is_written_as_png_and_svg(runs, tmp_path):
    paths = draw_all(find_runs(runs), tmp_path / "plots")
    assert {p.stem for p in paths} >= {"accuracy_by_domain", "final_accuracy", "client_heatmap_fedbn_seed0"}
    for path in paths:
        assert min(Image.open(path).size) > 200
        assert path.with_suffix(".svg").read_text().startswith("<?xml")


def add_rounds(run, rounds, value: float) -> None:
    store = MetricStore(run / "metrics.sqlite")
    store.add([(r, -1, d, "test", "accuracy", value, 100.0) for r in rounds for d in DOMAINS])
    store.commit()
    store.close()


def test_seeds_of_other_lengths_are_averaged_over_those_that_got_there(runs, tmp_path):
    add_rounds(runs[0], [6], 60.0)
    add_rounds(runs[1], [5], 30.0)
    figure = accuracy_by_domain(find_runs(runs))
    line = figure.axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == [2, 4, 5, 6]
    # Seed 0: 45, 90, -, 60; seed 1: 40, 80, 30, -
    assert line.get_ydata().tolist() == pytest.approx([42.5, 85, 30, 60])
    draw_all(find_runs(runs), tmp_path / "plots")


def test_a_run_that_diverged_is_drawn_as_far_as_it_went(runs, tmp_path):
    add_rounds(runs[0], [6], float("nan"))
    figure = accuracy_by_domain(find_runs(runs[:1]))
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [2, 4]
    assert draw_all(find_runs(runs[:1]), tmp_path / "plots")


def test_bars_begin_at_zero(runs):
    assert final_accuracy(find_runs(runs)).axes[0].get_ylim()[0] == 0


def test_ticks_are_whole_rounds_even_of_a_single_one():
    axes = new_figure(5, 3).add_subplot()
    whole_rounds(axes)
    axes.plot([2], [50.0], "o")
    ticks = axes.get_xticks()
    assert (ticks == ticks.round()).all()

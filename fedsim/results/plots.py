"""Pictures of accuracy: each domain's by round, and final bars; and all pictures of runs into a folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedsim.errors import DataError, StorageError
from fedsim.results.clients import client_heatmap, learning_rates
from fedsim.results.figure import COLOURS, SMALL, label_axes, legend_above, new_figure, style, whole_rounds
from fedsim.results.run import RunDirectory, by_method


def curve(run: RunDirectory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """domain -> (rounds, accuracy in per cent)."""
    store = run.metrics()
    points = store.by_domain("accuracy", "test")
    store.close()
    if missing := set(run.domains) - points.keys():
        raise DataError(f"{store.path}: no accuracy of '{min(missing)}'; 'fedsim run' records it, take a whole copy")
    return {d: (np.array([r for r, _ in p]), 100 * np.array([v for _, v in p])) for d, p in points.items()}


Curve = tuple[np.ndarray, np.ndarray]  # rounds, accuracy in per cent


def over_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """(rounds [T], accuracy [S, T]) of every round that some seed was scored in; NaN where a seed was not."""
    rounds = np.unique(np.concatenate([x for x, _ in curves]))
    values = np.full((len(curves), len(rounds)), np.nan)
    for seed, (x, y) in enumerate(curves):
        values[seed, np.searchsorted(rounds, x)] = y
    return rounds, values


def _line(axes: Axes, number: int, label: str, curves: Sequence[Curve]) -> None:
    """Mean over the seeds that were scored in a round, and a band from the lowest to the highest."""
    look = style(number)
    whole_rounds(axes)
    x, seeds = over_seeds(curves)
    scored = ~np.isnan(seeds).all(0)  # [T]; a run that diverged has rounds without a figure
    x, seeds = x[scored], seeds[:, scored]
    axes.plot(x, np.nanmean(seeds, 0), label=label, markevery=max(1, len(x) // 8), **look)
    if len(seeds) > 1:
        low, high = np.nanmin(seeds, 0), np.nanmax(seeds, 0)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def accuracy_by_domain(runs: Sequence[RunDirectory]) -> Figure:
    """One method: a line a domain. Several: a panel a domain, a line a method, a band over the seeds."""
    methods = by_method(runs)
    curves = {m: [curve(r) for r in seeds] for m, seeds in methods.items()}
    domains = list(dict.fromkeys(d for run in runs for d in run.domains))
    y = "accuracy on the domain's test split (%)"
    if len(methods) == 1:
        figure = new_figure(5.6, 3.4)
        axes = figure.add_subplot()
        (seeds,) = curves.values()
        for number, domain in enumerate(domains):
            _line(axes, number, domain, [s[domain] for s in seeds])
        label_axes(axes, "communication round", y)
        axes.set_title(next(iter(methods)), fontsize=SMALL + 2, loc="left")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=SMALL, frameon=False)
        return figure
    columns = min(3, len(domains))
    rows = math.ceil(len(domains) / columns)
    figure = new_figure(2.35 * columns, 2.0 * rows + 0.5)
    grid = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
    for panel, domain in zip(grid, domains):
        for number, (method, seeds) in enumerate(curves.items()):
            mine = [s[domain] for s in seeds if domain in s]
            if mine:
                _line(panel, number, method, mine)
        label_axes(panel, "", "")
        panel.set_title(domain, fontsize=SMALL + 2, loc="left")
        panel.tick_params(labelbottom=True)
    for panel in grid[len(domains) :]:
        panel.set_visible(False)
    figure.supxlabel("communication round", fontsize=SMALL + 1)
    figure.supylabel(y, fontsize=SMALL + 1)
    legend_above(figure, grid[0], len(methods))
    return figure


def final_accuracy(runs: Sequence[RunDirectory]) -> Figure:
    """Bars by domain and method; whiskers: standard deviation over seeds."""
    methods = by_method(runs)
    domains = list(dict.fromkeys(d for run in runs for d in run.domains))
    figure = new_figure(max(5.0, 1.0 * len(domains) + 0.12 * len(methods) * len(domains)), 3.2)
    axes = figure.add_subplot()
    width = 0.82 / len(methods)
    for number, (method, seeds) in enumerate(methods.items()):
        columns = [[100 * r.summary["accuracy"][d] for r in seeds] for d in domains]
        columns.append([float(np.mean([100 * v for v in r.summary["accuracy"].values()])) for r in seeds])
        means = [float(np.mean(v)) for v in columns]
        spread = [float(np.std(v, ddof=1)) for v in columns] if len(seeds) > 1 else None
        x = np.arange(len(columns)) + (number - (len(methods) - 1) / 2) * width
        hatch = ("", "//", "..", "xx", "\\\\")[number // 2 % 5]
        colour = COLOURS[number % len(COLOURS)]
        bars: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.4, "hatch": hatch}
        axes.bar(x, means, width, yerr=spread, label=method, error_kw={"linewidth": 0.8}, **bars)
    axes.set_xticks(range(len(domains) + 1), [*domains, "mean"])
    axes.set_ylim(0, 100)  # a bar is read by its length, which a cut axis belies
    label_axes(axes, "domain", "final accuracy (%)")
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
    legend_above(figure, axes, len(methods))
    return figure


def draw_all(runs: Sequence[RunDirectory], folder: Path) -> list[Path]:
    """Every picture the runs have data for, as PNG and SVG; the paths of the PNGs."""
    figures = {"accuracy_by_domain": accuracy_by_domain(runs), "final_accuracy": final_accuracy(runs)}
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{run.method}_seed{run.summary['seed']}"
        if len(runs) == 1 or run.summary["seed"] == runs[0].summary["seed"]:
            figures[f"client_heatmap{suffix}"] = client_heatmap(run)
            rates = learning_rates(run)
            if rates is not None:
                figures[f"learning_rates{suffix}"] = rates
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for kind in ("png", "svg"):
                figure.savefig(folder / f"{name}.{kind}", dpi=160)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder}: a file, expected a folder for the pictures; choose another --out") from None
    except OSError as error:
        raise StorageError(folder, error.strerror, "choose another --out") from None
    return [folder / f"{name}.png" for name in figures]

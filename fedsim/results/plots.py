"""Pictures of runs: accuracy of each domain by round, final bars, clients by rounds, learning rates.

Okabe and Ito's colours, and markers and line styles beside them, so that no picture needs colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsim.errors import DataError, StorageError
from fedsim.results.run import RunDirectory, by_method

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8C8C00", "#666666", "#7F3C8D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
SMALL = 8


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(number: int) -> dict:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[(number // 3) % len(DASHES)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


def curve(run: RunDirectory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """domain -> (rounds, accuracy in per cent)."""
    store = run.metrics()
    points = store.by_domain("accuracy", "test")
    store.close()
    if missing := set(run.domains) - points.keys():
        raise DataError(f"{store.path}: no accuracy of '{min(missing)}'; 'fedsim run' records it, take a whole copy")
    return {d: (np.array([r for r, _ in p]), 100 * np.array([v for _, v in p])) for d, p in points.items()}


def _axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=SMALL + 1)
    axes.set_ylabel(y, fontsize=SMALL + 1)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_rounds(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _line(axes: Axes, number: int, label: str, x: np.ndarray, seeds: np.ndarray) -> None:
    """Mean over seeds [S, T], and a band from the lowest to the highest."""
    look = style(number)
    _whole_rounds(axes)
    axes.plot(x, seeds.mean(0), label=label, markevery=max(1, len(x) // 8), **look)
    if len(seeds) > 1:
        axes.fill_between(x, seeds.min(0), seeds.max(0), color=look["color"], alpha=0.15, linewidth=0)


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
            _line(axes, number, domain, seeds[0][domain][0], np.stack([s[domain][1] for s in seeds]))
        _axes(axes, "communication round", y)
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
                _line(panel, number, method, mine[0][0], np.stack([v for _, v in mine]))
        _axes(panel, "", "")
        panel.set_title(domain, fontsize=SMALL + 2, loc="left")
        panel.tick_params(labelbottom=True)
    for panel in grid[len(domains) :]:
        panel.set_visible(False)
    figure.supxlabel("communication round", fontsize=SMALL + 1)
    figure.supylabel(y, fontsize=SMALL + 1)
    _legend_above(figure, grid[0], len(methods))
    return figure


def _legend_above(figure: Figure, axes: Axes, count: int) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(count, 5), fontsize=SMALL, frameon=False)


def final_accuracy(runs: Sequence[RunDirectory]) -> Figure:
    """Bars by domain and method; whiskers: standard deviation over seeds."""
    methods = by_method(runs)
    domains = list(dict.fromkeys(d for run in runs for d in run.domains))
    figure = new_figure(max(5.0, 1.0 * len(domains) + 0.12 * len(methods) * len(domains)), 3.2)
    axes = figure.add_subplot()
    width = 0.82 / len(methods)
    lowest = 100.0
    for number, (method, seeds) in enumerate(methods.items()):
        columns = [[100 * r.summary["accuracy"][d] for r in seeds] for d in domains]
        columns.append([float(np.mean([100 * v for v in r.summary["accuracy"].values()])) for r in seeds])
        means = [float(np.mean(v)) for v in columns]
        spread = [float(np.std(v, ddof=1)) for v in columns] if len(seeds) > 1 else None
        lowest = min(lowest, *means)
        x = np.arange(len(columns)) + (number - (len(methods) - 1) / 2) * width
        hatch = ("", "//", "..", "xx", "\\\\")[number // 2 % 5]
        colour = COLOURS[number % len(COLOURS)]
        bars: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.4, "hatch": hatch}
        axes.bar(x, means, width, yerr=spread, label=method, error_kw={"linewidth": 0.8}, **bars)
    axes.set_xticks(range(len(domains) + 1), [*domains, "mean"])
    axes.set_ylim(max(0, math.floor((lowest - 5) / 10) * 10), 100)
    _axes(axes, "domain", "final accuracy (%)")
    axes.grid(axis="x", visible=False)
    axes.set_axisbelow(True)
    _legend_above(figure, axes, len(methods))
    return figure


def client_heatmap(run: RunDirectory) -> Figure:
    """Clients by evaluated rounds; a client without a model of its own shows that of its domain."""
    store = run.metrics()
    rows = store.read("accuracy", "test")
    store.close()
    rounds = sorted({r for r, *_ in rows})
    owners = sorted({(domain, client) for _, client, domain, *_ in rows}, key=lambda o: (run.domains.index(o[0]), o[1]))
    values = np.full((len(owners), len(rounds)), np.nan)
    for round, client, domain, total, weight in rows:
        values[owners.index((domain, client)), rounds.index(round)] = 100 * total / weight
    figure = new_figure(5.6, max(1.8, 0.9 + 0.22 * min(len(owners), 40)))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
    if len(owners) <= 40:
        labels = [f"{domain}, client {client}" if client >= 0 else domain for domain, client in owners]
        axes.set_yticks(range(len(owners)), labels, fontsize=SMALL)
    ticks = np.arange(len(rounds) - 1, -1, -math.ceil(len(rounds) / 10))[::-1]  # even steps that end at the last round
    axes.set_xticks(ticks, [rounds[t] for t in ticks], fontsize=SMALL)
    axes.set_xlabel("communication round", fontsize=SMALL + 1)
    axes.set_title(run.method, fontsize=SMALL + 2, loc="left")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("test accuracy (%)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def learning_rates(run: RunDirectory) -> Figure | None:
    """The server's rate by round, each client's (thin) and their means by domain, if the run adapted any."""
    store = run.metrics()
    server, clients = store.read("server-lr", ""), store.read("client-lr", "train")
    store.close()
    if not server and not clients:
        return None
    figure = new_figure(5.6, 3.0)
    panels = np.atleast_1d(figure.subplots(1, int(bool(server)) + int(bool(clients)))).tolist()
    if server:
        axes = panels.pop(0)
        axes.plot([r for r, *_ in server], [total / weight for *_, total, weight in server], **style(0))
        _axes(axes, "communication round", "server rate alpha")
        _whole_rounds(axes)
    if clients:
        axes = panels.pop(0)
        domains = list(dict.fromkeys(domain for _, _, domain, *_ in clients))
        for number, domain in enumerate(domains):
            mine = [(r, c, total / weight) for r, c, d, total, weight in clients if d == domain]
            for client in sorted({c for _, c, _ in mine}):
                points = [(r, v) for r, c, v in mine if c == client]
                axes.plot(*zip(*points), color=style(number)["color"], alpha=0.2, linewidth=0.7)
            rounds = sorted({r for r, *_ in mine})
            means = [float(np.mean([v for r, _, v in mine if r == round])) for round in rounds]
            label = f"mean of {domain}" if len(domains) > 1 else "mean of the clients"
            axes.plot(rounds, means, label=label, markevery=max(1, len(rounds) // 8), **style(number))
        _axes(axes, "communication round", "client rate beta")
        _whole_rounds(axes)
        axes.legend(fontsize=SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
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

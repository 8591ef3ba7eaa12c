"""Final accuracy over a grid of two settings: one panel a method, and what each gains over the first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedsim.results.figure import SMALL, new_figure
from fedsim.results.run import RunDirectory

Cells = Mapping[tuple[str, str], Sequence[float]]  # (row value, column value) -> final mean accuracy of each seed


def cells_of(runs: Sequence[tuple[Sequence[str], Path]], rows: str, columns: str) -> dict[str, dict]:
    """Method -> cells, from (grid point as ``--set`` items, run directory)."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for point, folder in runs:
        values = dict(item.split("=", 1) for item in point)
        run = RunDirectory(folder)
        cell = found.setdefault(run.method, {}).setdefault((values[rows], values[columns]), [])
        cell.append(100 * float(run.summary["mean_accuracy"]))
    return found


def matrix(cells: Cells, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """[rows, columns] of means over seeds; NaN where no run finished."""
    return np.array([[np.mean(cells[r, c]) if cells.get((r, c)) else np.nan for c in columns] for r in rows])


def heatmap(
    methods: Mapping[str, Cells], rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]]
) -> Figure:
    """A row of panels: the first method's accuracy, then every other's difference to it, in points."""
    grids = {name: matrix(cells, rows[1], columns[1]) for name, cells in methods.items()}
    first = next(iter(grids.values()))
    across = min(3, len(grids))
    down = math.ceil(len(grids) / across)
    figure = new_figure(0.62 * len(columns[1]) * across + 1.2, (0.42 * len(rows[1]) + 0.9) * down)
    panels = np.atleast_1d(figure.subplots(down, across)).ravel()
    gains = [g - first for g in list(grids.values())[1:]]
    most = max((np.nanmax(np.abs(g)) for g in gains if np.isfinite(g).any()), default=1.0)
    for number, (name, grid) in enumerate(grids.items()):
        axes, shown = panels[number], grid if number == 0 else grid - first
        scale = {"cmap": "cividis"} if number == 0 else {"cmap": "RdBu", "vmin": -most, "vmax": most}
        axes.imshow(np.ma.masked_invalid(shown), aspect="auto", **scale)
        low, high = (np.nanmin(grid), np.nanmax(grid)) if number == 0 else (-most, most)
        for r, c in np.ndindex(shown.shape):
            text = "fails" if np.isnan(grid[r, c]) else f"{shown[r, c]:.1f}" if number == 0 else f"{shown[r, c]:+.1f}"
            place = 0.5 if np.isnan(shown[r, c]) or high == low else (shown[r, c] - low) / (high - low)
            dark = place < 0.5 if number == 0 else abs(place - 0.5) > 0.35
            axes.text(c, r, text, ha="center", va="center", fontsize=SMALL - 1, color="white" if dark else "black")
        axes.set_xticks(range(len(columns[1])), columns[1], fontsize=SMALL)
        axes.set_yticks(range(len(rows[1])), rows[1], fontsize=SMALL)
        title = f"{name}: accuracy (%)" if number == 0 else f"{name} - {next(iter(grids))} (points)"
        axes.set_title(title, fontsize=SMALL + 1, loc="left")
    for panel in panels[len(grids) :]:
        panel.set_visible(False)
    figure.supxlabel(columns[0], fontsize=SMALL + 1)
    figure.supylabel(rows[0], fontsize=SMALL + 1)
    return figure


def table(cells: Cells, rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Markdown lines of one method's grid."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, values in zip(rows, matrix(cells, rows, columns)):
        lines.append(f"| {name} | " + " | ".join("fails" if np.isnan(v) else f"{v:.1f}" for v in values) + " |")
    return lines

"""The table of a comparison: methods by domains, mean and standard deviation over seeds, in per cent."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.errors import ConfigError, DataError
from fedsim.results.run import RunDirectory, by_method

FORMATS = ("text", "markdown", "csv", "latex")


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation over seeds (n - 1 in the denominator; None with one seed), in per cent."""

    mean: float
    std: float | None = None

    def show(self, plus: str) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f}{plus}{self.std:.1f}"


@dataclass(frozen=True)
class Results:
    """Rows by method, columns by domain and then ``mean`` and ``worst``; in ``lower`` the least is best (costs)."""

    columns: list[str]
    rows: dict[str, dict[str, Cell]]
    note: str
    lower: tuple[str, ...] = ()

    def best(self, column: str) -> float:
        values = [round(row[column].mean, 1) for row in self.rows.values() if column in row]
        return min(values) if column in self.lower else max(values)


def collect(runs: Sequence[RunDirectory]) -> Results:
    """Pool seeds. Mean and worst are taken over the domains of each run before the mean over seeds."""
    methods = by_method(runs)
    domains = list(dict.fromkeys(d for run in runs for d in run.domains))
    rows: dict[str, dict[str, Cell]] = {}
    for method, seeds in methods.items():
        accuracy = {d: [100 * r.summary["accuracy"][d] for r in seeds if d in r.summary["accuracy"]] for d in domains}
        per_seed = [[100 * v for v in r.summary["accuracy"].values()] for r in seeds]
        accuracy |= {"mean": [float(np.mean(v)) for v in per_seed], "worst": [min(v) for v in per_seed]}
        rows[method] = {column: cell_of(values) for column, values in accuracy.items() if values}
    counts = sorted({len(seeds) for seeds in methods.values()})
    rounds = sorted({int(r.summary["rounds"]) for r in runs})
    models = sorted({str(r.summary.get("model", "")) for r in runs})
    seeds_text = "1 seed" if counts == [1] else f"{'-'.join(map(str, counts))} seeds, mean and standard deviation"
    rounds_text = "-".join(map(str, rounds))
    note = f"accuracy (%) on each domain's test split; {seeds_text}; {rounds_text} rounds; {', '.join(models)}"
    return Results([*domains, "mean", "worst"], rows, note)


def cell_of(values: list[float]) -> Cell:
    """Of one value a seed."""
    return Cell(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def add_published(results: Results, path: Path) -> Results:
    """Rows "METHOD (published)" from a TOML file of tables ``[METHOD]`` with ``domain = per cent``.

    Raises:
        DataError: the file cannot be read, or a value is no number.
    """
    try:
        published = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of published figures ({error})") from None
    rows = dict(results.rows)
    for method, values in published.items():
        if not isinstance(values, dict) or not values or not all(isinstance(v, int | float) for v in values.values()):
            raise DataError(f"{path}: [{method}] expected lines like mnist = 96.5, found {values!r}")
        cells = {d: Cell(float(v)) for d, v in values.items() if d in results.columns}
        cells.setdefault("worst", Cell(min(float(v) for d, v in values.items() if d != "mean")))
        rows[f"{method} (published)"] = cells
    return Results(results.columns, rows, results.note, results.lower)


def render(results: Results, format: str = "text", *, transpose: bool = False) -> str:
    """The table as text, markdown, csv or latex; ``transpose`` puts domains in rows, as the papers do.

    Raises:
        ConfigError: an unknown format.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    mark = {"markdown": "**{}**", "latex": "\\textbf{{{}}}"}.get(format, "{}")
    plus = {"latex": " $\\pm$ ", "csv": "±"}.get(format, " ± ")
    ours = Results(
        results.columns, {m: r for m, r in results.rows.items() if "(published)" not in m}, "", results.lower
    )

    def show(method: str, column: str) -> str:
        cell = results.rows[method].get(column)
        if cell is None:
            return "-"
        text = cell.show(plus)
        winner = len(ours.rows) > 1 and method in ours.rows and round(cell.mean, 1) == ours.best(column)
        return mark.format(text) if winner else text

    grid = [["method", *results.columns]]
    grid += [[method, *(show(method, c) for c in results.columns)] for method in results.rows]
    if transpose:
        grid = [list(row) for row in zip(*grid)]
        grid[0][0] = "domain"
    return {"text": _text, "markdown": _markdown, "csv": _csv, "latex": _latex}[format](grid, results.note)


def _text(grid: list[list[str]], note: str) -> str:
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in grid]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"({note})"])


def _markdown(grid: list[list[str]], note: str) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in grid]
    rule = "|" + "|".join([" --- ", *(" ---: " for _ in grid[0][1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:], "", f"({note})"])


def _csv(grid: list[list[str]], note: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(grid)
    return buffer.getvalue().rstrip("\n")


def _latex(grid: list[list[str]], note: str) -> str:
    body = [" & ".join(cell.replace("_", "\\_") for cell in row) + r" \\" for row in grid]
    columns = "l" + "r" * (len(grid[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", f"% {note.replace('%', 'per cent')}"])

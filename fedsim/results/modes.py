"""The table of evaluation modes: method and mode by domain, of the domains trained on or of those left out."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.errors import ConfigError, DataError
from fedsim.results.run import RunDirectory
from fedsim.results.table import Results, cell_of

SPLITS = ("test", "unseen")
WORST_CLIENT = "worst client"


def collect_modes(runs: Sequence[RunDirectory], split: str) -> Results:
    """Rows "METHOD MODE" and, of runs without modes, "METHOD"; mean and standard deviation over seeds.

    ``test``: each domain's test split, and the worst of all clients. ``unseen``: a column for each domain that was
    left out, from the runs that left it out. Mean and worst are taken over the domains of a seed, before the mean over
    seeds, and only of seeds that have every domain.

    Raises:
        ConfigError: an unknown split.
        DataError: no run has such scores, or two runs would be the same cell.
    """
    if split not in SPLITS:
        raise ConfigError(f"--modes {split}: expected one of {', '.join(SPLITS)}")
    values: dict[str, dict[str, dict[int, float]]] = {}  # row -> column -> seed -> per cent
    origin: dict[tuple[str, str, int], RunDirectory] = {}
    for run in runs:
        for row, columns in _scores(run, split).items():
            for column, value in columns.items():
                cell = (row, column, int(run.summary["seed"]))
                if cell in origin:
                    raise DataError(f"{run.path} and {origin[cell].path}: both are '{row}' on {column}, seed {cell[2]}")
                origin[cell] = run
                values.setdefault(row, {}).setdefault(column, {})[cell[2]] = 100 * value
    if not values:
        wanted = "evaluation.modes" if split == "test" else "federation.leave-out"
        raise DataError(f"{runs[0].path}: no run here has scores for that table; set {wanted} and run again")
    domains = list(dict.fromkeys(c for columns in values.values() for c in columns if c != WORST_CLIENT))
    rows = {}
    for row, cells in values.items():
        whole = set.intersection(*(set(cells.get(d, {})) for d in domains))
        per_seed = [[cells[d][seed] for d in domains] for seed in sorted(whole)]
        found = {column: list(seeds.values()) for column, seeds in cells.items()}
        found |= {"mean": [sum(v) / len(v) for v in per_seed], "worst": [min(v) for v in per_seed]}
        rows[row] = {column: cell_of(v) for column, v in found.items() if v}
    last = [WORST_CLIENT] if any(WORST_CLIENT in columns for columns in values.values()) else []
    return Results([*domains, "mean", "worst", *last], rows, _note(runs, split))


def _scores(run: RunDirectory, split: str) -> dict[str, dict[str, float]]:
    modes = run.summary.get("modes", {}).get(split, {})
    if modes:
        worst = lambda entry: {WORST_CLIENT: entry["worst_client"]} if split == "test" else {}  # noqa: E731
        return {f"{run.method} {mode}": {**entry["accuracy"], **worst(entry)} for mode, entry in modes.items()}
    plain = run.summary.get("unseen_accuracy") if split == "unseen" else run.summary["accuracy"]
    return {run.method: plain} if plain else {}


def _note(runs: Sequence[RunDirectory], split: str) -> str:
    orders = sorted({str(r.summary["modes"]["order"]) for r in runs if "modes" in r.summary})
    sizes = sorted({int(r.summary["modes"]["batch_size"]) for r in runs if "modes" in r.summary})
    seeds = sorted({int(r.summary["seed"]) for r in runs})
    batches = f"; test batches {orders[0]}, of at most {'-'.join(map(str, sizes))}" if orders else ""
    what = "domain's test split" if split == "test" else "domain left out of training"
    rounds = "-".join(map(str, sorted({int(r.summary["rounds"]) for r in runs})))
    return f"accuracy (%) on each {what}; seeds {', '.join(map(str, seeds))}; {rounds} rounds{batches}"

"""What a comparison cost: accuracy beside training FLOPs, the memory of weights and gradients, and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.errors import DataError
from fedsim.results.run import RunDirectory, by_method
from fedsim.results.table import Results, cell_of

# column -> (key of summary.json, divisor)
COSTS = {
    "TFLOP": ("train_flops", 1e12),
    "memory (kB)": ("training_memory_bytes", 1e3),
    "down (MB)": ("bytes_down", 1e6),
    "up (MB)": ("bytes_up", 1e6),
}


def collect_costs(runs: Sequence[RunDirectory]) -> Results:
    """Rows by method; mean accuracy over the domains and its costs, all means over seeds.

    Raises:
        DataError: a run's summary lacks one of the figures.
    """
    rows = {}
    for method, seeds in by_method(runs).items():
        missing = [(r.path, key) for r in seeds for key, _ in COSTS.values() if key not in r.summary]
        if missing:
            raise DataError(f"{missing[0][0] / 'summary.json'}: '{missing[0][1]}' is missing")
        rows[method] = {"mean": cell_of([100 * float(r.summary["mean_accuracy"]) for r in seeds])}
        for column, (key, unit) in COSTS.items():
            rows[method][column] = cell_of([float(np.mean([r.summary[key] / unit for r in seeds]))])
    note = (
        "mean: accuracy (%) over the domains; TFLOP: all local training; memory: weights and gradients of a client, as"
        " value and two indices where sparse; down, up: serialized messages, all clients and rounds"
    )
    return Results(["mean", *COSTS], rows, note, lower=tuple(COSTS))

"""Cut fedsim's digits suite into the clients of a workload: python -m experiments.bench.export_suite domains

Pixels become float32 in -1..1, as FedBN scales them, so that a contender needs neither fedsim nor its transforms.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from experiments.bench.workloads import Workload, folder, workload, write
from fedsim.data import load_dataset


def export(workload: Workload) -> Path:
    """The workload's folder, made if need be: its first domains of the suite, in equal runs of clients."""
    if folder(workload).exists():
        return folder(workload)
    suite = load_dataset("digits", progress=False)
    each = workload.clients // workload.domains * workload.examples
    rows = np.concatenate([suite.slice(d, "train")[:each] for d in suite.domains[: workload.domains]])
    x = suite.x_train[rows].astype(np.float32) / 127.5 - 1
    y = suite.y_train[rows]
    head = (workload.clients, workload.examples)
    x, y = x.reshape(*head, *workload.shape), y.reshape(head)
    return write(workload, lambda _, start, count: (x[start : start + count], y[start : start + count]))


if __name__ == "__main__":
    print(export(workload(sys.argv[1] if len(sys.argv) > 1 else "domains")))

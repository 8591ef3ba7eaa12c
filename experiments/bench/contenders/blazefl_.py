"""BlazeFL: its own FedAvg server and trainers, one after the other, in threads or in processes.

A data set and a DataLoader a visit, as in its quickstart. Under a Python older than 3.14 its threads share one lock.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from torch.utils.data import DataLoader, TensorDataset

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss
from experiments.bench.workloads import Workload, cohort, load, workload

PARALLEL = 2


class Selector:
    def __init__(self, workload: Workload, threads: int):
        self.workload, self.threads = workload, threads

    def select_model(self, name: str) -> torch.nn.Module:
        torch.set_num_threads(self.threads)  # called first of all in every worker
        return build_model(self.workload)


class Clients:
    """BlazeFL's partitioned data set. Pickled without the arrays, which every process maps anew."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"workload": self.workload, "arrays": None}

    def get_dataset(self, type_: str, cid: int | None) -> TensorDataset:
        if self.arrays is None:
            self.arrays = load(self.workload)
        x, y = self.arrays
        return TensorDataset(torch.from_numpy(np.asarray(x[cid])), torch.from_numpy(np.asarray(y[cid])))

    def set_dataset(self, type_: str, cid: int | None, dataset: object) -> None:
        """BlazeFL's worker processes put back what they were given; the neutral data never change."""

    def get_dataloader(
        self, type_: str, cid: int | None, batch_size: int | None, generator: object = None
    ) -> DataLoader:
        return DataLoader(self.get_dataset(type_, cid), batch_size=batch_size, shuffle=False)


class Handler(FedAvgBaseServerHandler):
    """Draws the workload's cohorts."""

    workload: Workload

    def sample_clients(self) -> list[int]:
        return cohort(self.workload, self.round + 1)  # BlazeFL counts from 0


def trainer(mode: str, options: dict[str, Any]) -> FedAvgBaseClientTrainer:
    if mode == "serial":
        return FedAvgBaseClientTrainer(**options)
    if mode == "processes":
        states = Path(tempfile.mkdtemp(prefix="blazefl-"))
        return FedAvgProcessPoolClientTrainer(state_dir=states, num_parallels=PARALLEL, **options)
    return FedAvgThreadPoolClientTrainer(num_parallels=PARALLEL, **options)


def run(workload: Workload, rounds: int, mode: str = "serial") -> Result:
    threads = 2 if mode == "serial" and workload.model != "logistic" else 1  # its best settings
    torch.set_num_threads(threads)
    both = {"model_selector": Selector(workload, threads), "model_name": workload.model, "dataset": Clients(workload)}
    both |= {"device": "cpu", "batch_size": workload.batch, "num_clients": workload.clients, "seed": 0}
    handler = Handler(global_round=rounds, sample_ratio=workload.cohort / workload.clients, **both)
    handler.workload, handler.num_clients_per_round = workload, workload.cohort
    clients = trainer(mode, {"epochs": 1, "lr": workload.lr, **both})
    stamps = []
    while not handler.is_stopped():
        stamps.append(time.perf_counter())
        sampled = handler.sample_clients()
        clients.local_process(handler.downlink_package(), sampled)
        for package in clients.uplink_package():
            handler.load(package)
    stamps.append(time.perf_counter())
    loss = final_loss(workload, dict(handler.model.named_parameters()), {})
    name = f"blazefl-{mode}"
    return result(name, workload.name, stamps, loss, "blazefl", "torch", "numpy", threads=threads)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument(
        "--mode", default="serial", choices=("serial", "threads", "processes"), help="(default: serial)"
    )
    chosen = parser.parse_args()
    print(run(workload(chosen.workload), chosen.rounds, chosen.mode).line())

"""Apple's pfl-research: its SimulatedBackend and FederatedAveraging; with two processes, its own gloo all-reduce."""

from __future__ import annotations

import os
import time
import types
from collections.abc import Iterator

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss
from experiments.bench.workloads import Workload, cohort, load, workload


class Stamps(TrainingProcessCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.times.append(time.perf_counter())
        return False, Metrics()


def users(workload: Workload, rounds: int, processes: int, rank: int) -> Iterator[int]:
    """What this rank's sampler answers: its share of each cohort.

    pfl's sampler draws a user for every rank at a time and keeps its own one, but no more often than its share of
    the cohort asks for. Where the ranks do not divide the cohort they so get out of step with one common sequence.
    """
    for round in range(1, rounds + 3):  # pfl asks for a cohort or two more than it trains
        for client in cohort(workload, round)[rank::processes]:
            yield from [client] * processes


def run(workload: Workload, rounds: int, processes: int = 1, threads: int = 1) -> Result:
    torch.set_num_threads(threads)
    x, y = load(workload)
    network = build_model(workload)
    objective = types.MethodType(lambda self, inputs, labels: F.cross_entropy(self(inputs), labels), network)
    vars(network).update(loss=objective, metrics=types.MethodType(lambda self, inputs, labels: {}, network))
    rank = int(os.environ.get("PFL_WORKER_RANK", "0"))
    sequence = users(workload, rounds, processes, rank)

    def dataset(client: int) -> Dataset:
        raw = (torch.from_numpy(np.asarray(x[client])), torch.from_numpy(np.asarray(y[client])))
        return Dataset(raw, user_id=str(client))

    data = FederatedDataset(dataset, lambda: next(sequence))
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
    backend = SimulatedBackend(training_data=data, val_data=None, postprocessors=[WeightByDatapoints()])
    plan = NNAlgorithmParams(
        central_num_iterations=rounds,
        evaluation_frequency=10**9,
        train_cohort_size=workload.cohort,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(local_learning_rate=workload.lr, local_num_epochs=1, local_batch_size=workload.batch)
    stamps = Stamps()
    begin = time.perf_counter()
    FederatedAveraging().run(plan, backend, model, local, NNEvalHyperParams(local_batch_size=1000), [stamps])
    loss = final_loss(workload, dict(network.named_parameters()), {})
    name = f"pfl-{processes}"
    return result(name, workload.name, [begin, *stamps.times], loss, "pfl", "torch", "numpy", threads=threads)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1, help="ranks; more than one are started by pfl_ranks.py")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each (default: 1)")
    chosen = parser.parse_args()
    outcome = run(workload(chosen.workload), chosen.rounds, chosen.processes, chosen.threads)
    if os.environ.get("PFL_WORKER_RANK", "0") == "0":
        print(outcome.line())

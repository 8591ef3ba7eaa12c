"""fluke: its CentralizedFL with its own clients and server (FedAvg, weighted), its fast data loader, no evaluation.

One process: its multi-process server needs several GPUs.
"""

from __future__ import annotations

import sys
import time
from types import ModuleType

import torch

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss, shard
from experiments.bench.workloads import CLASSES, Workload, cohort, load, workload


class Absent(ModuleType):
    """Stands for torchvision, which fluke imports for data sets and networks that nobody uses here, and which has no
    build for every torch that fluke itself runs on."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for name in ("", ".models", ".datasets", ".datasets.utils", ".transforms"):
    sys.modules[f"torchvision{name}"] = Absent(f"torchvision{name}")

from fluke import DDict, FlukeENV  # noqa: E402 (after its import of torchvision has been provided for)
from fluke.algorithms import CentralizedFL  # noqa: E402
from fluke.client import Client  # noqa: E402
from fluke.config import OptimizerConfigurator  # noqa: E402
from fluke.data import FastDataLoader  # noqa: E402
from fluke.server import Server  # noqa: E402
from fluke.utils import FederationObserver  # noqa: E402


class FixedServer(Server):
    """Draws the workload's cohorts."""

    workload: Workload
    round = 0

    def get_eligible_clients(self, eligible_perc: float) -> list[Client]:
        self.round += 1
        return [self.clients[c] for c in cohort(self.workload, self.round)]


class Stamps(FederationObserver):
    def __init__(self) -> None:
        self.times: list[float] = []

    def start_round(self, round: int, global_model: object) -> None:
        self.times.append(time.perf_counter())


def run(workload: Workload, rounds: int, threads: int = 1) -> Result:
    torch.set_num_threads(threads)
    settings = FlukeENV()
    settings.set_device("cpu")
    settings.set_seed(0)
    settings.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    x, y = load(workload)
    optimizer = OptimizerConfigurator(DDict(name="SGD", lr=workload.lr))
    loader = {"num_labels": CLASSES, "batch_size": workload.batch, "shuffle": False, "skip_singleton": False}
    clients = [
        Client(
            index,
            FastDataLoader(*shard(x, y, index), **loader),
            None,
            optimizer,
            torch.nn.CrossEntropyLoss(),
            local_epochs=1,
            persistency=False,
        )
        for index in range(workload.clients)
    ]
    server = FixedServer(build_model(workload), None, clients, weighted=True)
    server.workload = workload
    algorithm = CentralizedFL(len(clients), None, None, clients=clients, server=server)
    stamps = Stamps()
    algorithm.attach(stamps)
    algorithm.finalize = lambda: stamps.times.append(time.perf_counter())  # what fluke does after the last round
    algorithm.run(rounds, workload.cohort / workload.clients)
    loss = final_loss(workload, dict(server.model.named_parameters()), {})
    return result("fluke", workload.name, stamps.times, loss, "fluke-fl", "torch", "numpy", threads=threads)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    chosen = parser.parse_args()
    print(run(workload(chosen.workload), chosen.rounds, chosen.threads).line())

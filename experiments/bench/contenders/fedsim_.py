"""fedsim itself: its engine, its Ray pool and its strategies, on the neutral data, weights, cohorts and batch order."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss
from experiments.bench.workloads import CLASSES, Workload, cohort, folder, load, workload
from fedsim.build import federation_of, plan
from fedsim.config import Config, parse_config
from fedsim.data import Dataset, Partition
from fedsim.store import ClientStore


def dataset(workload: Workload) -> Dataset:
    """The neutral data as a fedsim data set, kept beside them; the test split, which nobody asks for, is one client."""
    target = folder(workload) / "fedsim"
    if (target / "meta.json").exists():
        return Dataset(target)
    x, y = load(workload)
    each = workload.clients // workload.domains
    arrays = {}
    for d in range(workload.domains):
        rows = slice(d * each, (d + 1) * each)
        inputs, labels = x[rows].reshape(-1, *workload.shape), y[rows].reshape(-1)
        test = inputs[: workload.examples], labels[: workload.examples]
        arrays[f"domain-{d}"] = {"train": (inputs, labels), "test": test}
    classes = tuple(str(c) for c in range(CLASSES))
    return Dataset.from_arrays(workload.name, target, arrays, classes)


def shards(workload: Workload, dataset: Dataset) -> Partition:
    indices = np.arange(workload.clients * workload.examples)
    offsets = np.arange(workload.clients + 1) * workload.examples
    domain = np.array([workload.domain(c) for c in range(workload.clients)], np.int16)
    return Partition(indices, offsets, domain, dataset.domains)


def configuration(workload: Workload, rounds: int, precision: str = "full", **simulation: Any) -> Config:
    """Args: keys of fedsim's ``[simulation]``, and ``precision`` of its ``[training]``."""
    return parse_config(
        {
            "rounds": rounds,
            "federation": {"clients-per-round": workload.cohort},
            "model": {"name": workload.model, "norm": "bn" if workload.model == "digits-cnn" else "none"},
            "training": {"batch-size": workload.batch, "lr": workload.lr, "shuffle": False, "precision": precision},
            "algorithm": {"strategy": "fedbn" if workload.private else "fedavg"},
            "simulation": {name.replace("_", "-"): value for name, value in simulation.items()},
        }
    )


def _start_from(neutral: nn.Module, model: nn.Module) -> dict[str, str]:
    """Give ``model`` the neutral initial weights. Returns its names of parameters with the ``neutral`` ones."""
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for mine, parameter in zip(neutral.parameters(), theirs.values(), strict=True):  # the same layers in one order
            parameter.copy_(mine)
    return dict(zip(theirs, (name for name, _ in neutral.named_parameters())))


def run(workload: Workload, rounds: int, **options: Any) -> Result:
    """Args: as ``configuration``'s."""
    begin = time.perf_counter()
    data = dataset(workload)
    config = configuration(workload, rounds, **options)
    prepared = plan(config, (data, shards(workload, data), None))
    names = _start_from(build_model(workload), prepared.task.model)
    federation, strategy = federation_of(prepared, ClientStore(), debug=True), prepared.strategy
    start_up = time.perf_counter() - begin
    try:
        state = strategy.init(federation.shared)
        stamps = []
        for round in range(1, rounds + 1):
            stamps.append(time.perf_counter())
            for order in strategy.orders(round, state):
                # Without a name for the replies: the sums of a round are given back before the next.
                state = strategy.aggregate(round, state, order, federation.train(order, cohort(workload, round)))
        stamps.append(time.perf_counter())
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        personal = {
            c: {names[n]: v for n, v in federation.state(c).private.items() if n in names}
            for c in range(workload.clients)
            if federation.private
        }
    finally:
        federation.close()
    loss = final_loss(workload, {names[n]: v for n, v in strategy.model(state).items() if n in names}, personal)
    simulation = prepared.config.simulation
    chosen = {key: getattr(simulation, key) for key in ("executor", "workers", "block", "threads", "odd_block_threads")}
    packages = ("fedsim-domains", "torch", "numpy", "ray")
    return result(
        "fedsim", workload.name, stamps, loss, *packages, **chosen, start_up=f"{start_up:.1f} s", driver=f"{driver} MB"
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--executor", default="auto", choices=("auto", "loop", "vmap"), help="(default: auto)")
    parser.add_argument("--workers", type=int, default=2, help="Ray actors; 0: this process, no Ray (default: 2)")
    parser.add_argument("--block", type=int, default=0, help="clients a block; 0: fedsim's own rule (default: 0)")
    parser.add_argument("--precision", default="full", choices=("full", "bf16"), help="(default: full)")
    parser.add_argument("--compile", action="store_true", help="vmap's steps through torch's compiler")
    parser.add_argument("--threads", type=int, default=1, help="of a worker (default: 1)")
    parser.add_argument(
        "--odd-block-threads", type=int, default=0, help="of the last of an odd number of blocks; 0: fedsim's own rule"
    )
    chosen = vars(parser.parse_args())
    print(run(workload(chosen.pop("workload")), **chosen).line())

"""No engine at all: one process, one model, client after client, an in-place weighted sum."""

from __future__ import annotations

import time

import torch

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss, flat, private_names, shard, train, views
from experiments.bench.workloads import Workload, cohort, load, workload


def run(workload: Workload, rounds: int, threads: int = 1) -> Result:
    torch.set_num_threads(threads)
    x, y = load(workload)
    model = build_model(workload)
    state = model.state_dict()
    private = private_names(workload, model)
    shared = [n for n, _ in model.named_parameters() if n not in private]
    theta, own = flat(state, shared), flat(state, private)
    kept = own.repeat(workload.clients, 1)
    total = torch.zeros_like(theta)
    server, sums = views(theta, state, shared), views(total, state, shared)
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        total.zero_()
        for client in cohort(workload, round):
            mine = views(kept[client], state, private)
            for names, values in ((shared, server), (private, mine)):
                for name, value in zip(names, values):
                    state[name].copy_(value)
            train(model, *shard(x, y, client), workload.lr, workload.batch)
            for name, value in zip(private, mine):
                value.copy_(state[name])
            for name, value in zip(shared, sums):
                value.add_(state[name], alpha=workload.examples)
        torch.div(total, workload.samples, out=theta)
    stamps.append(time.perf_counter())
    personal = {c: dict(zip(private, views(row, state, private))) for c, row in enumerate(kept)} if private else {}
    loss = final_loss(workload, dict(zip(shared, server)), personal)
    return result(f"plain-{threads}", workload.name, stamps, loss, "torch", "numpy")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    chosen = parser.parse_args()
    print(run(workload(chosen.workload), chosen.rounds, chosen.threads).line())

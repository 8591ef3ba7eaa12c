"""torch.func by hand: vmap over grad, the clients of a cohort stacked, a chunk of them at a time."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss
from experiments.bench.workloads import Workload, cohort, load, workload


def run(workload: Workload, rounds: int, chunk: int = 1000) -> Result:
    torch.set_num_threads(1)
    x, y = load(workload)
    model = build_model(workload)
    server = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss_of(params: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (inputs,)), labels)

    gradient = vmap(grad(loss_of))
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        total = {n: torch.zeros_like(v) for n, v in server.items()}
        clients = cohort(workload, round)
        for start in range(0, len(clients), chunk):
            block = clients[start : start + chunk]
            inputs, labels = torch.from_numpy(x[block]), torch.from_numpy(y[block])  # [K, n, ...], [K, n]
            params = {n: v.expand(len(block), *v.shape).contiguous() for n, v in server.items()}
            for i in range(0, workload.examples, workload.batch):
                step = slice(i, i + workload.batch)
                grads = gradient(params, inputs[:, step], labels[:, step])
                for name, value in params.items():
                    value.add_(grads[name], alpha=-workload.lr)
            for name, value in params.items():
                total[name].add_(value.sum(0), alpha=workload.examples)
        server = {n: v / workload.samples for n, v in total.items()}
    stamps.append(time.perf_counter())
    return result("vmap", workload.name, stamps, final_loss(workload, server, {}), "torch", "numpy")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--chunk", type=int, default=1000, help="clients stacked at a time (default: 1000)")
    chosen = parser.parse_args()
    if workload(chosen.workload).model == "digits-cnn":
        raise SystemExit("vmap: BatchNorm writes its buffers in place; expected tiny, tiny-K or cifar")
    print(run(workload(chosen.workload), chosen.rounds, chosen.chunk).line())

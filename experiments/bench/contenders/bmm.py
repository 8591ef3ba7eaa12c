"""Logistic regression written out by hand for a whole cohort: one batched product a step and the closed-form gradient.
What a vectorised engine can at best come near to; for tiny alone."""

from __future__ import annotations

import time

import torch

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import build_model, final_loss
from experiments.bench.workloads import CLASSES, Workload, cohort, load, workload


@torch.no_grad()
def run(workload: Workload, rounds: int, threads: int = 1) -> Result:
    torch.set_num_threads(threads)
    x, y = (torch.from_numpy(a) for a in load(workload))
    weight, bias = (p.detach().clone() for p in build_model(workload).parameters())  # [C, F], [C]
    minus = torch.full((1, 1, 1), -1.0).expand(workload.cohort, workload.batch, 1)
    rate = workload.lr / workload.batch
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        clients = torch.tensor(cohort(workload, round))
        inputs, labels = x[clients], y[clients]  # [K, n, F], [K, n]
        w = weight.expand(workload.cohort, *weight.shape).clone()  # [K, C, F]
        b = bias.expand(workload.cohort, CLASSES).clone()  # [K, C]
        for i in range(0, workload.examples, workload.batch):
            batch, label = inputs[:, i : i + workload.batch], labels[:, i : i + workload.batch]
            error = torch.softmax(torch.baddbmm(b[:, None], batch, w.transpose(1, 2)), 2)  # [K, B, C]
            error.scatter_add_(2, label[..., None], minus)
            w.baddbmm_(error.transpose(1, 2), batch, alpha=-rate)
            b.add_(error.sum(1), alpha=-rate)
        weight, bias = w.mean(0), b.mean(0)
    stamps.append(time.perf_counter())
    loss = final_loss(workload, {"0.weight": weight, "0.bias": bias}, {})
    return result("bmm", workload.name, stamps, loss, "torch", "numpy")


if __name__ == "__main__":
    chosen = arguments(__doc__).parse_args()
    if workload(chosen.workload).model != "logistic":
        raise SystemExit(
            f"bmm: written for logistic regression alone; expected tiny or tiny-K, found {chosen.workload}"
        )
    print(run(workload(chosen.workload), chosen.rounds).line())

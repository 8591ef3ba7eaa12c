"""FedJAX: its own federated averaging; every local step one jitted call, client after client (its fastest on a CPU)."""

from __future__ import annotations

import time

import fedjax
import jax
from fedjax.algorithms.fed_avg import federated_averaging

from experiments.bench.jax_side import final_loss, loss_of, start
from experiments.bench.reporting import Result, arguments, result
from experiments.bench.workloads import Workload, cohort, load, workload


def run(workload: Workload, rounds: int) -> Result:
    x, y = load(workload)
    fedjax.set_for_each_client_backend("jit")
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch, num_epochs=1, skip_shuffle=True)
    gradient = jax.grad(lambda params, batch, key: loss_of(workload.model, params, batch["x"], batch["y"]))
    optimizers = fedjax.optimizers.sgd(workload.lr), fedjax.optimizers.sgd(1.0)
    algorithm = federated_averaging(gradient, *optimizers, batches)
    state = algorithm.init(start(workload))
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        clients = [
            (str(c).encode(), fedjax.ClientDataset({"x": x[c], "y": y[c]}), jax.random.PRNGKey(0))
            for c in cohort(workload, round)
        ]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
    stamps.append(time.perf_counter())
    packages = ("fedjax", "jax", "jaxlib", "numpy")
    return result("fedjax", workload.name, stamps, final_loss(workload, state.params), *packages)


if __name__ == "__main__":
    chosen = arguments(__doc__).parse_args()
    print(run(workload(chosen.workload), chosen.rounds).line())

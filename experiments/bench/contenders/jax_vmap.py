"""jax by hand, a reference: vmap over clients of a scan over local steps, jitted as one program a round."""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from experiments.bench.jax_side import Params, final_loss, loss_of, start
from experiments.bench.reporting import Result, arguments, result
from experiments.bench.workloads import Workload, cohort, load, workload


@partial(jax.jit, static_argnums=0)
def mean_model(workload: Workload, params: Params, x: Array, y: Array) -> Params:
    """The mean of the models that the clients of a cohort train. x [K, n, ...], y [K, n]."""

    def step(params: Params, batch: tuple[Array, Array]) -> tuple[Params, None]:
        grads = jax.grad(partial(loss_of, workload.model))(params, *batch)
        return jax.tree_util.tree_map(lambda p, g: p - workload.lr * g, params, grads), None

    def client(x: Array, y: Array) -> Params:
        steps = workload.examples // workload.batch
        batches = (a.reshape(steps, workload.batch, *a.shape[1:]) for a in (x, y))
        return jax.lax.scan(step, params, tuple(batches))[0]

    return jax.tree_util.tree_map(lambda values: values.mean(0), jax.vmap(client)(x, y))


def run(workload: Workload, rounds: int) -> Result:
    x, y = load(workload)
    params = start(workload)
    stamps = []
    for round in range(1, rounds + 1):
        stamps.append(time.perf_counter())
        clients = cohort(workload, round)
        params = jax.block_until_ready(mean_model(workload, params, jnp.asarray(x[clients]), jnp.asarray(y[clients])))
    stamps.append(time.perf_counter())
    return result("jax-vmap", workload.name, stamps, final_loss(workload, params), "jax", "jaxlib", "numpy")


if __name__ == "__main__":
    chosen = arguments(__doc__).parse_args()
    print(run(workload(chosen.workload), chosen.rounds).line())

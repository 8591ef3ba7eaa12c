"""The neutral models in jax, in torch's layout [B, C, H, W], and the loss that proves equal work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.bench.workloads import Workload, initial, judges, load

Params = dict[str, Array]


def start(workload: Workload) -> Params:
    return {name: jnp.asarray(value) for name, value in initial(workload).items()}


def conv(x: Array, weight: Array, bias: Array) -> Array:
    y = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + bias[None, :, None, None]


def pool(x: Array) -> Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def dense(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def norm(x: Array, gamma: Array, beta: Array) -> Array:
    """BatchNorm in training mode: by the statistics of the batch."""
    axes, shape = ((0,), (1, -1)) if x.ndim == 2 else ((0, 2, 3), (1, -1, 1, 1))
    mean = x.mean(axes, keepdims=True)
    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * gamma.reshape(shape) + beta.reshape(shape)


def logits(model: str, params: Params, x: Array) -> Array:
    """[B, ...] -> [B, classes]."""
    layer = lambda number: (params[f"{number}.weight"], params[f"{number}.bias"])  # noqa: E731
    relu = jax.nn.relu
    if model == "logistic":
        return dense(x, *layer(0))
    if model == "mcmahan-cnn":
        x = pool(relu(conv(pool(relu(conv(x, *layer(0)))), *layer(3))))
        return dense(relu(dense(x.reshape(len(x), -1), *layer(7))), *layer(9))
    x = pool(relu(norm(conv(x, *layer(0)), *layer(1))))
    x = pool(relu(norm(conv(x, *layer(4)), *layer(5))))
    x = relu(norm(conv(x, *layer(8)), *layer(9))).reshape(len(x), -1)
    for linear, batch_norm in ((12, 13), (15, 16)):
        x = relu(norm(dense(x, *layer(linear)), *layer(batch_norm)))
    return dense(x, *layer(18))


def loss_of(model: str, params: Params, x: Array, y: Array) -> Array:
    """Mean cross entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(model, params, x)), y[:, None], 1).mean()


def final_loss(workload: Workload, params: Params) -> float:
    """As ``torch_side.final_loss``, nothing private."""
    x, y = load(workload)
    measure = jax.jit(lambda inputs, labels: loss_of(workload.model, params, inputs, labels))
    losses = [measure(jnp.asarray(x[c]), jnp.asarray(y[c])) for c in judges(workload)]
    return float(np.mean(losses))

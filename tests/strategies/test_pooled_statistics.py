"""FBN: the layer and the server's pooling against numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.models.norm_layers import PooledBatchNorm2d
from tests.conftest import Small


def close(found, expected):
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (6, 4)])
def test_the_layer_normalizes_by_what_it_received_and_collects_what_it_saw(shape):
    layer = PooledBatchNorm2d(4).train()
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([1.0, 4.0, 2.0, 0.5]))
    draw, means, variances = torch.Generator().manual_seed(0), [], []
    for step in range(3):
        x = torch.randn(shape, generator=draw) * (step + 1) + 100 * step
        z = np.moveaxis(x.double().numpy(), 1, -1)
        scaled = (z - layer.running_mean.numpy()) / np.sqrt(layer.running_var.double().numpy() + 1e-5)
        close(layer(x), np.moveaxis(scaled, -1, 1))
        means.append(z.reshape(-1, 4).mean(0))
        variances.append(z.reshape(-1, 4).var(0, ddof=1))
    m, v = np.mean(means, 0), np.mean(variances, 0)
    assert layer.running_mean.tolist() == [0, 1, 2, 3]
    close(layer.seen_mean, m)
    np.testing.assert_allclose(layer.seen_square.numpy(), v + m**2, rtol=1e-5)
    assert layer.seen_batches == 3


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_the_server_pools_with_the_spread_between_the_clients(dataset, executor):
    """Two rounds against ten lines of numpy on what each client alone replies."""
    section = {"strategy": "fbn", "pool-rate": 0.25}
    small = Small(
        dataset, algorithm=section, simulation={"executor": executor, "block": 2}, training={"dtype": "float64"}
    )
    federation, state = small.federation, small.strategy.init(small.federation.shared)
    layers = [n.removesuffix("running_mean") for n in state if n.endswith("running_mean")]
    assert layers
    for round in (1, 2):
        (order,) = small.strategy.orders(round, state)
        replies = federation.train(replace(order, fold=False), [0, 1, 2]).singles
        weights = np.array([r.examples for r in replies]) / sum(r.examples for r in replies)
        after = small.strategy.aggregate(round, state, order, federation.train(order, [0, 1, 2]))
        for layer in layers:
            m_k = np.stack([r.shared[layer + "seen_mean"].numpy() for r in replies])
            v_k = np.stack([r.shared[layer + "seen_square"].numpy() for r in replies]) - m_k**2
            assert np.abs(m_k[0] - m_k[1]).max() > 1e-3
            m = weights @ m_k
            v = weights @ (v_k + (m_k - m) ** 2)
            close(after[layer + "running_mean"], 0.75 * state[layer + "running_mean"].numpy() + 0.25 * m)
            close(after[layer + "running_var"], 0.75 * state[layer + "running_var"].numpy() + 0.25 * v)
            assert not after[layer + "seen_mean"].any()
            assert not after[layer + "seen_square"].any()
            assert after[layer + "seen_batches"] == 0
        state = after


def test_fedtiny_is_refused_with_the_reason(dataset):
    with pytest.raises(ConfigError, match="only pool the server's"):
        Small(dataset, algorithm={"strategy": "fbn", "pruning": "fedtiny"})

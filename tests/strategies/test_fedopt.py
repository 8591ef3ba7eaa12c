"""Server optimizers against torch.optim where torch has the rule, against numpy where it has not."""

import numpy as np
import pytest
import torch

from fedsim.strategy import Replies
from fedsim.types import Reply
from strategies import FedOpt

MOVES = np.array([[0.3, 0.1, -0.2], [0.4, -0.1, -0.1], [-0.5, 0.2, 0.3]])
START = np.array([1.0, -2.0, 0.5])


def run(kind: str, **options) -> np.ndarray:
    strategy = FedOpt(kind, trainable=["w"], **options)
    state = strategy.init({"w": torch.tensor(START), "stat": torch.tensor([1.0])})
    for t, move in enumerate(MOVES, 1):
        (order,) = strategy.orders(t, state)
        reply = Reply(0, 3, {"w": order.shared["w"] + torch.tensor(move), "stat": torch.tensor([float(t)])})
        state = strategy.aggregate(t, state, order, Replies([reply]))
        assert state["stat"].item() == t
    return state["w"].numpy()


def test_momentum_is_torchs_sgd():
    w = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.7, momentum=0.9)
    for move in MOVES:
        w.grad = torch.tensor(-move)
        optimizer.step()
    np.testing.assert_allclose(run("momentum", eta=0.7, beta1=0.9), w.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["adagrad", "yogi", "adam"])
def test_adaptive_rules_are_reddis(kind):
    beta1, beta2, tau, eta = (0.0 if kind == "adagrad" else 0.9), 0.99, 1e-3, 0.1
    w, m, v = START.copy(), np.zeros(3), np.full(3, tau**2)
    for d in MOVES:
        m = beta1 * m + (1 - beta1) * d
        if kind == "adagrad":
            v = v + d**2
        elif kind == "yogi":
            v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
        else:
            v = beta2 * v + (1 - beta2) * d**2
        w = w + eta * m / (np.sqrt(v) + tau)
    np.testing.assert_allclose(run(kind, eta=eta, beta1=beta1, beta2=beta2, tau=tau), w, rtol=1e-10)


def test_adagrad_is_torchs_apart_from_where_it_starts():
    """torch.optim.Adagrad with initial_accumulator_value = tau^2 and eps = tau is the same rule."""
    w = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.Adagrad([w], lr=0.1, initial_accumulator_value=1e-6, eps=1e-3)
    for move in MOVES:
        w.grad = torch.tensor(-move)
        optimizer.step()
    np.testing.assert_allclose(run("adagrad", eta=0.1, beta1=0.0), w.detach().numpy(), rtol=1e-10)

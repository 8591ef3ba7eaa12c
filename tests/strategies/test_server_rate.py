"""Constant and decaying server rates and FedExP, against numpy."""

import numpy as np
import pytest
import torch

from clients.update_norm import NORM
from fedsim.strategy import Replies
from fedsim.types import Reply
from strategies import FedAvg, FedExP, ServerRate
from tests.conftest import Small
from tests.test_engine import agree

START = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64), "stat": torch.tensor([4.0], dtype=torch.float64)}
UPDATES = np.array([[[0.4, 0.1], [-0.3, 0.2]], [[1.0, 0.0], [-0.9, 0.1]], [[0.2, 0.2], [0.2, 0.2]]])  # [round, client]
N = np.array([10, 30])


def rounds(strategy):
    state, states = strategy.init(START), []
    for t, updates in enumerate(UPDATES, 1):
        (order,) = strategy.orders(t, state)
        replies = [
            Reply(
                k,
                int(N[k]),
                {"w": order.shared["w"] + torch.tensor(u), "stat": torch.tensor([5.0], dtype=torch.float64)},
                {NORM: torch.tensor(u @ u)},
            )
            for k, u in enumerate(updates)
        ]
        state = strategy.aggregate(t, state, order, Replies(replies))
        states.append(state)
    return states


def test_server_rate_decays():
    w = START["w"].numpy()
    for t, state in enumerate(rounds(ServerRate(FedAvg(trainable=["w"]), 1.5, 0.9))):
        w = w + 1.5 * 0.9**t * (N @ UPDATES[t] / N.sum())
        np.testing.assert_allclose(state["w"].numpy(), w, rtol=1e-12)
        assert state["stat"].item() == 5.0, "statistics take the mean"


def test_fedexp_equals_numpy():
    strategy = FedExP(FedAvg(trainable=["w"]), eps=1e-3)
    w, rates = START["w"].numpy(), []
    for t, state in enumerate(rounds(strategy)):
        delta = N @ UPDATES[t] / N.sum()
        norms = N @ (UPDATES[t] ** 2).sum(1) / N.sum()
        eta = max(1.0, norms / (2 * (delta @ delta + 1e-3)))
        before, w = w, w + eta * delta
        rates.append(eta)
        np.testing.assert_allclose(state["w"].numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(strategy.model(state)["w"].numpy(), (w + before) / 2, rtol=1e-12)
        assert strategy.metrics(state)["server-lr"] == pytest.approx(eta, rel=1e-6)
    assert max(rates) > 2, "opposing updates are extrapolated"
    assert rates[-1] == 1.0, "agreeing ones are not"


@pytest.mark.parametrize("rate", ["server-rate", "fedexp"])
def test_loop_and_vmap_agree(dataset, rate):
    sections = {"algorithm": {"strategy": "fedbn", "learning-rate": rate}, "training": {"dtype": "float64"}}
    agree(*(Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap")))


def test_update_norm_is_that_of_the_shared_parameters(dataset):
    run = Small(dataset, algorithm={"strategy": "fedbn", "learning-rate": "fedexp"})
    (order,) = run.strategy.orders(1, run.strategy.init(run.federation.shared))
    replies = run.federation.train(order, [1])
    (reply,), after = replies.singles, replies.mean(order.shared)
    names = set(run.task.trainable) & order.shared.keys()
    expected = sum(float((after[n] - order.shared[n]).square().sum()) for n in names)
    assert reply.report[NORM].item() == pytest.approx(expected, rel=1e-4)

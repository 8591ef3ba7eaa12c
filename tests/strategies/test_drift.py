"""SCAFFOLD, FedNova and FedDyn against numpy on F_i(w) = (a_i / 2) (w - b_i)^2, two of three clients a round."""

import numpy as np
import pytest
import torch

from fedsim.fold import Partial
from fedsim.strategy import Replies
from fedsim.types import Order, Reply, View
from strategies import FedDyn, FedNova, Scaffold
from tests.conftest import Small
from tests.test_engine import agree

A, B, EXAMPLES = np.array([1.0, 2.0, 0.5]), np.array([[1.0, -1.0], [3.0, 0.0], [-2.0, 2.0]]), [10, 30, 20]
ETA, STEPS, COHORTS = 0.1, [3, 5, 2], [[0, 1], [1, 2]]


def train(plugin, order: Order, client: int, memory: dict, momentum: float = 0.0):
    """K plain steps of one client on its quadratic -> reply, memory."""
    view = View(order, memory, ETA, float(STEPS[client]))
    params = {"w": order.shared["w"].clone()}
    state, velocity = plugin.start(params, view), torch.zeros(2, dtype=torch.float64)
    for _ in range(STEPS[client]):
        grads = {"w": A[client] * (params["w"] - torch.tensor(B[client]))}
        grads, state = plugin.update(grads, state, params, view)
        velocity = momentum * velocity + grads["w"]
        params = {"w": params["w"] - ETA * velocity}
    report, kept = plugin.finish(params, state, view)
    return Reply(client, EXAMPLES[client], params, report), kept


def run(strategy, momentum: float = 0.0, fold: bool = False):
    state = strategy.init({"w": torch.zeros(2, dtype=torch.float64)})
    memory: dict = {}
    for t, cohort in enumerate(COHORTS, 1):
        (order,) = strategy.orders(t, state)
        replies = []
        for client in cohort:
            reply, memory[client] = train(strategy.plugins[0], order, client, memory.get(client, {}), momentum)
            replies.append(reply)
        partials = []
        if fold:  # what a worker makes of a block of one client
            weigh = lambda r: r.examples if strategy.weighting == "examples" else 1.0  # noqa: E731
            partials = [Partial.of({**r.shared, **r.report}, weigh(r)) for r in replies]
            replies = [Reply(r.client, r.examples, {}) for r in replies]
        state = strategy.aggregate(t, state, order, Replies(replies, partials, strategy.weighting, population=3))
    return state["w"].numpy()


@pytest.mark.parametrize("fold", [False, True])
def test_scaffold_equals_numpy(fold):
    w, c, ci = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for cohort in COHORTS:
        ys, changes = [], []
        for i in cohort:
            y = w
            for _ in range(STEPS[i]):
                y = y - ETA * (A[i] * (y - B[i]) - ci[i] + c)
            new = ci[i] - c + (w - y) / (STEPS[i] * ETA)
            ys, changes, ci[i] = [*ys, y], [*changes, new - ci[i]], new
        w, c = w + 0.8 * (np.mean(ys, 0) - w), c + 2 / 3 * np.mean(changes, 0)
    np.testing.assert_allclose(run(Scaffold(0.8), fold=fold), w, rtol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("fold", [False, True])
def test_fednova_equals_numpy(rho, fold):
    w = np.zeros(2)
    for cohort in COHORTS:
        p = np.array([EXAMPLES[i] for i in cohort]) / sum(EXAMPLES[i] for i in cohort)
        d, a = [], []
        for i in cohort:
            y, v = w, np.zeros(2)
            for _ in range(STEPS[i]):
                v = rho * v + A[i] * (y - B[i])
                y = y - ETA * v
            a.append(sum(sum(rho**j for j in range(k + 1)) for k in range(STEPS[i])))  # how often each gradient counts
            d.append((w - y) / a[-1])
        w = w - (p @ a) * (p @ np.array(d))
    np.testing.assert_allclose(run(FedNova(rho), rho, fold), w, rtol=1e-12)


@pytest.mark.parametrize("fold", [False, True])
def test_feddyn_equals_numpy(fold):
    alpha, w, h, hi = 0.3, np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for cohort in COHORTS:
        ys = []
        for i in cohort:
            y = w
            for _ in range(STEPS[i]):
                y = y - ETA * (A[i] * (y - B[i]) - hi[i] + alpha * (y - w))
            ys, hi[i] = [*ys, y], hi[i] - alpha * (y - w)
        h = h - alpha / 3 * sum(y - w for y in ys)
        w = np.mean(ys, 0) - h / alpha
    np.testing.assert_allclose(run(FedDyn(alpha), fold=fold), w, rtol=1e-12)


@pytest.mark.parametrize("normalization", ["shared", "local", "standardized-weights"])
@pytest.mark.parametrize("strategy", ["scaffold", "fednova", "feddyn"])
def test_composes_with_normalization_under_both_executors(dataset, strategy, normalization):
    sections = {
        "algorithm": {"strategy": strategy, "normalization": normalization},
        "training": {"dtype": "float64"},
    }
    agree(*(Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap")), rounds=2)


@pytest.mark.parametrize("strategy", ["scaffold", "fednova", "feddyn"])
def test_what_wraps_the_rule_keeps_its_own_state(dataset, strategy):
    algorithm = {"strategy": strategy, "pruning": "fedtiny", "density": 0.2, "adjust-every": 1, "adjust-until": 4}
    state = Small(dataset, algorithm=algorithm, training={"lr": 0.01}).run(2)
    assert int(state["@adjustments"]) == 2
    masks = {n.removeprefix("@mask."): v for n, v in state.items() if n.startswith("@mask.")}
    assert sum(int(v.sum()) for v in masks.values()) == round(0.2 * sum(v.numel() for v in masks.values()))

"""FedHyper's rates against numpy for three rounds, and its bounds."""

import numpy as np
import pytest
import torch

from clients.learning_rate import DELTA, HypergradientRate, ReleasedRate
from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.strategy import Replies
from fedsim.types import Order, Reply, View
from strategies import FedAvg, FedHyper
from tests.conftest import Small
from tests.test_engine import agree

START = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), "stat": torch.tensor([4.0], dtype=torch.float64)}
MOVES = np.array([[0.3, 0.1, -0.2], [0.4, -0.1, -0.1], [-0.5, 0.2, 0.3]])  # what the clients' mean adds each round


def rounds(**options):
    """(states, orders) of three rounds in which two clients move w by MOVES on average and set stat to 1 + round."""
    strategy = FedHyper(FedAvg(trainable=["w"]), **options)
    state, states = strategy.init(START), []
    orders = []
    for t, move in enumerate(MOVES, 1):
        (order,) = strategy.orders(t, state)
        orders.append(order)
        spread = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)
        stat = torch.tensor([1.0 + t], dtype=torch.float64)
        replies = [
            Reply(c, 5, {"w": order.shared["w"] + torch.tensor(move) + sign * spread, "stat": stat})
            for c, sign in enumerate((1, -1))
        ]
        state = strategy.aggregate(t, state, order, Replies(replies))
        states.append(state)
    return states, orders


@pytest.mark.parametrize(("kappa", "bound"), [(1.0, 3.0), (30.0, 3.0), (-30.0, 5.0)])
def test_g_equals_numpy(kappa, bound):
    states, _ = rounds(kappa=kappa, bound=bound)
    w, alpha, previous = START["w"].numpy(), 1.0, np.zeros(3)
    for t, move in enumerate(MOVES):
        alpha = np.clip(alpha + kappa * move @ previous, 1 / bound, bound)
        w, previous = w + np.float32(alpha) * move, move
        assert states[t]["@alpha"].item() == pytest.approx(alpha, rel=1e-6)
        np.testing.assert_allclose(states[t]["w"].numpy(), w, rtol=1e-6)
        assert states[t]["stat"].item() == 2.0 + t, "statistics take the mean, whatever alpha is"


def test_server_momentum_equals_numpy():
    states, _ = rounds(momentum=0.9)
    w, alpha, m = START["w"].numpy(), 1.0, np.zeros(3)
    for t, move in enumerate(MOVES):
        alpha = np.clip(alpha + move @ m, 1 / 3, 3)
        m = move + 0.9 * m
        w = w + np.float32(alpha) * m
        np.testing.assert_allclose(states[t]["w"].numpy(), w, rtol=1e-6)


def test_sl_sends_one_rate_within_its_bounds():
    states, orders = rounds(server=False, local=True, beta=0.01, kappa=0.5)
    beta, previous = 0.01, np.zeros(3)
    for t, move in enumerate(MOVES):
        assert orders[t].scalars["lr"] == pytest.approx(beta, rel=1e-6)
        beta = np.clip(beta + 0.5 * move @ previous, 0.001, 0.1)
        previous = move
    assert states[-1]["@alpha"].item() == 1.0


def test_cl_equals_numpy_step_by_step():
    plugin, lr, steps = HypergradientRate(gamma=10.0), 0.1, 4
    draw = np.random.default_rng(0)
    delta, grads = draw.normal(size=3) * 0.1, draw.normal(size=(steps, 3)) * 0.3
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    view = View(Order(2, {}, extra={DELTA + "w": torch.tensor(delta)}), {}, lr, float(steps))
    state = plugin.start(params, view)
    beta, previous = lr, -delta
    for g in grads:
        beta = np.clip(beta + g @ previous + g @ -delta / steps, lr / 10, lr * 10)
        previous = g
        scaled, state = plugin.update({"w": torch.tensor(g)}, state, params, view)
        np.testing.assert_allclose(scaled["w"].numpy() * lr, beta * g, rtol=1e-9)
    assert plugin.finish(params, state, view)[0]["client-lr"].item() == pytest.approx(beta)


def test_cosine_is_bounded_by_kappa():
    states, _ = rounds(kappa=0.25, cosine=True)
    cos = MOVES[1] @ MOVES[0] / np.linalg.norm(MOVES[0]) / np.linalg.norm(MOVES[1])
    assert states[1]["@alpha"].item() == pytest.approx(1 + 0.25 * cos, rel=1e-6)


@pytest.mark.parametrize("normalization", ["shared", "local", "standardized-weights", "gn"])
@pytest.mark.parametrize("rate", ["fedhyper-g", "fedhyper-sl", "fedhyper-cl", "fedhyper-g-cl", "fedhyper-gm"])
def test_composes_with_normalization_under_both_executors(dataset, rate, normalization):
    sections = {"algorithm": {"normalization": normalization, "learning-rate": rate}, "training": {"dtype": "float64"}}
    loop, vmap = (Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap"))
    agree(loop, vmap, rounds=2)
    state = loop.run(3)
    assert 1 / 3 - 1e-6 <= state["@alpha"].item() <= 3
    assert 0.005 <= state["@beta"].item() <= 0.5
    assert not loop.task.private & {n.removeprefix("@delta.") for n in state}
    replies = loop.federation.train(loop.strategy.orders(4, state)[0], [0, 1, 2])
    if "cl" in rate:
        assert all(0.005 - 1e-9 <= r.report["client-lr"].item() <= 0.5 + 1e-9 for r in replies.singles)


def test_released_momentum_equals_numpy():
    """w + (1 + s) Delta + 0.9 s m, s = sum of <m, Delta> within [-0.2, 4]: the rule of src/federated_main.py."""
    states, _ = rounds(momentum=0.9, released=True, bound=5.0, kappa=3.0)
    w, s, m = START["w"].numpy(), 0.0, np.zeros(3)
    for t, move in enumerate(MOVES):
        s = np.clip(s + 3.0 * move @ m, -0.2, 4)
        w = w + np.float32(1 + s) * move + 0.9 * np.float32(s) * m
        m = move + 0.9 * m
        np.testing.assert_allclose(states[t]["w"].numpy(), w, rtol=1e-6)


def test_released_sl_multiplies_the_first_rate():
    _, orders = rounds(server=False, local=True, beta=0.01, kappa=40.0, released=True)
    s, previous = 0.0, np.zeros(3)
    for t, move in enumerate(MOVES):
        assert orders[t].scalars["lr"] == pytest.approx(min(0.1, max(0.001, 0.01 * (1 + s))), rel=1e-6)
        s += 40 * move @ previous  # the sum is not clipped
        previous = move


def test_released_cl_equals_numpy_step_by_step():
    plugin, lr = ReleasedRate(gamma=10.0), 0.5
    draw = np.random.default_rng(0)
    delta, grads = draw.normal(size=3), draw.normal(size=(6, 3))
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    order = Order(2, {}, extra={DELTA + "w": torch.tensor(delta)}, scalars={"clients": 4.0})
    view = View(order, {}, lr, 6.0)
    state = plugin.start(params, view)
    factor, previous = 1.0, delta
    for g in grads:
        change = -lr * factor * g
        scaled, state = plugin.update({"w": torch.tensor(g)}, state, params, view)
        np.testing.assert_allclose(scaled["w"].numpy(), factor * g, rtol=1e-12)
        factor = np.clip(factor * min(1.1, 1 + change @ previous + 0.1 * change @ delta / 4), 0.1, 10)
        previous = change


@pytest.mark.parametrize("rate", ["fedhyper-sl", "fedhyper-g-cl", "fedhyper-gm"])
def test_released_rules_run_under_both_executors(dataset, rate):
    sections = {"algorithm": {"strategy": rate, "released-hyper": True}, "training": {"dtype": "float64"}}
    agree(*(Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap")), rounds=3)


def test_the_first_server_rate_is_configured(dataset):
    half, one = (Small(dataset, algorithm={"strategy": "fedhyper-cl", "server-lr": a}) for a in (0.5, 1.0))
    start = one.federation.shared
    moved = [run.run(1) for run in (half, one)]
    for name in one.task.trainable:
        torch.testing.assert_close(
            moved[0][name] - start[name], (moved[1][name] - start[name]) / 2, atol=1e-6, rtol=1e-4
        )


def test_one_hash_in_any_order_of_blocks(dataset):
    sections = {"algorithm": {"strategy": "fedhyper-g-cl"}}
    runs = [Small(dataset, **sections).run(3) for _ in range(2)]
    assert state_sha256(runs[0]) == state_sha256(runs[1])


def test_refused_where_it_makes_no_sense(dataset):
    with pytest.raises(ConfigError, match="plain SGD"):
        Small(dataset, algorithm={"strategy": "fedhyper-g"}, training={"optimizer": "adam"})

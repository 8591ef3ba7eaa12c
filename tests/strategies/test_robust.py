"""Robust aggregation: each rule against ten lines of numpy, with malicious clients among the honest, and composed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.build import plan
from fedsim.errors import ConfigError
from fedsim.strategy import Replies
from fedsim.types import Order, Reply
from strategies import FedAvg, FedOpt, Robust
from strategies.robust import Bulyan, Krum, Median, NormClipping, TrimmedMean
from tests.conftest import Small, shards_of, small_config
from tests.hostile import hand_over, scaled

NAMES = ["bulyan", "krum", "median", "multi-krum", "norm-clipping", "trimmed-mean"]


def numpy_krum_order(x: np.ndarray, f: int) -> list[int]:
    n = len(x)
    scores = []
    for i in range(n):
        others = sorted(((x[i] - x[j]) ** 2).sum() for j in range(n) if j != i)
        scores.append((sum(others[: max(n - f - 2, 1)]), sum(others), i))
    return [i for _, _, i in sorted(scores)]


def numpy_bulyan(x: np.ndarray, f: int) -> np.ndarray:
    left, chosen = list(range(len(x))), []
    while len(chosen) < len(x) - 2 * f:
        chosen.append(left.pop(numpy_krum_order(x[left], f)[0]))
    picked = x[sorted(chosen)]
    out = np.empty(x.shape[1])
    for d in range(x.shape[1]):
        middle = np.median(picked[:, d])
        out[d] = np.mean(sorted(picked[:, d], key=lambda v: abs(v - middle))[: len(picked) - 2 * f])
    return out


def numpy_clipped(x: np.ndarray, before: np.ndarray, weights: np.ndarray, bound: float) -> np.ndarray:
    deltas = x - before
    norms = np.sqrt((deltas**2).sum(1))
    limit = bound or np.median(norms)
    return before + np.average(deltas * np.minimum(1, limit / norms)[:, None], axis=0, weights=weights)


ORACLES = {
    "median": (Median, lambda x, before, p, f: np.median(x, axis=0)),
    "trimmed": (TrimmedMean, lambda x, before, p, f: np.sort(x, axis=0)[f : len(x) - f].mean(0)),
    "krum": (Krum, lambda x, before, p, f: x[numpy_krum_order(x, f)[0]]),
    "multi": (lambda f: Krum(f, True), lambda x, before, p, f: x[numpy_krum_order(x, f)[: len(x) - f - 2]].mean(0)),
    "bulyan": (Bulyan, lambda x, before, p, f: numpy_bulyan(x, f)),
    "clip": (lambda f: NormClipping(f, 2.5), lambda x, before, p, f: numpy_clipped(x, before, p, 2.5)),
    "clip-median": (NormClipping, lambda x, before, p, f: numpy_clipped(x, before, p, 0.0)),
}


def as_tensors(x: np.ndarray, count: int) -> dict[str, torch.Tensor]:
    v = torch.from_numpy(x)
    return {"w": v[:6].reshape(2, 3).clone(), "var": v[6:].clone(), "n": torch.tensor(count)}


def as_vector(tensors) -> np.ndarray:
    return np.concatenate([tensors["w"].numpy().ravel(), tensors["var"].numpy()])


def aggregate(rule, x: np.ndarray, before: np.ndarray, weights: np.ndarray):
    strategy = Robust(FedAvg(), rule)
    state = strategy.init(as_tensors(before, 3))
    (order,) = strategy.orders(1, state)
    assert not order.fold, "the rule needs every client's own tensors"
    singles = [Reply(i, int(p), as_tensors(v, 10 + i)) for i, (v, p) in enumerate(zip(x, weights))]
    return strategy.aggregate(1, state, order, Replies(singles, (), order.weighting))


@pytest.mark.parametrize("kind", ORACLES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), f=st.integers(0, 2), more=st.integers(0, 4))
def test_every_rule_is_its_numpy_version(kind, seed, f, more):
    make, oracle = ORACLES[kind]
    rule, draw = make(f), np.random.default_rng(seed)
    n = rule.needs + more
    x, before, weights = draw.normal(size=(n, 10)), draw.normal(size=10), draw.integers(1, 50, n)
    found = aggregate(rule, x, before, weights)
    np.testing.assert_allclose(as_vector(found), oracle(x, before, weights, f), rtol=1e-12, atol=1e-12)
    assert found["n"].dtype == torch.int64
    assert 10 <= int(found["n"]) <= 10 + n - 1


@pytest.mark.parametrize("kind", ORACLES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), f=st.integers(1, 2), size=st.sampled_from([1e3, 1e9, 1e30]), alike=st.booleans())
def test_f_malicious_clients_do_not_move_the_result_away(kind, seed, f, size, alike):
    """Honest updates within 1 of the truth in every coordinate; the others anywhere, alone or in a gang."""
    rule, draw = ORACLES[kind][0](f), np.random.default_rng(seed)
    n = max(rule.needs, 2 * f + 3, 5)
    truth, before = draw.normal(size=10) * 3, np.zeros(10)
    x = truth + draw.uniform(-1, 1, (n, 10))
    bad = draw.choice(n, f, replace=False)
    x[bad] = draw.normal(size=10) * size if alike else draw.normal(size=(f, 10)) * size
    found = as_vector(aggregate(rule, x, before, np.ones(n, int)))
    plain = as_vector(aggregate(TrimmedMean(0), x, before, np.ones(n, int)))
    if kind.startswith("clip"):  # bounds the damage instead of undoing it
        honest = np.delete(x, bad, 0)
        limit = 2.5 if kind == "clip" else np.sqrt((honest**2).sum(1)).max()
        assert np.linalg.norm(found) <= limit + 1e-9
    else:
        assert np.abs(found - truth).max() <= 1
    assert np.abs(plain - truth).max() > 1, "the plain mean is moved"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(ORACLES)))
def test_who_has_which_number_changes_no_bit_of_what_ignores_weights(seed, kind):
    draw = np.random.default_rng(seed)
    x, before, order = draw.normal(size=(7, 10)), draw.normal(size=10), draw.permutation(7)
    rule = ORACLES[kind][0](1)
    found, again = (as_vector(aggregate(rule, v, before, np.ones(7, int))) for v in (x, x[order]))
    if kind in ("median", "trimmed", "krum"):
        assert np.array_equal(found, again)
    # the others add up in another order
    np.testing.assert_allclose(found, again, rtol=1e-12, atol=1e-12)


def test_a_clip_norm_that_nobody_reaches_changes_no_bit():
    draw = np.random.default_rng(0)
    x, before, weights = draw.normal(size=(5, 10)), draw.normal(size=10), np.array([3, 1, 4, 1, 5])
    found = aggregate(NormClipping(1, 1e6), x, before, weights)
    np.testing.assert_allclose(as_vector(found), np.average(x, axis=0, weights=weights), rtol=1e-14)


def test_a_server_optimizer_steps_by_the_median():
    draw = np.random.default_rng(1)
    x, before = draw.normal(size=(5, 10)), draw.normal(size=10)
    strategy = Robust(FedOpt("momentum", eta=0.5, beta1=0.9), Median(1))
    state, velocity, expected = strategy.init(as_tensors(before, 0)), np.zeros(10), before
    for round in (1, 2):
        (order,) = strategy.orders(round, state)
        singles = [Reply(i, 10**i, as_tensors(v * round, 0)) for i, v in enumerate(x)]
        state = strategy.aggregate(round, state, order, Replies(singles, (), order.weighting))
        velocity = 0.9 * velocity + np.median(x * round, axis=0) - expected
        expected = expected + 0.5 * velocity
    np.testing.assert_allclose(as_vector(state), expected, rtol=1e-12)


FEDTINY = {"strategy": "fedtiny", "density": 0.1, "adjust-every": 1, "dev-fraction": 1.0, "dev-passes": 1}
COMPOSED = [
    {"strategy": "fedbn", "aggregation": "trimmed-mean"},
    {"strategy": "fedadam", "aggregation": "krum"},
    {"strategy": "fedhyper-g-cl", "normalization": "local", "aggregation": "multi-krum"},
    {"strategy": "fednova", "aggregation": "median"},
    {"strategy": "fedexp", "aggregation": "median"},
    {**FEDTINY, "aggregation": "median", "pooled-variance": True},
    {**FEDTINY, "aggregation": "bulyan"},
    {**FEDTINY, "normalization": "local", "aggregation": "norm-clipping"},  # one order returns nothing
    {"strategy": "ditto", "aggregation": "norm-clipping"},
]


def seven(dataset):
    """Seven clients of three domains."""
    starts = [dataset.slice(d, "train") for d in dataset.domains]
    parts = [starts[i % 3][i // 3 * 13 : i // 3 * 13 + 13] for i in range(7)]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    base = shards_of(dataset)
    return type(base)(np.concatenate(parts), offsets, (np.arange(7) % 3).astype(np.int16), base.domains)


@pytest.mark.parametrize("algorithm", COMPOSED)
def test_rules_compose_and_a_malicious_client_cannot_blow_the_state_up(dataset, monkeypatch, algorithm):
    hand_over(monkeypatch, 4, scaled(1e6))
    run = Small(dataset, seven(dataset), algorithm=algorithm, training={"lr": 0.02})
    state = run.run(2)
    largest = max(
        float(v.abs().max()) for n, v in state.items() if v.is_floating_point() and v.numel() and "loss" not in n
    )
    assert largest < 1e3, "the plain mean is beyond 1e4"


def accuracy(dataset, strategy: str) -> float:
    run = Small(dataset, seven(dataset), algorithm={"strategy": strategy}, training={"lr": 0.05, "epochs": 2})
    scores = run.federation.evaluate(run.strategy.model(run.run(6)))
    return sum(s.correct for s in scores) / sum(s.examples for s in scores)


@pytest.mark.parametrize("strategy", [n if n == "median" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_one_of_seven_that_turns_its_update_round_does_not_keep_the_rest_from_learning(dataset, monkeypatch, strategy):
    hand_over(monkeypatch, 4, scaled(-20.0))
    assert accuracy(dataset, strategy) > accuracy(dataset, "fedavg") + 0.1


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ({"strategy": "scaffold", "aggregation": "krum"}, "mean of the clients' own"),
        ({"strategy": "feddyn", "aggregation": "median"}, "mean of the clients' own"),
        ({"strategy": "fednova", "aggregation": "norm-clipping"}, "does not bound"),
        ({"strategy": "fedexp", "aggregation": "norm-clipping"}, "does not bound"),
        ({"strategy": "local-only", "aggregation": "median"}, "shares nothing"),
        ({"strategy": "median", "byzantine": -1}, "byzantine = -1"),
        ({"strategy": "norm-clipping", "clip-norm": -1.0}, "clip-norm = -1"),
        ({"strategy": "fedavg", "aggregation": "medain"}, "did you mean 'median'"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(dataset, algorithm, reason):
    with pytest.raises(ConfigError, match=reason):
        Small(dataset, algorithm=algorithm)


@pytest.mark.parametrize(
    ("name", "f", "needs"), [("krum", 1, 5), ("bulyan", 1, 7), ("median", 2, 5), ("bulyan", 3, 15)]
)
def test_too_few_clients_for_the_rule_are_refused(dataset, name, f, needs):
    config = small_config(algorithm={"strategy": name, "byzantine": f})
    with pytest.raises(ConfigError, match=f"needs the updates of {needs} clients, a round has 3"):
        plan(config, (dataset, shards_of(dataset), None))


def test_fewer_replies_than_the_rule_needs_are_refused():
    with pytest.raises(ValueError, match="4 replies, Krum of f = 1 needs 5"):
        Robust(FedAvg(), Krum(1)).aggregate(1, {}, Order(1, {}), Replies([Reply(i, 1, {}) for i in range(4)]))

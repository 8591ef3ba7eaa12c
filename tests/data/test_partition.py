"""Partitions: a disjoint cover, deterministic, what each scheme promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import _shares, partition
from fedsim.errors import ConfigError
from fedsim.random import generator
from tests.data.conftest import Labels

DATA = Labels()
SCHEMES = ["iid", "dirichlet", "shards", "quantity"]


def classes_of(found, data=DATA):
    return [len(set(data.y_train[found[c]].tolist())) for c in range(len(found))]


@settings(max_examples=80, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    clients=st.integers(1, 30),
    seed=st.integers(0, 5),
    across=st.booleans(),
    least=st.integers(0, 6),
    alpha=st.sampled_from([1e-300, 1e-3, 0.05, 0.5, 1e6]),
    power=st.sampled_from([0.0, 1.5, 30.0]),
)
def test_a_disjoint_cover_with_no_client_too_small(scheme, clients, seed, across, least, alpha, power):
    options = {"across": across, "alpha": alpha, "power": power, "min_examples": least, "classes_per_client": 10}
    found = partition(DATA, ["a", "b"], scheme, clients, seed, **options)
    assert len(found) == 2 * clients
    assert np.array_equal(np.sort(found.indices), np.arange(600))
    assert found.sizes.min() >= least
    assert (found.indices.dtype, found.offsets.dtype, found.domain.dtype) == (np.int64, np.int64, np.int16)
    again = partition(DATA, ["a", "b"], scheme, clients, seed, **options)
    assert np.array_equal(found.indices, again.indices)
    assert np.array_equal(found.offsets, again.offsets)
    for client in range(len(found)):
        domains = set(DATA.domain_train[found[client]].tolist())
        assert found.domain[client] == -1 if across else domains <= {int(found.domain[client])}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_is_another_partition(scheme):
    first, second = (partition(DATA, ["b"], scheme, 10, seed).indices for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_domains_are_numbered_in_the_order_asked_for():
    found = partition(DATA, ["b", "a"], "iid", 2)
    assert (found.domains, found.domain.tolist()) == (("b", "a"), [0, 0, 1, 1])
    assert set(DATA.domain_train[found[0]]) == {1}


def test_a_domains_partition_does_not_depend_on_those_after_it():
    alone, both = partition(DATA, ["a"], "dirichlet", 4), partition(DATA, ["a", "b"], "dirichlet", 4)
    assert all(np.array_equal(alone[c], both[c]) for c in range(4))


def test_iid_shares_are_equal():
    assert sorted(partition(DATA, ["a"], "iid", 7).sizes) == [28, 28, 28, 29, 29, 29, 29]  # 200 examples


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_shards_hold_no_more_classes_than_asked_for(classes):
    for seed in range(5):
        found = partition(DATA, ["b"], "shards", 20, seed, classes_per_client=classes)
        assert max(classes_of(found)) <= classes
        assert found.sizes.max() <= 4 * found.sizes.min()


def test_quantity_follows_the_power_law():
    sizes = np.sort(partition(DATA, ["b"], "quantity", 4, power=1.0).sizes)[::-1]
    # 400 / (1 + 1/2 + 1/3 + 1/4) = 192: ranks get 192, 96, 64, 48
    assert sizes.tolist() == [192, 96, 64, 48]


def test_dirichlet_against_numpy():
    """The same generator, ten plain lines: counts of each class at each client, and the members of each share."""
    rows, draw = DATA.slice("b", "train"), generator(3, client=0, purpose="partition")
    rows = rows[draw.permutation(len(rows))]
    shares = [[] for _ in range(6)]
    for label in range(10):
        mine = [r for r in rows if DATA.y_train[r] == label]
        exact = len(mine) * draw.dirichlet([0.3] * 6)
        counts = np.floor(exact).astype(int)
        for client in sorted(range(6), key=lambda c: counts[c] - exact[c])[: len(mine) - counts.sum()]:
            counts[client] += 1
        for client, end in enumerate(np.cumsum(counts)):
            shares[client] += mine[end - counts[client] : end]
    found = partition(DATA, ["b"], "dirichlet", 6, seed=3, alpha=0.3, min_examples=0)
    assert [sorted(found[c].tolist()) for c in range(6)] == [sorted(s) for s in shares]


def test_dirichlet_has_its_variance():
    """Class shares over K clients have variance (1/K)(1 - 1/K) / (K alpha + 1)."""
    data = Labels(60_000, classes=2)
    many = [partition(data, ["b"], "dirichlet", 10, seed, alpha=0.5) for seed in range(40)]
    shares = np.concatenate([[np.sum(data.y_train[p[c]] == 0) for c in range(10)] for p in many])
    expected = 0.1 * 0.9 / (10 * 0.5 + 1)
    assert np.var(shares / np.sum(data.y_train[data.slice("b", "train")] == 0)) == pytest.approx(expected, rel=0.25)


def test_topping_up_takes_from_the_richest():
    plain = partition(DATA, ["b"], "quantity", 6, power=4.0, min_examples=0)
    found = partition(DATA, ["b"], "quantity", 6, power=4.0, min_examples=10)
    assert sorted(plain.sizes)[-1] > 360
    assert sorted(found.sizes) == [10] * 4 + [23, 400 - 63]  # 370, 23, 5, 1, 1, 0 before
    assert np.array_equal(np.sort(found.indices), np.sort(plain.indices))


def test_pooled_is_one_client_with_everything():
    found = partition(DATA, ["a", "b"], "pooled", 7)
    assert (len(found), found.domain.tolist(), len(found[0])) == (1, [-1], 600)
    assert partition(DATA, ["a"], "pooled").domain.tolist() == [0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cap_keeps_the_first_of_every_shuffled_share(scheme):
    whole = partition(DATA, ["a", "b"], scheme, 10, classes_per_client=3, min_examples=4)
    capped = partition(DATA, ["a", "b"], scheme, 10, classes_per_client=3, min_examples=4, examples_per_client=9)
    assert all(np.array_equal(capped[c], whole[c][:9]) for c in range(20))
    # were shares sorted by label or position, a cap would keep the first classes or examples only
    assert np.mean(classes_of(capped)) > 1.4
    assert not any((np.diff(whole[c]) > 0).all() for c in range(20))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_hundred_thousand_clients(scheme):
    data = Labels(600_000)
    found = partition(data, ["a", "b"], scheme, 50_000)
    assert len(found) == 100_000
    assert found.sizes.min() >= 1
    assert np.array_equal(np.sort(found.indices), np.arange(600_000))


@given(st.integers(0, 1000), st.lists(st.floats(0.001, 10), min_size=1, max_size=20))
def test_shares_sum_to_the_total(total, weights):
    counts = _shares(total, np.array(weights))
    assert counts.sum() == total
    assert (np.abs(counts - total * np.array(weights) / sum(weights)) <= 1).all()


@pytest.mark.parametrize(
    ("domains", "scheme", "clients", "options", "expected"),
    [
        (["a", "c"], "iid", 1, {}, "'c' is no domain of labels; it has a, b"),
        (["a", "a"], "iid", 1, {}, "each once"),
        ([], "iid", 1, {}, "expected at least one"),
        (["a"], "iid", 300, {}, "300 clients of at least 1 examples need 300, 'a' of labels has 200"),
        (["a", "b"], "iid", 30, {"min_examples": 10}, "'a' of labels has 200"),
        (["a", "b"], "iid", 301, {"across": True}, "all domains together of labels has 600"),
        (["a"], "dirichet", 1, {}, "did you mean 'dirichlet'"),
        (["a"], "shards", 4, {}, "4 clients of 2 classes cannot hold 10; expected at least 5 clients"),
        (["a"], "iid", 0, {}, "clients-per-domain = 0: expected at least 1"),
        (["a"], "dirichlet", 2, {"alpha": 0.0}, "alpha = 0.0: expected above 0"),
        (["a"], "dirichlet", 2, {"alpha": float("nan")}, "alpha = nan"),
        (["a"], "quantity", 2, {"power": -1.0}, "power = -1.0: expected 0 or above"),
        (["a"], "shards", 9, {"classes_per_client": 0}, "classes-per-client = 0"),
        (["a"], "iid", 2, {"min_examples": 5, "examples_per_client": 3}, "examples-per-client = 3: expected 0"),
    ],
)
def test_refusals(domains, scheme, clients, options, expected):
    with pytest.raises(ConfigError, match=expected):
        partition(DATA, domains, scheme, clients, **options)

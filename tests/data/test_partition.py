"""Partitions: a disjoint cover, deterministic, what each scheme promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import Partition, _shares, hold_out, partition
from fedsim.errors import ConfigError


class Labels:
    """A data set without images: partitions look at labels and domains only."""

    name, domains = "labels", ("a", "b")

    def __init__(self, count: int = 600, classes: int = 10):
        draw = np.random.default_rng(0)
        self.y_train = draw.integers(0, classes, count)
        self.domain_train = (np.arange(count) >= count // 3).astype(np.int16)

    def slice(self, domain, split):
        return np.flatnonzero(self.domain_train == self.domains.index(domain))


DATA = Labels()
SCHEMES = st.sampled_from(["iid", "dirichlet", "shards", "quantity"])


@settings(max_examples=60, deadline=None)
@given(
    SCHEMES, st.integers(1, 30), st.integers(0, 5), st.booleans(), st.integers(1, 4), st.sampled_from([0.05, 0.5, 100])
)
def test_a_disjoint_cover_with_no_client_too_small(scheme, clients, seed, across, least, alpha):
    options = {"across": across, "alpha": alpha, "min_examples": least}
    found = partition(DATA, ["a", "b"], scheme, clients, seed, **options)
    assert len(found) == 2 * clients
    assert np.array_equal(np.sort(found.indices), np.arange(600))
    assert found.sizes.min() >= least
    again = partition(DATA, ["a", "b"], scheme, clients, seed, **options)
    assert np.array_equal(found.indices, again.indices)
    for client in range(len(found)):
        domains = set(DATA.domain_train[found[client]])
        assert found.domain[client] == (-1 if across else domains.pop())


def test_another_seed_is_another_partition():
    assert not np.array_equal(*(partition(DATA, ["a"], "iid", 3, seed).indices for seed in (0, 1)))


def test_shards_hold_few_classes():
    found = partition(DATA, ["b"], "shards", 10, classes_per_client=2)
    # 20 shards of 20 examples cut from 10 classes of about 40: a shard spans at most two of them
    assert max(len(set(DATA.y_train[found[c]])) for c in range(10)) <= 4
    iid = partition(DATA, ["b"], "iid", 10)
    assert min(len(set(DATA.y_train[iid[c]])) for c in range(10)) > 4


def test_quantity_follows_the_power_law():
    sizes = np.sort(partition(DATA, ["b"], "quantity", 4, power=1.0).sizes)[::-1]
    # 400 / (1 + 1/2 + 1/3 + 1/4) = 192: ranks get 192, 96, 64, 48
    assert sizes.tolist() == [192, 96, 64, 48]


def test_dirichlet_is_numpys():
    """Class shares over many clients have Dirichlet(alpha)'s variance: (1/K)(1 - 1/K) / (K alpha + 1)."""
    data = Labels(60_000, classes=2)
    many = [partition(data, ["b"], "dirichlet", 10, seed, alpha=0.5) for seed in range(40)]
    shares = np.concatenate([[np.mean(data.y_train[p[c]] == 0) * len(p[c]) for c in range(10)] for p in many])
    expected = 0.1 * 0.9 / (10 * 0.5 + 1)
    assert np.var(shares / np.sum(data.y_train[data.slice("b", "train")] == 0)) == pytest.approx(expected, rel=0.25)


def test_pooled_is_one_client_with_everything():
    found = partition(DATA, ["a", "b"], "pooled", 7)
    assert (len(found), found.domain.tolist(), len(found[0])) == (1, [-1], 600)


def test_a_hundred_thousand_clients():
    data = Labels(600_000)
    for scheme in ("iid", "dirichlet"):
        found = partition(data, ["a", "b"], scheme, 50_000)
        assert len(found) == 100_000
        assert np.array_equal(np.sort(found.indices), np.arange(600_000))


@given(st.integers(0, 1000), st.lists(st.floats(0.001, 10), min_size=1, max_size=20))
def test_shares_sum_to_the_total(total, weights):
    counts = _shares(total, np.array(weights))
    assert counts.sum() == total
    assert (np.abs(counts - total * np.array(weights) / sum(weights)) <= 1).all()


def test_validation_is_stratified_and_disjoint():
    whole = partition(DATA, ["a", "b"], "iid", 2)
    training, held = hold_out(whole, DATA, 0.2, seed=0)
    for client in range(len(whole)):
        assert sorted([*training[client], *held[client]]) == sorted(whole[client])
        assert len(held[client]) == round(0.2 * len(whole[client]))
        shares = [np.bincount(DATA.y_train[p[client]], minlength=10) / len(p[client]) for p in (training, held)]
        assert np.abs(shares[0] - shares[1]).max() < 0.08


def test_a_client_of_one_example_keeps_it():
    one = Partition(np.array([5]), np.array([0, 1]), np.array([0]), ("a",))
    training, held = hold_out(one, DATA, 0.5, seed=0)
    assert (len(training[0]), len(held[0])) == (1, 0)


@pytest.mark.parametrize(
    ("domains", "clients", "least", "expected"),
    [
        (["a", "c"], 1, 1, "'c' is no domain"),
        (["a", "a"], 1, 1, "each once"),
        (["a"], 300, 1, r"300 clients of at least 1 examples need 300, 'labels' has 200"),
        (["a", "b"], 30, 10, "'a' has 200"),
    ],
)
def test_refusals(domains, clients, least, expected):
    with pytest.raises(ConfigError, match=expected):
        partition(DATA, domains, "iid", clients, min_examples=least)

"""Validation examples: disjoint from training, stratified, a function of (seed, client)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import Partition, hold_out, partition
from fedsim.errors import ConfigError
from tests.data.conftest import Labels

DATA = Labels()


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 60), fraction=st.floats(0, 0.99), seed=st.integers(0, 3), power=st.sampled_from([0.0, 4.0])
)
def test_disjoint_exact_and_never_all(clients, fraction, seed, power):
    whole = partition(DATA, ["a", "b"], "quantity", clients, power=power, min_examples=0)
    training, held = hold_out(whole, DATA, fraction, seed)
    assert len(training) == len(held) == len(whole)
    assert np.array_equal(training.domain, whole.domain)
    for client, size in enumerate(whole.sizes):
        assert sorted([*training[client], *held[client]]) == sorted(whole[client])
        assert len(held[client]) == max(0, min(round(fraction * size), size - 1))


def test_every_class_gives_its_part():
    whole = partition(DATA, ["a", "b"], "dirichlet", 3, alpha=0.3)
    _, held = hold_out(whole, DATA, 0.2, seed=0)
    for client in range(len(whole)):
        every, some = (np.bincount(DATA.y_train[p[client]], minlength=10) for p in (whole, held))
        # every fifth of the examples in the order of their labels: a class gives a fifth, give or take one
        assert np.abs(some - every * len(held[client]) / len(whole[client])).max() < 1


def test_seeds_and_clients_differ_and_others_do_not_matter():
    whole = partition(DATA, ["a", "b"], "iid", 2)
    first, again, other = (hold_out(whole, DATA, 0.3, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)
    alone = Partition(whole[0], whole.offsets[:2], whole.domain[:1], whole.domains)
    assert np.array_equal(hold_out(alone, DATA, 0.3, 0)[1][0], first[0])


def test_a_client_of_one_example_keeps_it():
    one = Partition(np.array([5]), np.array([0, 1]), np.array([0]), ("a",))
    training, held = hold_out(one, DATA, 0.5, seed=0)
    assert (len(training[0]), len(held[0])) == (1, 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_that_make_no_sense(fraction):
    with pytest.raises(ConfigError, match="expected 0 or above and below 1"):
        hold_out(partition(DATA, ["a"]), DATA, fraction, 0)

"""Random numbers: one generator for each (seed, round, client, purpose), and many at once with the same bits."""

import pytest

from fedsim.random import generator, generators


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("round", [-3, 0, 7])
def test_generators_of_many_clients_are_those_of_each(seed, round):
    clients = [-1, 0, 5, 2**20]
    for client, draw in zip(clients, generators(seed, clients, round=round, purpose="batches")):
        alone = generator(seed, round=round, client=client, purpose="batches")
        assert draw.bit_generator.state == alone.bit_generator.state
        assert draw.permutation(50).tolist() == alone.permutation(50).tolist()


@pytest.mark.parametrize("change", [{"seed": 1}, {"round": 2}, {"client": 3}, {"purpose": "client"}])
def test_every_part_of_the_key_matters(change):
    key = {"seed": 0, "round": 1, "client": 2, "purpose": "batches"}
    first, other = generator(**key), generator(**(key | change))
    assert first.integers(2**63) != other.integers(2**63)

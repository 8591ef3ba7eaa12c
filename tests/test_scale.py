"""A million registered clients: the driver holds index arrays, and a round costs what its cohort costs."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedsim.data import Partition
from fedsim.engine import Federation, block_size
from fedsim.pool import InProcess
from fedsim.store import ClientStore
from fedsim.strategy import Strategy
from tests.conftest import Small

CLIENTS, SHARD, COHORT = 1_000_000, 2, 10_000


@pytest.fixture
def federation(dataset) -> Federation:
    """Two examples a client, each example shared by many."""
    indices = np.arange(CLIENTS * SHARD, dtype=np.int64) % 40
    offsets = np.arange(0, CLIENTS * SHARD + 1, SHARD, dtype=np.int64)
    shards = Partition(indices, offsets, np.zeros(CLIENTS, np.int16), dataset.domains[:1])
    small = Small(dataset, model={"name": "logistic"}, training={"batch-size": 2}, simulation={"executor": "vmap"})
    spec = replace(small.spec, shards=shards)
    size = block_size("vmap", COHORT, 4 * 1732)
    return Federation(spec, InProcess(spec), ClientStore(), cohort=COHORT, block=size)


def test_a_round_of_ten_thousand_of_a_million_clients(federation):
    strategy = Strategy()
    state = strategy.init(federation.shared)
    federation.train(strategy.orders(1, state)[0], range(100))  # loads what a first round loads
    tracemalloc.start()  # sees Python's and numpy's memory: whatever there could be of every client
    clients = federation.sample(1)
    replies = federation.train(strategy.orders(1, state)[0], clients)
    strategy.aggregate(1, state, strategy.orders(1, state)[0], replies)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(clients)) == len(replies) == COHORT
    assert not federation.failures
    assert peak < 16 * CLIENTS, "two index arrays at most: an object for every client takes more"

"""Private state is read when its block is trained and staged as results come: a few blocks in memory, the same bits."""

import numpy as np
import pytest
import torch

from fedsim.checkpoint import state_sha256
from fedsim.data import Partition
from fedsim.guard import Policy
from fedsim.packing import Packed
from fedsim.store import ClientStore
from fedsim.types import ClientState
from tests.conftest import Small

CLIENTS, BLOCK = 24, 3  # eight blocks


def federated(dataset, store: ClientStore, **sections) -> Small:
    shards = [dataset.slice(d, "train")[i * 5 : i * 5 + 5] for i in range(CLIENTS // 3) for d in dataset.domains]
    domain = np.tile(np.arange(3, dtype=np.int16), CLIENTS // 3)
    offsets = np.arange(CLIENTS + 1, dtype=np.int64) * 5
    partition = Partition(np.concatenate(shards), offsets, domain, dataset.domains)
    options = {"algorithm": {"strategy": "fedbn"}, "simulation": {"block": BLOCK}, "training": {"batch-size": 5}}
    small = Small(dataset, partition, **{**options, **sections})
    small.federation.store = store
    return small


def test_states_wait_on_disk_and_the_bits_are_the_same(dataset, tmp_path, monkeypatch):
    expected = state_sha256(federated(dataset, ClientStore()).run(3))
    size = sum(v.nbytes for v in federated(dataset, ClientStore()).federation.private.values())
    store = ClientStore(tmp_path / "clients.sqlite", budget=3 * size)  # less than a block's
    small = federated(dataset, store)
    most, stage = 0, store.stage

    def watched(client, round, state):
        nonlocal most
        stage(client, round, state)
        most = max(most, len(store.staged) + len(store.recent))

    monkeypatch.setattr(store, "stage", watched)
    assert state_sha256(small.run(3)) == expected
    assert most <= 6, "the states of the cohort are in memory at once"
    assert store.db.execute("SELECT COUNT(DISTINCT client) FROM states").fetchone() == (CLIENTS,)


def test_a_block_reads_the_states_of_its_clients_alone(dataset):
    small = federated(dataset, ClientStore())
    small.run(1)
    reads, get = [], small.federation.store.get
    small.federation.store.get = lambda client: reads.append(client) or get(client)
    order = small.strategy.orders(2, small.strategy.init(small.federation.shared))[0]
    results = small.federation._results(order, range(CLIENTS))
    next(results)
    assert reads == [*range(BLOCK)]
    next(results)
    assert reads == [*range(2 * BLOCK)]


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_a_void_round_keeps_the_states_that_were(dataset, tmp_path, budget):
    small = federated(dataset, ClientStore(tmp_path / "clients.sqlite", budget=budget))
    small.run(1)
    before = [small.federation.state(c) for c in range(CLIENTS)]
    small.federation.policy = Policy(quorum=2.0)  # never reached
    order = small.strategy.orders(2, small.strategy.init(small.federation.shared))[0]
    small.federation.train(order, range(CLIENTS))
    assert small.federation.void
    after = [small.federation.state(c) for c in range(CLIENTS)]
    assert all(torch.equal(a.private[n], b.private[n]) for a, b in zip(before, after) for n in a.private)
    small.federation.policy = Policy()
    small.federation.train(order, range(CLIENTS))
    now = small.federation.state(0).private
    assert any(not torch.equal(now[n], v) for n, v in before[0].private.items())


def test_what_a_killed_process_staged_is_forgotten(tmp_path):
    path, one = tmp_path / "clients.sqlite", Packed.of(ClientState({"w": torch.ones(3)}, {}))
    killed = ClientStore(path, budget=1)
    killed.stage(0, 1, one)
    assert killed.spilled
    killed.close()
    store = ClientStore(path)
    assert store.get(0) is None
    store.accept()
    assert store.get(0) is None

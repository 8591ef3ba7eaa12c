"""Private state of clients: identity through the file, rewinding, damage."""

import pytest
import torch
from hypothesis import given, settings

from fedsim.errors import DataError
from fedsim.store import ClientStore
from fedsim.types import ClientState
from tests.tensors import identical, named_bits


def state(value: float) -> ClientState:
    odd = torch.tensor([value, -0.0, float("inf")])
    return ClientState({"bn.weight": odd, "n": torch.tensor(3)}, {"beta": torch.tensor(value)})


def same(a: ClientState, b: ClientState) -> bool:
    pairs = [(a.private, b.private), (a.memory, b.memory)]
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def test_a_store_reopened_holds_the_same_bits(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite")
    store.put(7, 1, state(0.25))
    store.flush()
    store.close()
    again = ClientStore(tmp_path / "c.sqlite")
    assert same(again.get(7), state(0.25))
    assert torch.signbit(again.get(7).private["bn.weight"][1])
    assert again.get(8) is None


@settings(max_examples=60, deadline=None)
@given(named_bits(), named_bits())
def test_any_bits_come_back_from_the_file(private, memory):
    store = ClientStore()
    store.put(0, 1, ClientState(private, memory))
    store.flush()
    store.recent.clear()
    found = store.get(0)
    store.close()
    if private or memory:
        assert identical(found.private, private)
        assert identical(found.memory, memory)
    else:
        assert found is None, "nothing is kept of a client that keeps nothing"


def test_rewind_and_prune_keep_what_a_resume_needs(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite")
    for round in (1, 2, 3):
        store.put(0, round, state(round))
        store.flush()
    store.prune(2)
    assert store.db.execute("SELECT COUNT(*) FROM states").fetchone() == (2,)
    store.rewind(2)
    assert same(store.get(0), state(2))


def test_a_small_budget_spills_to_the_file(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite", budget=50)
    for client in range(10):
        store.put(client, 1, state(client))
    assert len(store.recent) < 10
    assert all(same(store.get(c), state(c)) for c in range(10))


def test_a_flipped_bit_is_noticed(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite")
    store.put(0, 1, state(1.0))
    store.flush()
    (data,) = store.db.execute("SELECT data FROM states").fetchone()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    store.db.execute("UPDATE states SET data = ?", (flipped,))
    store.recent.clear()
    with pytest.raises(DataError, match="client 0 of round 1 is damaged"):
        store.get(0)

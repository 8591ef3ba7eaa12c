"""Private state of clients: identity through the file, rewinding, damage."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from fedsim.errors import DataError, StorageError
from fedsim.packing import Packed
from fedsim.store import ClientStore
from fedsim.types import ClientState
from tests.faults.forked import forked
from tests.tensors import identical, named_bits


def state(value: float) -> Packed:
    odd = torch.tensor([value, -0.0, float("inf")])
    return Packed.of(ClientState({"bn.weight": odd, "n": torch.tensor(3)}, {"beta": torch.tensor(value)}))


def same(a: Packed, b: Packed) -> bool:
    pairs = [(a.unpack().private, b.unpack().private), (a.unpack().memory, b.unpack().memory)]
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def test_a_store_reopened_holds_the_same_bits(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite")
    store.put(7, 1, state(0.25))
    store.flush()
    store.close()
    again = ClientStore(tmp_path / "c.sqlite")
    assert same(again.get(7), state(0.25))
    assert torch.signbit(again.get(7).unpack().private["bn.weight"][1])
    assert again.get(8) is None


@settings(max_examples=60, deadline=None)
@given(named_bits(), named_bits())
def test_any_bits_come_back_from_the_file(private, memory):
    store = ClientStore()
    store.put(0, 1, Packed.of(ClientState(private, memory)))
    store.flush()
    store.recent.clear()
    found = store.get(0)
    store.close()
    if private or memory:
        assert identical(found.unpack().private, private)
        assert identical(found.unpack().memory, memory)
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


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_what_an_earlier_process_left_is_pruned(tmp_path, budget):
    """Kept directly or staged, on disk at once or later: a version is dropped when a newer one makes it needless."""
    store = ClientStore(tmp_path / "c.sqlite", budget)
    store.put(0, 1, state(1))
    for round in (1, 2):
        store.flush()
        store.stage(1, round, state(round))
        store.accept()
    store.flush()
    store.put(0, 3, state(3))
    store.flush()
    store.close()
    again = ClientStore(tmp_path / "c.sqlite")
    rows = lambda: again.db.execute("SELECT client, round FROM states ORDER BY client, round").fetchall()  # noqa: E731
    again.prune(2)
    assert rows() == [(0, 1), (0, 3), (1, 2)]
    again.prune(3)
    assert rows() == [(0, 3), (1, 2)]
    assert again.versions == {}


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


def test_a_file_whose_pages_are_damaged_is_named_when_it_is_opened(tmp_path):
    path = tmp_path / "c.sqlite"
    store = ClientStore(path)
    for client in range(400):
        store.put(client, 1, state(float(client)))
    store.flush()
    (page,) = store.db.execute(
        "SELECT rootpage FROM sqlite_master WHERE name LIKE 'sqlite_autoindex_states%'"
    ).fetchone()
    store.close()
    size = 4096  # SQLite's pages
    data = bytearray(path.read_bytes())
    data[(page - 1) * size : page * size] = b"x" * size
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"c\.sqlite: not the private states of a run"):
        ClientStore(path)


def test_a_full_disk_is_one_error_and_no_half_round(tmp_path):
    store = ClientStore(tmp_path / "c.sqlite")
    store.put(0, 1, state(0.5))
    store.flush()
    store.db.execute("PRAGMA max_page_count = 12")  # the file may not grow beyond: SQLITE_FULL, as on a full disk
    for client in range(400):
        store.put(client, 2, state(float(client)))
    with pytest.raises(StorageError, match="cannot be written: database or disk is full"):
        store.flush()
    assert ClientStore(tmp_path / "c.sqlite").get(399) is None
    store.db.execute("PRAGMA max_page_count = 1000000")
    store.flush()
    assert same(ClientStore(tmp_path / "c.sqlite").get(399), state(399.0))


def hundred_thousand(path: Path, clients: int, budget: int) -> None:
    """Two rounds of all clients' states of 4 kB, read again; prints how much memory this took at most, in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = ClientStore(path, budget)
    for round in (1, 2):
        for client in range(clients):
            state = ClientState({"w": torch.full((1000,), float(client + round))}, {})
            store.put(client, round, Packed.of(state))
        store.flush()
        store.prune(round)
    for client in range(clients):
        assert store.get(client).unpack().private["w"][999] == client + 2
    count = store.db.execute("SELECT COUNT(*) FROM states").fetchone()[0]
    assert count == clients, "the first round's were pruned"
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


@pytest.mark.slow
def test_a_hundred_thousand_clients_are_not_all_in_memory(tmp_path):
    clients, budget = 100_000, 8 << 20
    done = forked(hundred_thousand, tmp_path / "c.sqlite", clients, budget, timeout=900)
    assert done.code == 0, done.err
    peak = int(done.out)
    print(f"{clients} states of 4 kB, 400 MB: {peak / 1e6:.0f} MB at most")
    assert peak < 100e6

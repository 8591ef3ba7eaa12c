"""Clients that fail in simulation: named with round and stage, the others count; what does not fit into memory at once
is tried in halves with the same block sum. Workers that die or hang: tests/test_ray_pool.py."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.checkpoint import state_sha256
from fedsim.examples import Examples
from fedsim.fold import Partial
from fedsim.local import run_loop
from fedsim.packing import columns
from fedsim.types import Order, ReplyColumns
from fedsim.worker import EXECUTORS, LAYOUTS
from tests.conftest import Small, shards_of, small_config
from tests.test_guard import events, run
from tests.test_hostile import five


def unreadable(monkeypatch, client: int, rounds: tuple[int, ...] = (1,)) -> None:
    """The examples of a client cannot be read in these rounds."""
    original = Examples.fetcher

    def fetcher(self, seed, round, augment):
        fetch = original(self, seed, round, augment)

        def broken(clients, indices, step):
            if client in clients and round in rounds:
                raise OSError("disk on fire")
            return fetch(clients, indices, step)

        return broken

    monkeypatch.setattr(Examples, "fetcher", fetcher)


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_an_exception_is_recorded_with_client_round_and_stage_and_the_run_goes_on(
    dataset, tmp_path, monkeypatch, executor
):
    sections = {"rounds": 1, "simulation": {"executor": executor, "block": 3}}
    expected = run(dataset, tmp_path / "without", small_config(**sections), shards_of(dataset, (40, 33)))
    unreadable(monkeypatch, 2)
    found = run(dataset, tmp_path / "r", small_config(**sections))
    (event,) = events(tmp_path / "r", "rejected")
    assert (event["round"], event["client"], event["stage"]) == (1, 2, "train")
    assert event["reason"] == "OSError: disk on fire"
    assert "in broken" in event["trace"]
    assert found["left_out"] == {"train": 1}
    assert found["refused_rounds"] == {}, "a failure is no offence"
    if executor == "loop":
        assert found["state_sha256"] == expected["state_sha256"]
    else:
        (narrowed,) = events(tmp_path / "r", "narrowed")
        assert narrowed["clients"] == [0, 1, 2]
        assert found["examples_seen"] == expected["examples_seen"], "it costs nobody else"


def test_in_debugging_it_is_raised_with_client_round_and_stage(dataset, monkeypatch):
    unreadable(monkeypatch, 1)
    with pytest.raises(OSError, match="disk on fire") as caught:
        Small(dataset).run(1)
    assert caught.value.__notes__ == ["in round 1, stage 'train', client 1"]


def limited(monkeypatch, width: int, executor=None, error: Exception | None = None) -> list[int]:
    """Memory for ``width`` clients at once; the list gets the widths that were tried."""
    run_at_once, tried = executor or EXECUTORS["vmap"], []

    def run(task, order, block, lr, fetch):
        tried.append(len(block))
        if len(block) > width:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return run_at_once(task, order, block, lr, fetch)

    monkeypatch.setitem(EXECUTORS, "vmap", run)
    return tried


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_out_of_memory_halves_the_width_and_keeps_the_sum_of_the_block(dataset, monkeypatch, strategy):
    """The block is run as the loop runs it, so that the bits are those of the loop."""
    algorithm = {"strategy": strategy}
    simulation = {"executor": "loop", "block": 5}
    expected = Small(dataset, five(dataset), algorithm=algorithm, simulation=simulation).run(2)
    tried = limited(monkeypatch, 2, run_loop)
    monkeypatch.setitem(LAYOUTS, "vmap", LAYOUTS["loop"])
    small = Small(dataset, five(dataset), algorithm=algorithm, simulation={"executor": "vmap", "block": 5})
    assert state_sha256(small.run(2)) == state_sha256(expected)
    assert tried == [5, 3, 2, 1, 2] * 2
    assert [(what, d["clients"]) for what, d in small.federation.events] == [
        ("narrowed", [0, 1, 2, 3, 4]),
        ("narrowed", [0, 1, 2]),
    ]
    assert small.federation.events[0][1]["reason"] == "OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_vmap_in_halves_agrees_with_vmap_at_once(dataset, monkeypatch, error):
    simulation = {"executor": "vmap", "block": 5}
    at_once = Small(dataset, five(dataset), simulation=simulation).run(2)
    limited(monkeypatch, 3, error=error)
    for name, value in Small(dataset, five(dataset), simulation=simulation).run(2).items():
        torch.testing.assert_close(value, at_once[name], rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_after_training_puts_nobody_into_the_sum_twice(dataset, monkeypatch):
    simulation, columns = {"executor": "vmap", "block": 5}, ReplyColumns

    def scarce(clients, *rest):
        if len(clients) > 2:
            raise MemoryError("no")
        return columns(clients, *rest)

    expected = Small(dataset, five(dataset), simulation=simulation)
    small = Small(dataset, five(dataset), simulation=simulation)
    order = Order(1, small.federation.shared, fold=True)
    (whole,) = expected.federation.train(order, range(5)).partials
    monkeypatch.setattr("fedsim.worker.ReplyColumns", scarce)
    (found,) = small.federation.train(order, range(5)).partials
    assert [what for what, _ in small.federation.events] == ["narrowed", "narrowed"]
    assert found.weight == whole.weight
    for name, value in found.sums().items():
        torch.testing.assert_close(value, whole.sums()[name], rtol=1e-4, atol=1e-3)


def test_states_that_do_not_fit_into_memory_at_once_are_tried_in_halves(dataset, monkeypatch):
    sections = {"algorithm": {"strategy": "scaffold"}, "simulation": {"executor": "vmap", "block": 5}}
    expected = Small(dataset, five(dataset), **sections).run(2)

    def scarce(packed, device):
        if len(packed) > 3:
            raise MemoryError("no")
        return columns(packed, device)

    monkeypatch.setattr("fedsim.vectorized.columns", scarce)
    small = Small(dataset, five(dataset), **sections)
    for name, value in small.run(2).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert [(what, d["clients"]) for what, d in small.federation.events] == [("narrowed", [0, 1, 2, 3, 4])]


@pytest.mark.parametrize("block", [1, 5])
def test_a_client_whose_tensors_cannot_be_kept_costs_nobody_else(dataset, monkeypatch, block):
    sections = {"simulation": {"executor": "loop", "block": block}}
    small, others = Small(dataset, five(dataset), **sections), Small(dataset, five(dataset), **sections)
    small.federation.pool.worker.spec = replace(small.spec, debug=False)
    order = Order(1, small.federation.shared)
    calls, own = [], Partial.own

    def failing(self):
        calls.append(self)
        if len(calls) == 1:
            raise MemoryError
        own(self)

    monkeypatch.setattr(Partial, "own", failing)
    found = small.federation.train(order, range(5)).mean(order.shared)
    assert [f.client for f in small.federation.failures] == [0]
    assert state_sha256(found) == state_sha256(others.federation.train(order, range(1, 5)).mean(order.shared))


def test_a_client_that_alone_is_too_much_is_given_up(dataset, monkeypatch):
    tried = limited(monkeypatch, 0)
    small = Small(dataset, five(dataset), simulation={"executor": "vmap", "block": 5})
    small.federation.pool.worker.spec = replace(small.spec, debug=False)
    assert len(small.federation.train(Order(1, small.federation.shared), range(5))) == 0
    assert sorted(tried, reverse=True) == [5, 3, 2, 2, 1, 1, 1, 1, 1]
    assert [(f.client, f.stage) for f in small.federation.failures] == [(c, "train") for c in range(5)]


REAL = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.conftest import Small, shards_of, small_dataset

def run(limit):
    dataset = small_dataset(Path(sys.argv[1]) / str(limit), shape=(3, 320, 320), per_domain=40)
    base = shards_of(dataset)
    offsets = np.arange(65, dtype=np.int64)
    shards = type(base)(np.arange(64) % 40, offsets, np.zeros(64, np.int16), base.domains)
    small = Small(dataset, shards, model={"name": "logistic"}, training={"batch-size": 1, "lr": 0.001},
                  simulation={"executor": "vmap", "block": 64})
    if limit:
        used = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmSize"))) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    return small, small.run(1)

free, expected = run(0)
tight, found = run(int(sys.argv[2]))
assert not free.federation.events
for name in found:
    np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-4, atol=1e-6)
for what, details in tight.federation.events:
    print(what, len(details["clients"]), details["reason"].splitlines()[0])
"""


@pytest.mark.slow
def test_memory_that_really_runs_out(tmp_path):
    """64 models of 1.2 million parameters at once need 0.3 GB and their gradients as much again; there are 0.5 GB."""
    command = [sys.executable, "-c", REAL, str(tmp_path), str(500 * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("narrowed 64 ")
    assert "alloc" in done.stdout or "MemoryError" in done.stdout


@pytest.mark.slow
def test_a_time_limit_that_nobody_keeps_ends_a_run_with_the_cause(dataset, tmp_path):
    from fedsim.errors import FedsimError

    simulation = {"workers": 2, "time-limit": 0.001, "retries": 0}
    with pytest.raises(FedsimError, match=r"no usable update in 3 rounds in a row: still training after 0.001 s"):
        run(dataset, tmp_path / "r", small_config(rounds=5, simulation=simulation))
    found = events(tmp_path / "r", "rejected")
    assert [(e["round"], e["client"], e["stage"]) for e in found] == [
        (r, c, "time") for r in (1, 2, 3) for c in (0, 1, 2)
    ]
    assert json.loads((tmp_path / "r" / "events.jsonl").read_text().splitlines()[-1])["event"] == "void"


def slow(monkeypatch, client: int, seconds: float) -> None:
    """The examples of a client's first step take so long."""
    original = Examples.fetcher

    def fetcher(self, seed, round, augment):
        fetch = original(self, seed, round, augment)

        def late(clients, indices, step):
            if client in clients and step == 0:
                time.sleep(seconds)
            return fetch(clients, indices, step)

        return late

    monkeypatch.setattr(Examples, "fetcher", fetcher)


def test_a_client_out_of_time_is_left_out_and_the_others_of_its_block_go_on(dataset, tmp_path, monkeypatch):
    sections = {"rounds": 1, "simulation": {"block": 3, "executor": "loop"}}
    expected = run(dataset, tmp_path / "without", small_config(**sections), shards_of(dataset, (40, 33)))
    slow(monkeypatch, 2, 1.1)
    sections["simulation"]["time-limit"] = 1.0
    found = run(dataset, tmp_path / "r", small_config(**sections))
    (event,) = events(tmp_path / "r", "rejected")
    assert (event["round"], event["client"], event["stage"]) == (1, 2, "time")
    assert event["reason"] == "still training after 1 s"
    assert found["left_out"] == {"time": 1}
    assert found["refused_rounds"] == {}, "slowness is no offence"
    assert found["state_sha256"] == expected["state_sha256"]


def test_under_vmap_a_block_has_the_time_of_its_clients_together(dataset, tmp_path, monkeypatch):
    slow(monkeypatch, 1, 2.1)
    simulation = {"executor": "vmap", "block": 2, "time-limit": 1.0}
    found = run(dataset, tmp_path / "r", small_config(rounds=1, simulation=simulation))
    reasons = [(e["client"], e["stage"], e["reason"]) for e in events(tmp_path / "r", "rejected")]
    assert reasons == [(c, "time", "still training after 2 s, for 2 clients at once") for c in (0, 1)]
    assert not events(tmp_path / "r", "narrowed"), "fewer at once take no less time"
    assert found["left_out"] == {"time": 2}


def test_a_time_limit_that_nobody_reaches_changes_no_number(dataset):
    limited = Small(dataset, simulation={"time-limit": 1000.0})
    limited.federation.pool.worker.spec = replace(limited.spec, time_limit=1000.0)
    assert state_sha256(limited.run(2)) == state_sha256(Small(dataset).run(2))


def test_a_client_whose_loss_is_nan_is_named(dataset, monkeypatch):
    images = Examples.batch

    def batch(self, split, indices):
        x, y = images(self, split, indices)
        return (x * np.nan, y) if split == "train" and 0 in indices else (x, y)

    monkeypatch.setattr(Examples, "batch", batch)
    small = Small(dataset)
    replies = small.federation.train(Order(1, small.federation.shared), [0, 1, 2])
    (failure,) = small.federation.failures
    assert [r.client for r in replies.singles] == [1, 2]
    assert (failure.client, failure.stage) == (0, "update")
    assert "not finite" in failure.reason

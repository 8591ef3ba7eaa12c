"""Ray actors: one that is killed is replaced, and its block repeated with the same bits."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fedsim.checkpoint import state_sha256
from fedsim.config import load_config
from fedsim.errors import ConfigError, FedsimError
from fedsim.plugin import Plugin
from fedsim.pool import InProcess, Pool, WorkerLost
from fedsim.run import run
from fedsim.types import Order
from tests.conftest import Small, nine, shards_of
from tests.faults.place import CONFIG, write_tree


class SignalOnce(Plugin):
    """Sends a signal to the process it trains in, the first time or every time."""

    def __init__(self, marker: Path, always: bool = False, number: int = signal.SIGKILL):
        self.marker, self.always, self.parent, self.number = marker, always, os.getpid(), number

    def begin(self, model, order):
        if os.getpid() != self.parent and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), self.number)


def with_plugin(small: Small, plugin: Plugin) -> None:
    object.__setattr__(small.task, "plugins", (*small.task.plugins, plugin))


def test_a_run_that_does_not_get_its_workers_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    write_tree(tmp_path / "tree", per_class=3)
    (tmp_path / "c.toml").write_text(CONFIG.format(root=tmp_path / "tree", strategy="fedavg"))
    config = load_config(tmp_path / "c.toml", ["simulation.workers=1", 'simulation.address="127.0.0.1:1"'])
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def ray_session():
    from fedsim.ray_session import session

    with session(2):
        yield


POOLS: list[Pool] = []


@pytest.fixture(autouse=True)
def closed():
    """After a test that fails, too: the next one waits for the workers' CPUs."""
    yield
    while POOLS:
        POOLS.pop().close()


def pool_for(small: Small, retries: int = 2, limit: float = 0.0):
    from fedsim.ray_pool import RayPool

    POOLS.append(RayPool(small.spec, 2, retries=retries, limit=limit))
    small.federation.pool = POOLS[-1]
    return small.federation.pool


def test_the_initial_model_does_not_stay_in_the_store(dataset, ray_session):
    import ray
    from ray._private.internal_api import node_stats

    small = Small(dataset)
    small.task.model.register_buffer("ballast", torch.zeros(1 << 20), persistent=False)
    ray.wait(list(pool_for(small).workers.starting), num_returns=2)
    small.run(2)
    (node,) = ray.nodes()

    def used() -> int:
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
        return stats.store_stats.object_store_bytes_used

    end = time.monotonic() + 30
    while used() > 1 << 20 and time.monotonic() < end:
        time.sleep(0.1)
    assert used() <= 1 << 20


def test_a_killed_worker_is_replaced_and_the_block_repeated(dataset, ray_session, tmp_path):
    expected = state_sha256(Small(dataset).run(1))
    small = Small(dataset)
    with_plugin(small, SignalOnce(tmp_path / "killed"))
    pool_for(small)
    assert state_sha256(small.run(1)) == expected
    assert small.federation.retried == 1
    ((what, details),) = small.federation.events
    assert what == "retried"
    assert "its worker died" in details["reason"]


def test_a_block_that_kills_every_worker_is_given_up(dataset, ray_session, tmp_path):
    small = Small(dataset)
    with_plugin(small, SignalOnce(tmp_path / "killed", always=True))
    pool_for(small, retries=1)
    assert not small.federation.train(Order(1, small.federation.shared), [0]).singles
    (failure,) = small.federation.failures
    assert (failure.client, failure.stage) == (0, "worker")
    assert "died 2 times" in failure.reason


def test_a_worker_that_hangs_is_replaced_and_the_block_repeated(dataset, ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.ray_pool.GRACE", 3.0)
    expected = state_sha256(Small(dataset).run(1))
    small = Small(dataset)
    with_plugin(small, SignalOnce(tmp_path / "stopped", number=signal.SIGSTOP))
    pool = pool_for(small, limit=3.0)
    assert state_sha256(small.run(1)) == expected
    ((what, details),) = small.federation.events
    assert (what, len(details["clients"]), details["reason"]) == ("retried", 1, "no result within 6 s")
    for _, process in pool.workers.processes:
        status = Path(f"/proc/{process}/status")
        with suppress(OSError):  # it is gone
            assert "stopped" not in status.read_text(), "nobody is left behind"


class Slow(Plugin):
    """A client of so many steps takes a second for each."""

    def __init__(self, steps: int):
        self.steps = steps

    def update(self, grads, state, params, view):
        if view.steps == self.steps:
            time.sleep(1)
        return grads, state


def test_a_client_out_of_time_is_left_out_and_the_others_of_its_block_go_on(dataset, ray_session):
    shards, simulation = shards_of(dataset, (40, 16, 24)), {"block": 3}
    without = Small(dataset, shards, simulation=simulation)
    replies = without.federation.train(order := Order(1, without.federation.shared, fold=True), [1, 2])
    small = Small(dataset, shards, simulation=simulation)
    with_plugin(small, Slow(5))  # steps of the first: 40 examples in batches of 8
    small.spec = replace(small.spec, time_limit=2.5)
    pool_for(small, limit=2.5)
    found = small.federation.train(order, [0, 1, 2])
    (failure,) = small.federation.failures
    assert (failure.client, failure.stage, failure.reason) == (0, "time", "still training after 2.5 s")
    assert [r.client for r in found.singles] == [1, 2]
    assert small.federation.retried == 0
    assert state_sha256(found.mean(order.shared)) == state_sha256(replies.mean(order.shared))


class Stopped:
    """A forward hook that stops a worker as it scores, the first time or every time."""

    def __init__(self, marker: Path, always: bool = False):
        self.marker, self.always, self.parent = marker, always, os.getpid()

    def __call__(self, model, inputs):
        if not model.training and os.getpid() != self.parent and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
def test_scoring_that_hangs_is_repeated(dataset, ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.ray_pool.GRACE", 4.0)
    expected = Small(dataset).federation
    small = Small(dataset)
    small.task.model.register_forward_pre_hook(Stopped(tmp_path / "stopped"))
    pool = pool_for(small, limit=1.0)
    shared = small.federation.shared
    assert small.federation.evaluate(shared) == expected.evaluate(shared)
    assert [reason for _, reason in pool.retried] == ["no result within 5 s"]


@pytest.mark.slow
def test_scoring_that_hangs_every_time_ends_with_a_message(dataset, ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.ray_pool.GRACE", 2.0)
    small = Small(dataset)
    small.task.model.register_forward_pre_hook(Stopped(tmp_path / "stopped", always=True))
    pool_for(small, retries=1, limit=1.0)
    with pytest.raises(FedsimError, match=r"no result within 3 s, 2 times; raise simulation\.time-limit"):
        small.federation.evaluate(small.federation.shared)


class Sleepy(Plugin):
    """A client of so many steps never ends."""

    def __init__(self, steps: int):
        self.steps, self.parent = steps, os.getpid()

    def start(self, params, view):
        if os.getpid() != self.parent and view.steps == self.steps:
            time.sleep(1000)
        return {}


@pytest.mark.slow
def test_a_block_that_hangs_every_time_is_given_up_and_the_others_count(dataset, ray_session, monkeypatch):
    monkeypatch.setattr("fedsim.ray_pool.GRACE", 1.0)
    small = Small(dataset, shards_of(dataset, (40, 16)), simulation={"block": 1})
    with_plugin(small, Sleepy(5))  # steps of the first: 40 examples in batches of 8
    pool_for(small, retries=1, limit=1.0)
    replies = small.federation.train(Order(1, small.federation.shared), [0, 1])
    assert [r.client for r in replies.singles] == [1]
    (failure,) = small.federation.failures
    assert (failure.client, failure.stage, failure.reason) == (0, "time", "no result within 2 s, 2 times")
    assert small.federation.retried == 1
    again = small.federation.train(Order(1, small.federation.shared), [1])
    assert len(again) == 1, "the workers are as good as new"


@pytest.mark.slow
def test_workers_that_die_as_they_start_end_the_run_with_a_message(dataset, ray_session):
    small = Small(dataset)

    class Unborn:
        def __reduce__(self):
            return os._exit, (1,)

    object.__setattr__(small.spec, "dataset", Unborn())
    pool = pool_for(small, retries=1)
    with pytest.raises(FedsimError, match="2 workers in a row died as they started"):
        list(pool.map("train", None, [([],)]))


def test_evaluation_modes_give_the_same_scores_in_rays_workers(dataset, ray_session):
    modes = "own,mean,reestimated,unmix-tns"
    small = Small(dataset, algorithm={"strategy": "fedbn"}, evaluation={"modes": modes})
    state = small.run(1)
    expected = {m: small.federation.evaluate_mode(state, m) for m in small.spec.modes}
    pool_for(small)
    assert {m: small.federation.evaluate_mode(state, m) for m in small.spec.modes} == expected


@pytest.mark.parametrize(("model", "small"), [("logistic", True), ("small-cnn", False)])
def test_a_small_model_goes_with_the_calls_and_has_the_same_bits(dataset, ray_session, model, small):
    sections = {"model": {"name": model}, "simulation": {"executor": "vmap", "block": 1}}
    alone, there = Small(dataset, **sections), Small(dataset, **sections)
    pool = pool_for(there)
    assert pool.small is small
    state = there.run(2)
    assert state_sha256(state) == state_sha256(alone.run(2))
    assert there.federation.evaluate(state) == alone.federation.evaluate(state)


class KillsLater(Plugin):
    """Kills the worker that begins for so many times, workers counted together: twice a block."""

    def __init__(self, count: Path, number: int):
        self.count, self.number, self.parent = count, number, os.getpid()

    def begin(self, model, order):
        if os.getpid() != self.parent:
            with self.count.open("a") as file:
                file.write(".")
            if self.count.stat().st_size == self.number:
                os.kill(os.getpid(), signal.SIGKILL)


class KillsLast(Plugin):
    """The last of ``nine_clients``, which alone has one step, kills its worker."""

    def __init__(self):
        self.parent = os.getpid()

    def start(self, params, view):
        if os.getpid() != self.parent and view.steps == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


class LosesLast(InProcess):
    """What is left if the last client's block kills every worker."""

    def map(self, method, common, calls, **options):
        for number, result in super().map(method, common, calls, **options):
            yield number, WorkerLost("its worker died 2 times") if number == len(calls) - 1 else result


@pytest.fixture
def large(monkeypatch):
    """Every model counts as large, two workers as many, and sums are added two at a time."""
    monkeypatch.setattr("fedsim.ray_sums.MANY", 2)
    monkeypatch.setattr("fedsim.fold.LARGE", 0)
    monkeypatch.setattr("fedsim.fold.FAN", 2)


# The wide layers of the second are sums of updates, and the orders' tensors are added to those in the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "block", "begun", "sums"), [("small-cnn", 1, 15, (48, 48, 8)), ("mcmahan-cnn", 3, 7, (60, 44))]
)
def test_a_large_models_sums_are_added_apart_with_the_same_bits_though_workers_and_adders_are_killed(
    dataset, ray_session, tmp_path, monkeypatch, large, model, block, begun, sums
):
    from fedsim.ray_sums import Adders, _Adder

    expected = state_sha256(nine(dataset, model, block).run(2))
    killed, taken, take = tmp_path / "killed", [], Adders.take

    class Killed(_Adder):
        def add(self, *sums):
            if not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().add(*sums)

    def taking(adders, partial):
        taken.append(take(adders, partial))
        return taken[-1]

    monkeypatch.setattr("fedsim.ray_sums._Adder", Killed)
    monkeypatch.setattr(Adders, "take", taking)
    small = nine(dataset, model, block)
    with_plugin(small, KillsLater(tmp_path / "begun", begun))
    pool_for(small)
    (order,) = small.strategy.orders(1, state := small.strategy.init(small.federation.shared))
    state = small.strategy.aggregate(1, state, order, small.federation.train(order, range(9)))
    assert small.federation.retried == (1 if block == 1 else 2), "of a block that came late"
    assert killed.exists()
    (order,) = small.strategy.orders(2, state)
    state = small.strategy.aggregate(2, state, order, small.federation.train(order, range(9)))
    assert state_sha256(state) == expected
    # Nine blocks, two at a time: four pairs and one; of the pairs two and two, of these one pair. Four: two pairs.
    assert [partial.weight for partial in taken] == [*sums] * 2


@pytest.mark.slow
@pytest.mark.parametrize("fail", [partial(os._exit, 1), partial(time.sleep, 1000)], ids=["dies", "hangs"])
def test_sums_that_are_lost_are_made_again_and_a_block_that_kills_every_worker_is_left_out(
    dataset, ray_session, monkeypatch, large, fail
):
    class Failing:
        def add(self, *sums):
            fail()

    monkeypatch.setattr("fedsim.ray_sums._Adder", Failing)
    monkeypatch.setattr("fedsim.ray_sums.PATIENCE", 15.0)
    expected, small = nine(dataset, pool=LosesLast), nine(dataset)
    with_plugin(small, KillsLast())
    pool_for(small, retries=1)
    assert state_sha256(small.run(1)) == state_sha256(expected.run(1))
    assert [(f.client, f.stage) for f in small.federation.failures] == [(8, "worker")]
    lost, died = small.federation.events
    assert "the sum of some blocks is lost" in lost[1]["reason"]
    assert (len(lost[1]["clients"]), died[1]["clients"], small.federation.retried) == (9, [8], 9)


def test_more_than_the_machine_has_is_refused(dataset, ray_session):
    from fedsim.ray_pool import RayPool

    with pytest.raises(ConfigError, match="Ray found 2 and 0: lower workers, threads"):
        RayPool(Small(dataset).spec, 2, gpus=0.5)

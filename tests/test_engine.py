"""The engine: one result on any number of workers, vmap against the loop, what leaves a client and what does not."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.grid import SimulationGrid
from fedsim.pool import InProcess, WorkerLost
from fedsim.registry import parts, presets
from fedsim.types import Order
from fedsim.wire import to_tensors
from fedsim.worker import Worker
from strategies import FedAvg
from tests.conftest import Small, nine

PUBLIC = {"federation": {"public-per-class": 1}}  # for methods that score weights on the server
STRATEGIES = [name for name in presets() if name != "centralised"]
THREE = {name: {"byzantine": 0} for name in ("krum", "multi-krum", "bulyan")}  # of three clients none can be malicious


@pytest.fixture(scope="module")
def ray_session():
    from fedsim.ray_session import session

    with session(3):
        yield


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("executor", "strategy"),
    [
        ("loop", "fedavg"),
        ("loop", "fedbn"),
        ("vmap", "fedbn"),
        *(
            pytest.param(executor, strategy, marks=pytest.mark.slow)
            for executor in ("loop", "vmap")
            for strategy in ("fedwon", "fedtiny", "fedhyper-g-cl", "fedins")
        ),
    ],
)
def test_one_hash_for_any_number_of_workers(dataset, ray_session, workers, strategy, executor):
    from fedsim.ray_pool import RayPool

    pool = lambda spec: RayPool(spec, workers)  # noqa: E731
    sections = {"algorithm": {"strategy": strategy}, "simulation": {"executor": executor, "block": 2}}
    alone = state_sha256(Small(dataset, **sections).run(2))
    small = Small(dataset, pool=pool, **sections)
    found = state_sha256(small.run(2))
    small.federation.pool.close()
    assert found == alone


@pytest.mark.parametrize(
    ("key", "workers"), [("odd-block-threads", 1), ("odd-block-threads", 2), ("odd-block-threads", 3), ("threads", 1)]
)
def test_threads_follow_the_configuration_not_the_workers(dataset, ray_session, key, workers):
    from fedsim.ray_pool import RayPool

    pool = lambda spec: RayPool(spec, workers)  # noqa: E731
    sections = {"simulation": {"block": 1, key: 2}}
    small = Small(dataset, pool=pool, **sections)
    found = state_sha256(small.run(2))
    small.federation.pool.close()
    assert found == state_sha256(Small(dataset, **sections).run(2))


@pytest.mark.parametrize(
    ("threads", "odd", "block", "expected"),
    [(1, 2, 1, [1, 1, 2]), (1, 2, 2, [1, 1]), (1, 2, 3, [2]), (2, 1, 1, [2, 2, 2]), (2, 3, 1, [2, 2, 3])],
)
def test_a_block_has_its_threads(dataset, monkeypatch, threads, odd, block, expected):
    seen, train, evaluate = [], Worker._train, Worker._evaluate

    def spy(method):
        def spied(*arguments):
            seen.append(torch.get_num_threads())
            return method(*arguments)

        return spied

    monkeypatch.setattr(Worker, "_train", spy(train))
    monkeypatch.setattr(Worker, "_evaluate", spy(evaluate))
    small = Small(dataset, simulation={"block": block, "threads": threads, "odd-block-threads": odd})
    state = small.run(1)
    assert seen == expected
    small.federation.evaluate(state)
    assert set(seen[len(expected) :]) == {threads}
    assert torch.get_num_threads() == 1


def test_workers_have_a_cpu_for_each_thread(dataset, ray_session):
    from fedsim.ray_pool import RayPool

    spec = Small(dataset, simulation={"threads": 2}).spec
    with pytest.raises(ConfigError, match=r"2 workers .* need 4 CPUs and 0 GPUs; Ray found 3 and 0"):
        RayPool(spec, 2)


def with_dropout(pool):
    """A pool whose clients train the model with dropout after each activation."""

    def make(spec):
        for module in [m for m in spec.task.model.modules() if not isinstance(m, torch.nn.ReLU)]:
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ReLU):
                    setattr(module, name, torch.nn.Sequential(child, torch.nn.Dropout(0.3)))
        return pool(spec)

    return make


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_what_a_model_draws_does_not_depend_on_the_workers(dataset, ray_session, executor):
    from fedsim.ray_pool import RayPool

    sections = {"simulation": {"executor": executor, "block": 1}}
    alone, backwards = (
        state_sha256(Small(dataset, pool=with_dropout(p), **sections).run(4)) for p in (InProcess, Backwards)
    )
    assert backwards == alone != state_sha256(Small(dataset, **sections).run(4))
    for workers in (1, 2):
        small = Small(dataset, pool=with_dropout(lambda spec, workers=workers: RayPool(spec, workers)), **sections)
        found = state_sha256(small.run(4))
        small.federation.pool.close()
        assert found == alone


def test_another_seed_gives_other_numbers(dataset):
    assert state_sha256(Small(dataset, seed=0).run(1)) != state_sha256(Small(dataset, seed=1).run(1))


class Backwards(InProcess):
    """Results in the opposite order of the calls."""

    def map(self, method, common, calls, **options):
        yield from reversed(list(super().map(method, common, calls, **options)))


@pytest.mark.parametrize("executor", ["loop", "vmap"])
def test_the_order_of_arrival_changes_no_bit(dataset, executor):
    sections = {"simulation": {"executor": executor, "block": 1}}
    forwards = Small(dataset, **sections).run(2)
    assert state_sha256(Small(dataset, pool=Backwards, **sections).run(2)) == state_sha256(forwards)


def test_a_large_models_sums_are_a_trees_whatever_their_order_of_arrival_and_on_flowers_loop(dataset, monkeypatch):
    chain = state_sha256(nine(dataset).run(2))
    monkeypatch.setattr("fedsim.fold.LARGE", 0)
    monkeypatch.setattr("fedsim.fold.FAN", 2)
    expected = state_sha256(nine(dataset).run(2))
    assert expected != chain, "nine sums are added two at a time"
    assert state_sha256(nine(dataset, pool=Backwards).run(2)) == expected
    small = nine(dataset)
    grid = SimulationGrid(small.federation)
    result = FedAvg().start(grid, grid.initial_arrays(), num_rounds=2)
    assert state_sha256(to_tensors(result.arrays)) == expected


def arriving(order):
    """A pool whose results come in this order."""

    class Arriving(InProcess):
        def map(self, method, common, calls, **options):
            results = list(super().map(method, common, calls, **options))
            yield from (results[i] for i in order) if len(results) == len(order) else results

    return Arriving


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(3)), st.sampled_from(["fedavg", "fedbn", "scaffold", "fedadam", "median", "fedtiny"]))
def test_any_order_of_arrival_gives_the_same_bits(dataset, order, strategy):
    sections = {"algorithm": {"strategy": strategy}, "simulation": {"block": 1}}
    found, expected = Small(dataset, pool=arriving(order), **sections), Small(dataset, **sections)
    assert state_sha256(found.run(2)) == state_sha256(expected.run(2))
    for client in range(3):
        mine, theirs = found.federation.state(client), expected.federation.state(client)
        assert state_sha256(mine.private) == state_sha256(theirs.private)
        assert state_sha256(mine.memory) == state_sha256(theirs.memory)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vmap_agrees_with_the_loop(dataset, strategy):
    # In float64: BatchNorm makes the gradient of the bias before it pure rounding error, by whose size an adaptive rule
    # divides, and a ReLU fed with a pruned channel sees nothing else.
    training = {"lr": 0.02, "dtype": "float64"}
    sections = {"algorithm": {"strategy": strategy, **THREE.get(strategy, {})}, "training": training, **PUBLIC}
    agree(*(Small(dataset, **sections, simulation={"executor": e}) for e in ("loop", "vmap")))


def test_vmap_agrees_with_the_loop_in_float32(dataset):
    sections = {"training": {"lr": 0.02}, "model": {"norm": "gn"}}
    agree(*(Small(dataset, **sections, simulation={"executor": e}) for e in ("loop", "vmap")))


@pytest.mark.parametrize("training", [{"momentum": 0.9, "weight-decay": 0.01}, {"optimizer": "adam", "lr": 0.001}])
def test_vmap_agrees_with_the_loop_under_every_optimizer(dataset, training):
    # Without BatchNorm: it makes the gradient of the bias before it pure rounding error, and Adam divides by its size.
    sections = {"training": training, "model": {"norm": "none"}}
    agree(*(Small(dataset, **sections, simulation={"executor": e}) for e in ("loop", "vmap")))


def agree(loop: Small, vmap: Small, rounds: int = 3, tolerance: float = 1e-4) -> None:
    """Server state and every client's private state agree, relative to the tensor's size."""
    a, b = loop.run(rounds), vmap.run(rounds)
    assert a.keys() == b.keys()
    pairs = [(n, a[n], b[n]) for n in a]
    for client in range(len(loop.federation)):
        mine, theirs = loop.federation.state(client), vmap.federation.state(client)
        pairs += [(n, mine.private[n], theirs.private[n]) for n in mine.private]
    for name, x, y in pairs:
        x, y = x.double(), y.double()
        assert (x - y).norm() <= tolerance * max(x.norm(), 1e-2), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_private_tensors_never_appear_in_a_message(dataset, strategy):
    small = Small(dataset, algorithm={"strategy": strategy, **THREE.get(strategy, {})}, **PUBLIC)
    private = small.task.private
    state = small.strategy.init(small.federation.shared)
    for round in (1, 2):
        for order in small.strategy.orders(round, state):
            assert not private & order.shared.keys()
            assert not private & order.extra.keys()
            results = small.federation.train_blocks(Order(round, order.shared, fold=False), [0, 1, 2])
            for reply in (r for result in results for r in result.replies):
                assert not private & reply.shared.keys()
                assert not private & reply.report.keys()
            state = small.strategy.aggregate(round, state, order, small.federation.train(order, [0, 1, 2]))
        assert not private & state.keys()


def test_fedavg_is_the_weighted_numpy_mean_running_statistics_included(dataset):
    small = Small(dataset)
    order = Order(1, small.federation.shared, fold=False)
    replies = small.federation.train(order, [0, 1, 2])
    mean = small.strategy.aggregate(1, small.federation.shared, order, replies)
    weights = [40, 33, 37]  # the shards' sizes
    statistics = [n for n, k in small.task.kinds.items() if k == "stats"]
    assert statistics
    for name in [*statistics, *small.task.trainable]:
        stacked = np.stack([r.shared[name].double().numpy() for r in replies.singles])
        np.testing.assert_allclose(
            mean[name].numpy(), np.average(stacked, axis=0, weights=weights), rtol=1e-6, atol=1e-7
        )
    counters = [n for n, k in small.task.kinds.items() if k == "counter"]
    assert all(mean[n].dtype == torch.int64 for n in counters)


@pytest.mark.parametrize("normalization", sorted(parts("normalization")))
def test_the_loop_is_plain_torch(dataset, normalization):
    """Client 1's first round, written out with a module, torch.optim and the batch plan."""
    from fedsim.batches import batch_plan
    from fedsim.build import task_of

    clipping = {"agc": 0.0} if normalization == "standardized-weights" else {}
    small = Small(dataset, algorithm={"normalization": normalization, **clipping})
    order = Order(1, small.federation.shared, fold=False)
    (reply,) = small.federation.train(order, [1]).singles
    model = task_of(small.config, small.parts, 4, dataset.shape).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = batch_plan(small.shards[1][None], [1], batch_size=8, smallest=small.task.smallest_batch, seed=0, round=1)
    for (batch,) in plan:
        x = torch.from_numpy(dataset.x_train[batch]).float() / 255
        x = (x - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.from_numpy(dataset.y_train[batch])).backward()
        optimizer.step()
    found = {**reply.shared, **small.federation.state(1).private}
    if normalization == "affine-only":  # what keeps its initial value is a constant of the skeleton, and not sent
        assert small.task.frozen
        found |= {n: v for n, v in small.task.model.state_dict().items() if n in small.task.frozen}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_evaluation_scores_each_distinct_model_and_domain_once(dataset):
    shared = Small(dataset)
    scores = shared.federation.evaluate(shared.federation.shared)
    assert [(s.client, s.domain, s.examples) for s in scores] == [(-1, d, 20) for d in dataset.domains]
    personal = Small(dataset, algorithm={"strategy": "fedbn"})
    scores = personal.federation.evaluate(personal.federation.shared)
    assert [(s.client, s.domain) for s in scores] == list(enumerate(dataset.domains))


class Breaking(InProcess):
    """The second block's worker dies for good."""

    def map(self, method, common, calls, **options):
        for number, result in super().map(method, common, calls, **options):
            yield number, WorkerLost("its worker died 3 times") if number == 1 else result


def test_a_lost_block_is_reported_and_the_rest_counts(dataset):
    small = Small(dataset, pool=Breaking, simulation={"block": 1})
    replies = small.federation.train(Order(1, small.federation.shared), [0, 1, 2])
    assert [r.client for r in replies.singles] == [0, 2]
    assert [(f.client, f.stage) for f in small.federation.failures] == [(1, "worker")]


def test_sampling_depends_on_seed_and_round_alone(dataset):
    small = Small(dataset)
    small.federation.cohort = 2
    rounds = [small.federation.sample(r) for r in range(1, 30)]
    assert rounds == [small.federation.sample(r) for r in range(1, 30)]
    assert all(len(set(c)) == 2 and c == sorted(c) for c in rounds)
    assert {i for c in rounds for i in c} == {0, 1, 2}


def test_a_diverging_client_is_left_out_by_name(dataset):
    small = Small(dataset, training={"lr": 1e20})
    assert not small.federation.train(Order(1, small.federation.shared), [0]).singles
    (failure,) = small.federation.failures
    assert (failure.client, failure.stage) == (0, "update")
    assert "not finite" in failure.reason or "loss is" in failure.reason

"""Clients in lockstep do what each does alone, wherever they may go so."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedsim.worker
from fedsim.checkpoint import state_sha256
from fedsim.device_memory import kept_bytes
from fedsim.lockstep import goes_in_lockstep
from fedsim.ray_pool import RayPool
from fedsim.worker import Worker
from tests.conftest import Small, nine_clients

CNN = {"name": "mcmahan-cnn", "norm": "bn"}
WIDE = "classifier.0.0.weight"


def small(dataset, *, model=None, shards=None, algorithm="fedavg", pool=None, block=3, **training):
    """mcmahan-cnn on images of 12 x 12 has one wide layer, [512, 576], with room for 67 examples."""
    sections = {"model": model or CNN, "algorithm": {"strategy": algorithm}, "simulation": {"block": block}}
    return Small(dataset, shards, pool, **sections, training=training)


@pytest.fixture
def widths(monkeypatch):
    """Of whatever was trained in lockstep."""
    seen, run = [], fedsim.worker.run_lockstep
    counted = lambda task, order, block, *of: (seen.append(len(block)), run(task, order, block, *of))[1]  # noqa: E731
    monkeypatch.setattr(fedsim.worker, "run_lockstep", counted)
    return seen


def one_after_the_other(worker: Worker) -> None:
    """Not in lockstep, as under any limit of time; nobody reaches this one."""
    worker.spec = replace(worker.spec, time_limit=1e6)


def alone(federation):
    """The same federation, whose clients train one after the other."""
    one_after_the_other(federation.federation.pool.worker)
    return federation


@pytest.mark.parametrize(
    ("algorithm", "norm"), [("fedavg", "bn"), ("fedavg", "none"), ("fedavgm", "gn"), ("fedbn", "bn"), ("fedbn", "gn")]
)
def test_a_ragged_block_is_trained_as_its_clients_are_alone(dataset, widths, algorithm, norm):
    """40, 33 and 37 examples in batches of eight: other numbers of steps, and a smaller last batch."""
    options = {"model": {**CNN, "norm": norm}, "algorithm": algorithm, "dtype": "float64"}
    together, single = small(dataset, **options), alone(small(dataset, **options))
    found = together.run(2)
    assert widths == [3, 3]
    expected = single.run(2)
    assert widths == [3, 3]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for client in range(3):
        ours, theirs = together.federation.state(client).private, single.federation.state(client).private
        assert ours.keys() == theirs.keys()
        assert bool(ours) == (algorithm == "fedbn")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_losses_and_counts_are_each_clients_own(dataset, widths):
    replies = []
    for federation in (small(dataset, dtype="float64"), alone(small(dataset, dtype="float64"))):
        (order,) = federation.strategy.orders(1, federation.strategy.init(federation.federation.shared))
        replies.append(list(federation.federation.train(order, [0, 1, 2]).singles))
    assert widths == [3]
    assert [r.client for r in replies[0]] == [0, 1, 2]
    for ours, theirs in zip(*replies):
        assert (ours.client, ours.examples) == (theirs.client, theirs.examples)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-9)


def model_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


def Vain() -> nn.Module:
    """A layer with a parameter that its result does not depend on."""
    layer = nn.Identity()
    layer.unused = nn.Parameter(torch.ones(3))
    return layer


MODELS = {
    "a wide layer first and last, without a bias": lambda: model_of(
        nn.Linear(432, 320, bias=False), nn.Linear(320, 320)
    ),
    "nested": lambda: nn.Sequential(OrderedDict(a=model_of(nn.Linear(432, 300), nn.Tanh()), b=nn.Linear(300, 4))),
    "in place after a layer without a bias": lambda: model_of(
        nn.Linear(432, 320, bias=False), nn.ReLU(inplace=True), nn.Linear(320, 4)
    ),
    "nothing but a wide weight": lambda: model_of(nn.Linear(432, 320, bias=False)),
    "a parameter in vain": lambda: model_of(Vain(), nn.Linear(432, 320)),
    "frozen features": lambda: frozen(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 300)),
}


def frozen(first: nn.Module, *others: nn.Module) -> nn.Module:
    """And the bias of the last."""
    others[-1].bias.requires_grad_(False)
    return nn.Sequential(first.requires_grad_(False), *others)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models_of_the_users_own(dataset, widths, make):
    ends = []
    for width in (3, 1):
        federation = small(dataset, dtype="float64")
        torch.manual_seed(0)
        task = fedsim.worker.ClientTask(make().double(), (), federation.task.optimizer)
        shared, _ = task.initial()
        worker = Worker(replace(federation.spec, task=task))
        if width == 1:
            one_after_the_other(worker)
        (order,) = federation.strategy.orders(1, shared)
        result = worker.train(order, [0, 1, 2], [federation.federation.untrained] * 3)
        assert result.failures == []
        ends.append(result.partial)
    assert widths == [3]
    ours, theirs = ends
    assert ours.weight == theirs.weight
    for name, value in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], value, rtol=1e-9, atol=1e-9, msg=name)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.wide = nn.Flatten(), nn.Linear(432, 432)

    def forward(self, x):
        x = self.flatten(x)
        return x + self.wide(x)


def tied() -> nn.Module:
    first, second = nn.Linear(432, 432), nn.Linear(432, 432)
    second.weight = first.weight
    return model_of(first, second, nn.Linear(432, 300))


class Backwards(nn.Sequential):
    def __call__(self, x):
        return super().__call__(-x)


def patched() -> nn.Module:
    model = model_of(nn.Linear(432, 300))
    model.forward = lambda x: model[1](model[0](-x))
    return model


def hooked() -> nn.Module:
    wide = nn.Linear(432, 300)
    wide.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model_of(wide)


def block_of(dataset, model, *, factors=True, clients=3, **training):
    federation = small(dataset, **training)
    task = replace(federation.task, model=model) if model else federation.task
    worker = Worker(replace(federation.spec, task=task))
    (order,) = federation.strategy.orders(1, task.initial()[0])
    states = [federation.federation.untrained] * clients
    block = worker.block(replace(order, fold=factors), list(range(clients)), states, fedsim.worker.BlockResult())
    return worker.task, block


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (True, {}),
        (True, {"model": model_of(nn.Linear(432, 300))}),
        (False, {"model": model_of(nn.Linear(432, 100))}),  # no wide layer
        (False, {"model": model_of(nn.Linear(432, 300), nn.Dropout(0.5))}),  # draws in another order
        (False, {"model": Residual()}),
        (False, {"model": tied()}),
        (False, {"model": hooked()}),
        (
            False,
            {"model": nn.Sequential(nn.Flatten(2), nn.Linear(144, 2000), nn.Flatten(), nn.Linear(6000, 4))},
        ),  # rows
        (False, {"model": Backwards(nn.Flatten(), nn.Linear(432, 300))}),
        (False, {"model": patched()}),
        (False, {"clients": 1}),
        (False, {"factors": False}),  # replies of their own are wanted
        (False, {"epochs": 2}),  # 80 examples have no room
        (False, {"weight-decay": 0.1}),
        (False, {"momentum": 0.9}),
        (False, {"optimizer": "adam", "lr": 0.001}),
        (False, {"precision": "bf16"}),
    ],
)
def test_only_where_it_is_the_same(dataset, expected, options):
    options = {"model": None, **options}
    assert goes_in_lockstep(*block_of(dataset, **options)) is expected


@pytest.mark.parametrize("algorithm", ["fedprox", "fedwon", "fedhyper-cl", "magnitude"])
def test_not_where_a_plugin_looks_at_gradients_or_weights(dataset, widths, algorithm):
    small(dataset, algorithm=algorithm).run(1)
    assert widths == []


@pytest.mark.parametrize(("fit", "expected"), [(4.5, [3, 3, 3]), (0.5, []), (100, [5, 4])])
def test_as_many_as_may_take_so_much_memory(dataset, widths, monkeypatch, fit, expected):
    """Activations, their own tensors and gradients, the factors of twelve examples; and eight at most."""
    federation = small(dataset, shards=nine_clients(dataset), block=9)
    model = federation.task.model
    own = sum(v.nbytes for n, v in model.state_dict().items() if n != WIDE)
    each = kept_bytes(federation.task, torch.zeros(8, 3, 12, 12)) + 2 * own + 4 * 12 * (512 + 576)
    monkeypatch.setattr("fedsim.lockstep.BYTES", int(fit * each))
    federation.run(1)
    assert widths == expected


def test_one_after_the_other_under_a_time_limit(dataset, widths):
    """So that one that takes too long costs nobody else."""
    federation = small(dataset)
    federation.federation.pool.worker.spec = replace(federation.spec, time_limit=60.0)
    federation.run(1)
    assert widths == []


def breaks(worker: Worker, client: int) -> None:
    """Let a client's examples be unreadable."""
    fetcher = worker.examples.fetcher

    def broken(*of):
        fetch = fetcher(*of)

        def read(clients, indices, step):
            if client in clients and step == 2:
                raise OSError("unreadable")
            return fetch(clients, indices, step)

        return read

    worker.examples.fetcher = broken


@pytest.mark.parametrize("client", [0, 1, 2])
def test_a_client_that_fails_is_left_out(dataset, widths, client):
    ours, others = small(dataset), small(dataset)
    worker = ours.federation.pool.worker
    worker.spec = replace(worker.spec, debug=False)
    breaks(worker, client)
    (order,) = ours.strategy.orders(1, ours.federation.shared)
    found = ours.federation.train(order, [0, 1, 2]).mean(order.shared)
    assert [(f.client, f.stage) for f in ours.federation.failures] == [(client, "train")]
    assert widths[0] == 3
    expected = others.federation.train(order, [c for c in range(3) if c != client]).mean(order.shared)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_debugging_names_the_client_that_failed(dataset):
    federation = small(dataset)
    breaks(federation.federation.pool.worker, 1)
    with pytest.raises(OSError, match="unreadable") as raised:
        federation.run(1)
    assert raised.value.__notes__ == ["in round 1, stage 'train', client 1"]


def test_debugging_tells_of_what_fails_in_lockstep_alone(dataset, monkeypatch):
    def fails(*of):
        raise ArithmeticError("together")
        yield

    monkeypatch.setattr(fedsim.worker, "run_lockstep", fails)
    with pytest.raises(ArithmeticError, match="together") as raised:
        small(dataset).run(1)
    assert raised.value.__notes__ == ["in round 1, stage 'train', client 0, 1"]


def test_a_client_that_diverges_is_refused_and_the_others_are_not(dataset, widths):
    federation = small(dataset, lr=1e25)
    federation.federation.pool.worker.spec = replace(federation.spec, debug=False)
    (order,) = federation.strategy.orders(1, federation.federation.shared)
    federation.federation.train(order, [0, 1, 2])
    assert widths == [3]
    assert [(f.client, f.stage) for f in federation.federation.failures] == [(c, "update") for c in range(3)]


def test_factors_that_may_overflow_are_given_as_tensors(dataset, widths, monkeypatch):
    """And are what they would have been."""
    ours, theirs = small(dataset, dtype="float64"), small(dataset, dtype="float64")
    expected = theirs.run(1)
    monkeypatch.setattr("fedsim.types.LowRank.bounded", property(lambda self: False))
    for name, value in ours.run(1).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    assert widths == [3, 3]


def test_the_same_bits_on_any_number_of_workers(dataset):
    hashes = set()
    for workers in (0, 1, 2):
        pool = (lambda spec, count=workers: RayPool(spec, count)) if workers else None
        federation = small(dataset, shards=nine_clients(dataset), pool=pool)
        try:
            hashes.add(state_sha256(federation.run(2)))
        finally:
            federation.federation.close()
    assert len(hashes) == 1


def test_blocks_of_one_and_of_many_differ_by_rounding_alone(dataset, widths):
    many, one = (
        small(dataset, shards=nine_clients(dataset), block=9),
        small(dataset, shards=nine_clients(dataset), block=1),
    )
    expected = one.run(1)
    assert widths == []
    for name, value in many.run(1).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert widths == [5, 4]

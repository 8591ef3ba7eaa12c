"""Stepping inside backward has the bits of stepping after it, and keeps one gradient alive at a time."""

import copy
import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedsim.local
from clients.learning_rate import HypergradientRate
from clients.normalization import LocalNormalization
from clients.proximal import Proximal
from clients.pruning import MaskedTraining
from fedsim.checkpoint import state_sha256
from fedsim.optim import SGD
from fedsim.plugin import Plugin
from fedsim.stepping import FusedLinear, InBackward, WholeGradients, stepper
from fedsim.types import Order, View
from tests.conftest import Small, small_dataset


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedwon"])
@pytest.mark.parametrize(
    "training",
    [
        {"momentum": 0.9, "weight-decay": 0.01},
        {"optimizer": "adam", "lr": 0.001},
    ],
)
def test_both_ways_have_the_same_bits(dataset, strategy, training, monkeypatch):
    hashes = set()
    for way in (WholeGradients, InBackward):
        monkeypatch.setattr(fedsim.local, "stepper", lambda model, *of, fuse, way=way: way(*of))
        hashes.add(state_sha256(Small(dataset, algorithm={"strategy": strategy}, training=training).run(2)))
    assert len(hashes) == 1


class Watch(Plugin):
    """Counts the gradients alive whenever one arrives."""

    per_tensor = True

    def __init__(self):
        self.alive: list[weakref.ref] = []
        self.most = 0

    def update(self, grads, state, params, view):
        self.alive = [r for r in self.alive if r() is not None] + [weakref.ref(g) for g in grads.values()]
        self.most = max(self.most, len(self.alive))
        return grads, state


def test_pruning_keeps_one_gradient_alive(dataset):
    small = Small(dataset, algorithm={"strategy": "magnitude", "density": 0.2})
    watch = Watch()
    task = small.federation.pool.worker.task
    object.__setattr__(task, "plugins", (watch, *task.plugins))
    gc.collect()
    small.run(1)
    assert watch.most == 1


def test_a_plugin_that_compares_gradients_gets_them_together():
    model = nn.Linear(2, 1)
    params = dict(model.named_parameters())
    assert type(stepper(model, (MaskedTraining(), HypergradientRate()), SGD(), params)) is WholeGradients
    assert type(stepper(model, (MaskedTraining(),), SGD(), params)) is InBackward
    assert type(stepper(model, (), SGD(), params)) is WholeGradients


class Twice(nn.Module):
    """Big linear layers used once, twice, over a sequence, and in vain."""

    def __init__(self):
        super().__init__()
        self.once, self.tied = nn.Linear(256, 256), nn.Linear(256, 256, bias=False)
        self.vain = nn.Linear(256, 256)
        self.norm, self.small = nn.LayerNorm(256), nn.Linear(256, 4)

    def forward(self, x):
        x = self.tied(torch.relu(self.tied(torch.relu(self.once(x)))))
        self.vain(x)
        unused = self.tied(x)  # noqa: F841
        return self.small(self.norm(x)).mean(1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_layers_step_as_torch_does(weight_decay):
    torch.manual_seed(0)
    model = Twice().double()
    oracle = copy.deepcopy(model)
    params = dict(model.named_parameters())
    ours = stepper(model, (), SGD(weight_decay=weight_decay), params)
    assert type(ours) is FusedLinear
    theirs = torch.optim.SGD(oracle.parameters(), lr=0.1, weight_decay=weight_decay)
    order = Order(round=1, task="train", shared={}, scalars={})
    ours.start(View(order, {}, 0.1, 3.0))
    x, y = torch.randn(8, 3, 256, dtype=torch.float64), torch.randint(0, 4, (8,))
    for step in range(3):
        theirs.zero_grad()
        F.cross_entropy(oracle(x), y).backward()
        for p in oracle.parameters():  # torch leaves out what has no gradient, fedsim decays it too
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        theirs.step()
        ours.step(F.cross_entropy(model(x), y), View(order, {}, 0.1, 3.0), step)
    assert ours.finish(()) == {}
    ours.close()
    for name, value in oracle.named_parameters():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert "forward" not in vars(model.once)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(300, 400), nn.Linear(400, 4)

    def forward(self, x):
        return self.head(torch.relu(self.wide(x)))


WIDE = "wide.weight"


def _steps(model, shared, steps, batch, wanted, lr=0.1):
    """(what a client's steps leave as factors, the same steps by torch)"""
    oracle = copy.deepcopy(model)
    params = dict(model.named_parameters())
    ours, theirs = stepper(model, (), SGD(), params), torch.optim.SGD(oracle.parameters(), lr=lr)
    view = View(Order(round=1, task="train", shared=shared, scalars={}), {}, lr, float(steps))
    ours.start(view)
    for step in range(steps):
        x, y = torch.randn(batch, 300, dtype=torch.float64), torch.randint(0, 4, (batch,))
        theirs.zero_grad()
        F.cross_entropy(oracle(x), y).backward()
        theirs.step()
        ours.step(F.cross_entropy(model(x), y), replace(view, last=step + 1 == steps), step)
    with torch.no_grad():
        factors = ours.finish(wanted)
    ours.close()
    return factors, dict(oracle.named_parameters())


@pytest.mark.parametrize(("steps", "batch"), [(1, 8), (3, 8), (2, 40)])
def test_factors_are_what_the_steps_add(steps, batch):
    torch.manual_seed(0)
    model = Wide().double()
    base = model.wide.weight.detach().clone()
    model.wide.weight.data.fill_(math.nan)  # nobody may look at it
    shared, before = {WIDE: base}, base.clone()
    oracle = copy.deepcopy(model)
    oracle.wide.weight.data.copy_(base)
    state = torch.get_rng_state()
    given, _ = _steps(model, shared, steps, batch, {WIDE})
    torch.set_rng_state(state)
    _, expected = _steps(oracle, {}, steps, batch, ())
    factors = given[WIDE]
    if steps * batch > 42:  # a quarter of 1 / (1 / 300 + 1 / 400)
        assert factors is None
        torch.testing.assert_close(model.wide.weight, expected[WIDE], rtol=1e-12, atol=1e-14)
    else:
        assert len(factors.left) == steps * batch
        torch.testing.assert_close(base + factors.left.T @ factors.right, expected[WIDE], rtol=1e-12, atol=1e-14)
    assert torch.equal(base, before)


def test_a_model_may_be_one_wide_layer():
    """Logistic regression on large images; its gradients come expanded from a sum, in float32."""
    torch.manual_seed(0)
    model = nn.Linear(300, 400)
    oracle, x = copy.deepcopy(model), torch.randn(4, 3, 300)
    ours = stepper(model, (), SGD(), dict(model.named_parameters()))
    assert type(ours) is FusedLinear
    view = View(Order(round=1, shared={"weight": model.weight.detach().clone()}), {}, 0.1, 2.0)
    ours.start(view)
    for step in range(2):
        ours.step(model(x).sum((1, 2)).mean(), view, step)
        oracle(x).sum((1, 2)).mean().backward()
    with torch.no_grad():
        ours.finish(())
    ours.close()
    torch.testing.assert_close(model.weight, oracle.weight - 0.1 * oracle.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bias, oracle.bias - 0.1 * oracle.bias.grad, rtol=1e-5, atol=1e-5)


def test_logistic_regression_on_large_images_trains(tmp_path):
    small = Small(small_dataset(tmp_path, shape=(3, 96, 96)), model={"name": "logistic"})
    before = small.federation.shared["1.weight"]
    assert not torch.equal(small.run(1)["1.weight"], before)
    assert small.federation.failures == []


def test_factors_that_may_overflow_are_written_and_checked():
    torch.manual_seed(0)
    model = Wide().double()
    given, expected = _steps(model, {WIDE: model.wide.weight.detach().clone()}, 1, 8, {WIDE}, lr=1e40)
    assert given == {WIDE: None}
    torch.testing.assert_close(model.wide.weight, expected[WIDE])


def test_layers_are_fused_only_where_nobody_asks_for_gradients():
    model = Twice()
    params = dict(model.named_parameters())
    assert FusedLinear.layers(model, (LocalNormalization(),), SGD(), params) == [model.once, model.tied, model.vain]
    assert FusedLinear.layers(model, (), SGD(momentum=0.9), params) == []
    assert FusedLinear.layers(model, (Proximal(0.1),), SGD(), params) == []
    head = {n: p for n, p in params.items() if n.startswith("vain")}
    assert FusedLinear.layers(model, (), SGD(), head) == [model.vain]
    model.once.weight = model.tied.weight
    assert FusedLinear.layers(model, (), SGD(), dict(model.named_parameters())) == [model.vain]


class Breaks(Plugin):
    per_tensor = frugal = True

    def __init__(self):
        self.calls = 0

    def update(self, grads, state, params, view):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("in the middle of backward")
        return grads, state


def test_a_client_that_fails_in_backward_leaves_no_gradient_to_the_next(dataset):
    whole, broken = Small(dataset), Small(dataset)
    worker = broken.federation.pool.worker
    object.__setattr__(worker.task, "plugins", (Breaks(),))
    object.__setattr__(worker.spec, "debug", False)
    order = broken.strategy.orders(1, broken.federation.shared)[0]
    replies = broken.federation.train(order, [0, 1, 2])
    assert [f.client for f in broken.federation.failures] == [0]
    expected = whole.federation.train(order, [1, 2])
    like = broken.federation.shared
    assert state_sha256(replies.mean(like)) == state_sha256(expected.mean(like))

"""Stepping inside backward has the bits of stepping after it, and keeps one gradient alive at a time."""

import gc
import weakref

import pytest
import torch

import fedsim.local
from clients.learning_rate import HypergradientRate
from clients.pruning import MaskedTraining
from fedsim.checkpoint import state_sha256
from fedsim.optim import SGD
from fedsim.plugin import Plugin
from fedsim.stepping import InBackward, WholeGradients, stepper
from tests.conftest import Small


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
        monkeypatch.setattr(fedsim.local, "stepper", way)
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
    params = {"w": torch.nn.Parameter(torch.ones(2))}
    assert type(stepper((MaskedTraining(), HypergradientRate()), SGD(), params)) is WholeGradients
    assert type(stepper((MaskedTraining(),), SGD(), params)) is InBackward
    assert type(stepper((), SGD(), params)) is WholeGradients


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

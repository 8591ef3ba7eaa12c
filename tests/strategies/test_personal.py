"""Ditto, FedPer, FedRep and FedBABU: what moves, what is sent, and Ditto against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.personal import LateHead, PersonalTwin, Twin, head_names
from fedsim.batches import BatchPlan, Layout
from fedsim.errors import ConfigError
from fedsim.local import Block, ClientTask, run_loop
from fedsim.optim import SGD
from fedsim.packing import Packed
from fedsim.types import ClientState, Order
from fedsim.vectorized import run_vmap
from tests.conftest import Small
from tests.test_engine import agree

PERSONAL = ("fedper", "fedrep", "fedbabu")


def gradient(w, x, y):
    """Of the mean cross-entropy of logits x w.T."""
    z = np.exp(x @ w.T)
    return ((z / z.sum(1, keepdims=True) - np.eye(2)[y]).T @ x) / len(y)


@pytest.mark.parametrize("executor", [run_loop, run_vmap])
def test_ditto_equals_numpy_over_two_rounds(executor):
    eta, strength, draw = 0.3, 0.7, np.random.default_rng(0)
    x, y = draw.normal(size=(2, 3, 4, 3)), draw.integers(0, 2, (2, 3, 4))  # [client, step, B, F], convex in w
    task = ClientTask(nn.Linear(3, 2, bias=False).double(), (PersonalTwin(strength),), SGD())
    shared, private = task.initial()
    w = shared["shared.weight"].numpy().copy()
    v = np.stack([w, w])
    states = [Packed.of(ClientState(private, {})) for _ in range(2)]
    for t in (1, 2):
        fetch = lambda ks, i, s: (torch.tensor(x[ks, s]), torch.tensor(y[ks, s]))  # noqa: E731
        plan = BatchPlan(np.zeros((2, 12), np.int64), Layout(1, ((0, 4), (4, 8), (8, 12)), 0))
        block = Block([0, 1], states, [(np.arange(2), plan)])
        outcomes = []
        for o in executor(task, Order(t, shared), block, eta, fetch):
            for row, k in enumerate(o.clients):
                outcomes.append(o.shared["shared.weight"][row].clone())
                states[k] = Packed.of(ClientState({n: v[row] for n, v in o.private.items()}))
        sent, local = w, [w, w]
        for k in range(2):
            for s in range(3):
                v[k] = v[k] - eta * (gradient(v[k], x[k, s], y[k, s]) + strength * (v[k] - sent))
                local[k] = local[k] - eta * gradient(local[k], x[k, s], y[k, s])
        w = np.mean(local, 0)
        shared = {"shared.weight": torch.stack(outcomes).mean(0)}
        np.testing.assert_allclose(shared["shared.weight"].numpy(), w, rtol=1e-10)
        for k in range(2):
            np.testing.assert_allclose(states[k].unpack().private["personal.weight"].numpy(), v[k], rtol=1e-10)


def test_ditto_is_evaluated_with_the_personal_model():
    twin = Twin(nn.Linear(3, 2))
    nn.init.zeros_(twin.shared.weight)
    x = torch.randn(5, 3)
    assert torch.equal(twin.eval()(x), twin.personal(x))


@pytest.mark.parametrize("normalization", ["shared", "local", "standardized-weights"])
@pytest.mark.parametrize("strategy", ["ditto", *PERSONAL])
def test_composes_with_normalization_under_both_executors(dataset, strategy, normalization):
    sections = {
        "algorithm": {"strategy": strategy, "normalization": normalization},
        "training": {"dtype": "float64"},
    }
    agree(*(Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap")), rounds=2)


@pytest.mark.parametrize(("share", "moves"), [(1.0, {"head"}), (0.5, {"head", "body"}), (0.0, {"body"})])
def test_fedrep_trains_one_part_at_a_time(dataset, share, moves):
    small = Small(dataset, algorithm={"strategy": "fedrep", "head-share": share})
    before, head = small.federation.shared, small.task.private
    after = small.run(1)
    moved = (
        {"body"} if any(not torch.equal(before[n], after[n]) for n in small.task.trainable if n in before) else set()
    )
    private = small.federation.state(0).private
    moved |= {"head"} if any(not torch.equal(private[n], small.federation.private[n]) for n in head) else set()
    assert moved == moves


def test_fedbabu_fits_the_heads_at_the_end(dataset):
    small = Small(dataset, algorithm={"strategy": "fedbabu", "head-rounds": 1})
    initial, head = small.federation.private, small.task.private
    body = [n for n in small.task.trainable if n not in head]
    first = small.run(2)
    assert all(torch.equal(small.federation.state(c).private[n], initial[n]) for c in range(3) for n in head)
    order = Order(3, first)
    last = small.strategy.aggregate(3, first, order, small.federation.train(order, [0, 1, 2]))
    # The mean of equal tensors is off by one rounding of a weighted sum.
    assert all(torch.allclose(first[n], last[n], rtol=1e-6, atol=0) for n in body)
    assert all(not torch.equal(small.federation.state(c).private[n], initial[n]) for c in range(3) for n in head)
    assert isinstance(small.task.plugins[0], LateHead)


def test_the_head_is_the_last_linear_layer(dataset):
    for strategy in PERSONAL:
        small = Small(dataset, algorithm={"strategy": strategy})
        assert small.task.private == head_names(small.task.model)
        assert {small.task.model.state_dict()[n].shape[0] for n in small.task.private} == {4}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "logistic"}, "algorithm": {"strategy": "fedper"}}, "no body and head"),
        ({"training": {"momentum": 0.9}, "algorithm": {"strategy": "fedrep"}}, "momentum"),
        ({"training": {"momentum": 0.9}, "algorithm": {"strategy": "scaffold"}}, "plain SGD"),
        ({"training": {"optimizer": "adam"}, "algorithm": {"strategy": "fednova"}}, "SGD"),
        ({"algorithm": {"strategy": "feddyn", "dyn-alpha": 0.0}}, "above 0"),
    ],
)
def test_refused_where_it_makes_no_sense(dataset, sections, message):
    with pytest.raises(ConfigError, match=message):
        Small(dataset, **sections)

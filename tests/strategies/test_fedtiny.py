"""FedTiny against numpy on toys and against its own promises on a small network."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from clients.pruning import GROW, INDEX, SQUARE, VALUE, MaskedTraining
from fedsim.checkpoint import state_sha256
from fedsim.errors import ConfigError
from fedsim.flops import forward_flops, masked_flops, training_memory
from fedsim.flower import reply_content
from fedsim.grid import SimulationGrid
from fedsim.models import build_model
from fedsim.strategy import Replies
from fedsim.traffic import message_bytes, order_bytes
from fedsim.types import Order, Reply, View
from fedsim.wire import to_tensors
from strategies import FedAvg, FedTiny
from strategies import masks as m
from tests.conftest import Small
from tests.test_engine import agree

METHODS = ["fedtiny", "magnitude", "random", "snip", "synflow", "prunefl", "feddst"]
ADJUSTED = {"adjust-every": 1, "adjust-until": 4}


def small(dataset, strategy="fedtiny", executor="loop", **algorithm):
    if strategy in ("fedtiny", "prunefl", "feddst"):
        algorithm = {**ADJUSTED, **algorithm}
    return Small(
        dataset,
        algorithm={"strategy": strategy, "density": 0.1, **algorithm},
        simulation={"executor": executor},
        training={"dtype": "float64"},
        federation={"public-per-class": 2},
    )


# Module A


def toy(**options):
    """A server of two weights' tensors and one BatchNorm, four candidates."""
    draw = torch.Generator().manual_seed(0)
    shared = {
        "a": torch.randn(400, generator=draw),
        "b": torch.randn(1600, generator=draw),
        "n.running_mean": torch.zeros(2),
        "n.running_var": torch.ones(2),
    }
    statistics = ["n.running_mean", "n.running_var"]
    return FedTiny(FedAvg(), names=["a", "b"], density=0.1, candidates=4, statistics=statistics, **options), shared


@pytest.mark.parametrize("pooled", [False, True])
def test_selection_by_numpy(pooled):
    """Two devices with 10 and 30 dev examples; the candidate with the least weighted loss wins with its statistics."""
    strategy, shared = toy(pooled=pooled)
    state = strategy.init(shared)
    n = np.array([10, 30])
    draw = np.random.default_rng(1)
    means, variances = draw.normal(size=(4, 2, 2)), draw.uniform(0.5, 2, size=(4, 2, 2))  # [candidate, device, channel]
    losses = np.array([[2.0, 1.0], [0.2, 1.5], [3.0, 0.9], [1.0, 1.3]])
    weighted = losses @ n / n.sum()

    orders = strategy.orders(-1, state)
    assert [o.task for o in orders] == ["statistics"] * 4
    for c, order in enumerate(orders):
        for name in ("a", "b"):  # layer-wise magnitude
            kept = order.masks[name].numpy()
            assert np.abs(shared[name].numpy())[kept].min() >= np.abs(shared[name].numpy())[~kept].max()
            assert 0.045 * kept.size <= kept.sum() <= 0.155 * kept.size, "densities of U[d/2, 3d/2], made exact"
        assert sum(int(v.sum()) for v in order.masks.values()) == 200
        replies = [
            Reply(
                k,
                int(n[k]),
                {"n.running_mean": torch.tensor(means[c, k]), "n.running_var": torch.tensor(variances[c, k])},
            )
            for k in range(2)
        ]
        state = strategy.aggregate(-1, state, order, Replies(replies))
    orders = strategy.orders(0, state)
    assert [o.task for o in orders] == ["score"] * 4
    for c, order in enumerate(orders):
        mean = n @ means[c] / n.sum()
        variance = n @ (variances[c] + pooled * (means[c] - mean) ** 2) / n.sum()
        np.testing.assert_allclose(order.shared["n.running_mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(order.shared["n.running_var"], variance, rtol=1e-6)
        replies = [Reply(k, int(n[k]), {}, metrics={"loss": losses[c, k]}) for k in range(2)]
        state = strategy.aggregate(0, state, order, Replies(replies))
    winner = int(weighted.argmin())
    assert int(state["@candidate"]) == winner
    chosen = orders[winner]
    for name, value in strategy.shared(state).items():
        assert torch.equal(value, chosen.shared[name]), "training starts from the winner's weights and statistics"
    assert all(torch.equal(strategy.masks(state)[n], v) for n, v in chosen.masks.items())


def test_candidates_are_ceil_of_a_tenth_over_density(dataset):
    assert small(dataset, density=0.05).strategy.candidates == 2
    assert small(dataset, density=0.03).strategy.candidates == math.ceil(0.1 / 0.03)
    assert small(dataset, selection="none").strategy.setup_rounds == 0


def test_statistics_order_runs_batchnorm_over_the_dev_set_and_nothing_else(dataset):
    """Against ten forward passes of the model itself in training mode."""
    run = small(dataset, **{"dev-fraction": 0.5, "dev-passes": 3})
    state = run.strategy.init(run.federation.shared)
    order = run.strategy.orders(-1, state)[0]
    replies = run.federation.train(order, [1])
    worker = run.federation.pool.worker
    indices = worker.examples_of(order, 1)
    assert len(indices) == round(33 * 0.5)
    assert replies.singles[0].examples == len(indices)
    plan = worker._plan(order, [1], run.shards[1][None])
    assert sorted(np.concatenate(list(plan), 1)[0].tolist()) == sorted(np.tile(indices, 3).tolist()), (
        "three passes over it"
    )
    model = run.task.model
    model.load_state_dict({**model.state_dict(), **order.shared})
    with torch.no_grad():
        for (batch,) in plan:
            model(worker.examples.batch("train", batch)[0])
    mean = replies.mean(order.returned)
    assert mean.keys() == {n for n, k in run.task.kinds.items() if k == "stats"}
    for name, value in mean.items():
        torch.testing.assert_close(value, model.state_dict()[name])


def test_private_statistics_never_leave_and_are_the_winners_when_training_starts(dataset):
    run = small(dataset, normalization="local", density=0.05)
    state = run.strategy.init(run.federation.shared)
    orders = run.strategy.orders(-1, state)
    assert [o.task for o in orders] == ["statistics", "score"] * 2
    assert all(o.returned == {} for o in orders)
    assert all(not run.task.private & o.shared.keys() for o in orders)
    last = run.strategy.orders(0, state)
    assert [o.task for o in last] == ["statistics"]


# Module B


def test_top_gradients_are_those_of_autograd(dataset):
    """The a largest |gradient| over pruned positions of the last minibatch, before its step."""
    torch.manual_seed(0)
    layer, plugin = nn.Linear(6, 5), MaskedTraining()
    mask = torch.rand(5, 6) < 0.4
    order = Order(1, {}, masks={"weight": mask}, scalars={GROW + "weight": 4.0})
    params = {n: p.detach() for n, p in layer.named_parameters()}
    state = plugin.start(params, View(order, {}))
    grad = torch.randn(5, 6)
    _, untouched = plugin.update({"weight": torch.randn(5, 6)}, state, params, View(order, {}, last=False))
    assert torch.equal(untouched[VALUE + "weight"], torch.zeros(4)), "only the last step counts"
    masked, state = plugin.update({"weight": grad}, state, params, View(order, {}, last=True))
    report, _ = plugin.finish(params, state, View(order, {}))
    flat = np.where(mask.numpy(), 0, grad.numpy()).reshape(-1)
    expected = np.argsort(-np.abs(flat))[:4]
    assert report[INDEX + "weight"].tolist() == expected.tolist()
    np.testing.assert_array_equal(report[VALUE + "weight"].numpy(), flat[expected])
    assert report[VALUE + "weight"].numel() == 4, "O(a), not O(n)"
    assert torch.equal(masked["weight"], torch.where(mask, grad, 0))


def test_an_adjustment_by_numpy():
    """Gradients weighted by examples (unweighted as released), missing ones zero; one block, from the last."""
    for released in (False, True):
        strategy = FedTiny(
            FedAvg(), names=["a.x", "b.x"], density=0.5, selection="none", every=2, until=8, granularity="layer",
            released=released,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(1)
        shared = {"a.x": torch.randn(8, generator=draw), "b.x": torch.randn(12, generator=draw)}
        state = strategy.init(shared)
        assert strategy.asks(1, state) == {}
        clock = 0 if released else 2
        rate = 0.15 * (1 + math.cos(math.pi * clock / 8))
        name = "a.x" if released else "b.x"  # round 2 mod 2 blocks; the last block
        a = math.ceil(rate * int(state["@mask." + name].sum()))
        (order,) = strategy.orders(2, state)
        assert {k: v for k, v in order.scalars.items() if k.startswith(GROW)} == {GROW + name: float(a)}
        pruned = np.flatnonzero(~order.masks[name].numpy())
        told = [(pruned[:a], np.linspace(1, 2, a)), (pruned[-a:], np.linspace(-3, -1, a))]
        moved = {n: torch.where(order.masks[n], v + 0.1, 0) for n, v in order.shared.items()}
        replies = [
            Reply(k, n, moved, {INDEX + name: torch.tensor(i).int(), VALUE + name: torch.tensor(v).float()})
            for k, (n, (i, v)) in enumerate(zip((10, 30), told))
        ]
        new = strategy.aggregate(2, state, order, Replies(replies))
        gradient = np.zeros(shared[name].numel())
        for weight, (i, v) in zip((1, 1) if released else (10, 30), told):
            gradient[i] += weight * v.astype(np.float32)
        want_w, want_m = m.adjust(moved[name], order.masks[name], torch.tensor(gradient), a)
        assert torch.equal(new["@mask." + name], want_m)
        torch.testing.assert_close(new[name], want_w)
        assert int(new["@adjustments"]) == 1


def test_blocks_take_turns_from_the_last_and_every_one_is_visited():
    """By the adjustment counter: the round number would visit some blocks never."""
    strategy, shared = toy(every=10, until=100, granularity="layer")
    state, visited = strategy.init(shared), []
    for round in range(1, 101):
        asked = [n.removeprefix(GROW) for n in strategy.asks(round, state)]
        if asked:
            visited += asked
            state = {**state, "@adjustments": state["@adjustments"] + 1}
    assert visited == ["b", "a"] * 5


def test_reports_of_a_liar_do_not_reach_outside_the_layer():
    strategy, shared = toy(selection="none")
    lies = {INDEX + "a": torch.tensor([-1, 400, 3], dtype=torch.int32), VALUE + "a": torch.tensor([9.0, 9.0, 2.0])}
    replies = Replies([Reply(0, 1, {}, lies), Reply(1, 1, {}, {INDEX + "a": torch.zeros(2).int()}), Reply(2, 1, {})])
    gradient = strategy.gradient("a", shared["a"], replies)
    assert gradient.nonzero().flatten().tolist() == [3]


# Every method on a network


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalization", ["shared", "local", "standardized-weights"])
def test_loop_and_vmap_agree_and_the_density_is_exact(dataset, method, normalization):
    """In float64: rounding may not decide which weight is pruned."""
    runs = [small(dataset, method, executor, normalization=normalization) for executor in ("loop", "vmap")]
    agree(*runs, rounds=2, tolerance=1e-7)
    state = runs[0].run(2)
    masks = runs[0].strategy.masks(state)
    total = sum(v.numel() for v in masks.values())
    assert sum(int(v.sum()) for v in masks.values()) == round(0.1 * total)
    for name, mask in masks.items():
        assert not state[name][~mask].any()
        assert state[name][mask].any()


@pytest.mark.parametrize("rule", [{"strategy": "fedavgm"}, {"strategy": "fedadam"}, {"strategy": "fedexp"}])
@pytest.mark.parametrize("training", [{"momentum": 0.9, "weight-decay": 0.1}, {"optimizer": "adam", "lr": 0.003}])
def test_masks_hold_through_momentum_weight_decay_and_server_optimizers(dataset, rule, training):
    run = Small(dataset, algorithm={**rule, "pruning": "fedtiny", "density": 0.1, **ADJUSTED}, training=training)
    state = run.run(3)
    for name, mask in run.strategy.masks(state).items():
        assert not state[name][~mask].any()
        moved = [v for n, v in state.items() if n.startswith(("@first.", "@before.")) and n.endswith("." + name)]
        assert all(not v[~mask].any() for v in moved), "no momentum waits for a pruned weight"
    assert run.strategy.metrics(state)["density"] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("method", ["fedtiny", "snip"])
def test_flowers_start_runs_the_setup_rounds_too(dataset, method):
    expected = small(dataset, method).run(2)
    run = small(dataset, method)
    grid = SimulationGrid(run.federation)
    result = run.strategy.start(grid, grid.initial_arrays(), num_rounds=2)
    final = {n: v for n, v in expected.items() if not n.startswith("@")}
    assert state_sha256(to_tensors(result.arrays)) == state_sha256(final)


def test_adjustments_change_the_mask_where_the_method_adjusts(dataset):
    for method, moves in (("fedtiny", True), ("prunefl", True), ("feddst", True), ("magnitude", False)):
        run = small(dataset, method)
        masks = [run.strategy.masks(run.run(rounds)) for rounds in (1, 3)]
        assert any(not torch.equal(masks[0][n], masks[1][n]) for n in masks[0]) == moves, method


# Baselines


def test_snip_is_gradient_times_weight_of_autograd(dataset):
    run = small(dataset, "snip")
    model, (x, y) = run.task.model.eval(), run.strategy.public
    nn.functional.cross_entropy(model(x), y).backward()
    shared = run.federation.shared
    scores = run.strategy._scores(shared, {n: torch.ones_like(shared[n], dtype=torch.bool) for n in run.strategy.names})
    for name, p in model.named_parameters():
        if name in scores:
            torch.testing.assert_close(scores[name], (p.grad * p).abs().detach())


def test_synaptic_flow_is_conserved_from_layer_to_layer(dataset):
    """Tanaka et al., theorem: without biases the scores of every layer sum to the same."""
    run = Small(dataset, algorithm={"strategy": "synflow", "density": 0.1}, model={"norm": "none"})
    shared = {n: torch.zeros_like(v) if n.endswith("bias") else v for n, v in run.federation.shared.items()}
    masks = {n: torch.ones_like(shared[n], dtype=torch.bool) for n in run.strategy.names}
    sums = [float(s.sum()) for s in run.strategy._scores(shared, masks).values()]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-6)


def test_prunefl_reports_the_mean_squared_gradient():
    plugin = MaskedTraining()
    mask = torch.tensor([True, False, True])
    order, params = Order(1, {}, masks={"w": mask}, scalars={"squares": 1.0}), {"w": torch.zeros(3)}
    state = plugin.start(params, View(order, {}))
    for g in ([1.0, 2.0, 3.0], [3.0, 0.0, 1.0]):
        _, state = plugin.update({"w": torch.tensor(g)}, state, params, View(order, {}, steps=2.0))
    assert plugin.finish(params, state, View(order, {}))[0][SQUARE + "w"].tolist() == [5.0, 2.0, 5.0]


# Cost


@functools.cache
def resnet_flops() -> dict[str, int]:
    return forward_flops(build_model("resnet-18", classes=10, shape=(3, 32, 32)), torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    ("density", "sparse", "coo", "prunefl", "prunefl_memory"),
    [
        (0.1, 0.1029, 0.300, 0.402, 0.650),
        (0.05, 0.0530, 0.150, 0.369, 0.575),
        (0.01, 0.0132, 0.030, 0.342, 0.515),
        (0.005, 0.0082, 0.015, 0.339, 0.508),
        (0.003, 0.0062, 0.009, 0.337, 0.505),
        (0.001, 0.0042, 0.003, 0.336, 0.502),
    ],
)
def test_the_cost_table_of_the_paper(density, sparse, coo, prunefl, prunefl_memory):
    """ResNet-18, every prunable layer at the same density, first convolution dense."""
    with torch.device("meta"):
        model = build_model("resnet-18", classes=10, shape=(3, 32, 32))
    names, weights = m.prunable(model), dict(model.named_parameters())
    shapes = {n: weights[n].shape for n in names}
    masks = {n: torch.arange(s.numel()).view(s) < round(density * s.numel()) for n, s in shapes.items()}
    forward = resnet_flops()
    f_s, f_d = masked_flops(forward, masks), forward[""]
    assert 3 * f_s / (3 * f_d) == pytest.approx(sparse, abs=1e-4)
    assert (2 * f_s + f_d) / (3 * f_d) == pytest.approx(prunefl, abs=1e-3)
    count = sum(v.numel() for v in masks.values())
    dense = 8 * count
    assert training_memory(count, masks) / dense == pytest.approx(coo, abs=5e-4)
    assert training_memory(count, masks, dense_gradient=True) / dense == pytest.approx(prunefl_memory, abs=1e-3)


@pytest.mark.parametrize("density", [0.05, 0.01])
@pytest.mark.parametrize(("model", "method"), [("resnet-20", "fedtiny"), ("digits-cnn", "magnitude")])
def test_messages_are_as_short_as_promised_both_ways(dataset, density, model, method):
    """Weights of pruned layers: min(bitmap, 4-byte indices) + 4 bytes a kept value, plus 15 % at most."""
    run = Small(
        dataset,
        algorithm={"strategy": method, "density": density, **(ADJUSTED if method == "fedtiny" else {})},
        model={"name": model},
    )
    state = run.run(2) if method == "fedtiny" else run.strategy.init(run.federation.shared)
    (order,) = run.strategy.orders(3, state)
    masks = order.masks
    kept = sum(int(v.sum()) for v in masks.values())
    assert kept == round(density * sum(v.numel() for v in masks.values()))
    weights = Order(3, {n: v for n, v in order.shared.items() if n in masks}, masks=masks)
    promised = sum(min(math.ceil(v.numel() / 8), 4 * int(v.sum())) + 4 * int(v.sum()) for v in masks.values())
    assert order_bytes(weights) <= 1.15 * promised
    reply = run.federation.train(replace(order, fold=False), [0]).singles[0]
    sent = {n: v for n, v in reply.shared.items() if n in masks}
    assert message_bytes(reply_content(Reply(0, 10, sent), 0, masks)) <= 1.15 * promised


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": 0.00001}, "less than one"),
        ({"selection": "best"}, "selection"),
        ({"granularity": "row"}, "granularity"),
        ({"adjust-every": 0}, "adjust-every"),
    ],
)
def test_senseless_options_are_refused(dataset, algorithm, words):
    with pytest.raises(ConfigError, match=words):
        Small(dataset, algorithm={"strategy": "fedtiny", **algorithm})


def test_a_model_without_layers_to_prune_is_refused(dataset):
    with pytest.raises(ConfigError, match="nothing to prune"):
        Small(dataset, algorithm={"strategy": "fedtiny"}, model={"name": "logistic"})
    with pytest.raises(ConfigError, match="public-per-class"):
        Small(dataset, algorithm={"strategy": "snip"})
    with pytest.raises(ConfigError, match="nothing to prune"):
        Small(dataset, algorithm={"strategy": "local-only", "pruning": "fedtiny"})

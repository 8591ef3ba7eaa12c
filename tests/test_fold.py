"""Folding: the mean's value, its invariance to the bit, and integer counters."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.fold import FAN, LARGE, Apart, Chain, Partial, Tree, WideSum, fan_of, gather, mean, merge, settled
from fedsim.types import LowRank
from fedsim.worker import Worker
from tests.conftest import Small


def clients(draw_seed: int, count: int):
    g = torch.Generator().manual_seed(draw_seed)
    tensors = [
        {"w": torch.randn(4, 3, generator=g), "count": torch.randint(0, 99, (), generator=g)} for _ in range(count)
    ]
    weights = torch.randint(1, 500, (count,), generator=g).double().tolist()
    return tensors, weights


def fold(tensors, weights, block):
    partials = []
    for start in range(0, len(tensors), block):
        partial = Partial.of({n: v.clone() for n, v in tensors[start].items()}, weights[start])
        for theta, weight in list(zip(tensors, weights))[start + 1 : start + block]:
            partial.add(theta, weight)
        partials.append(partial)
    return mean(partials, tensors[0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4))
def test_weighted_mean_equals_numpy_and_stays_in_the_hull(seed, count, block):
    tensors, weights = clients(seed, count)
    found = fold(tensors, weights, block)
    stacked = np.stack([t["w"].double().numpy() for t in tensors])
    expected = np.average(stacked, axis=0, weights=weights)
    np.testing.assert_allclose(found["w"].numpy(), expected, rtol=1e-6, atol=1e-7)
    assert (found["w"].numpy() <= stacked.max(0) + 1e-6).all()
    assert (found["w"].numpy() >= stacked.min(0) - 1e-6).all()
    assert found["count"].dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.just(4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.data(),
    st.integers(1, 4),
)
def test_the_mean_is_in_the_convex_hull_to_the_bit(values, data, block):
    """Float32 of any size: the rounding of the sums in float64 does not reach the result."""
    count = len(values)
    weights = data.draw(st.lists(st.integers(1, 10**6).map(float), min_size=count, max_size=count))
    found = fold([{"w": torch.from_numpy(v)} for v in values], weights, block)["w"].numpy()
    assert (values.min(0) <= found).all()
    assert (found <= values.max(0)).all()


@pytest.mark.parametrize("odd", [{"w": torch.ones(1)}, {}, {"w": torch.ones(3), "v": torch.ones(1)}])
def test_what_is_not_alike_is_refused_and_leaves_the_sum(odd):
    partial = Partial.of({"w": torch.arange(3.0)}, 2.0)
    with pytest.raises(ValueError, match="other names or shapes"):
        partial.add(odd, 1.0)
    assert torch.equal(mean([partial], {"w": torch.zeros(3)})["w"], torch.arange(3.0))


def test_the_mean_of_equal_tensors_is_the_tensor_to_the_bit():
    tensors, weights = clients(3, 1)
    assert torch.equal(fold(tensors * 7, weights * 7, 3)["w"], tensors[0]["w"])


def test_a_block_of_one_has_the_bits_of_a_scaled_sum():
    tensors, weights = clients(5, 4)
    lazy = [Partial.of(dict(t), w) for t, w in zip(tensors, weights)]
    eager = [Partial({n: v.double() * w for n, v in t.items()}, w) for t, w in zip(tensors, weights)]
    assert torch.equal(mean(lazy, tensors[0])["w"], mean([merge(eager)], tensors[0])["w"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 3), st.integers(2, 4))
def test_gathered_sums_have_the_mean_of_all_to_the_bit(seed, count, block, together):
    tensors, weights = clients(seed, count)
    expected = fold(tensors, weights, block)
    partials, total = [], None
    for start in range(0, count, block):
        partial = Partial.of({n: v.clone() for n, v in tensors[start].items()}, weights[start])
        for theta, weight in list(zip(tensors, weights))[start + 1 : start + block]:
            partial.add(theta, weight)
        partials.append(partial)
        if len(partials) == together:
            total = gather(total, partials)
            assert partials == []
    found = mean(partials if total is None else [total, *partials], tensors[0])
    assert all(torch.equal(found[n], v) for n, v in expected.items())


def test_wide_sums_are_the_sums_of_what_clients_end_with():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    base = draw(30, 40)
    partial = Partial.of({"bias": draw(4)}, 3.0)
    expected = np.zeros((30, 40))
    for client, rows in enumerate([5, 0, 9, 3, 2]):
        weight, update = float(client + 1), LowRank(draw(rows, 30), draw(rows, 40))
        partial.add_wide({"w": base}, {"w": update}, weight)
        theta = base.double() + update.left.double().T @ update.right.double()
        expected += weight * theta.numpy()
    dense = draw(30, 40)
    partial.add_wide({"w": base}, {"w": dense}, 7.0)
    partial.complete()
    (partial,) = settled(None, [partial], {"w": base})
    np.testing.assert_allclose(
        partial.tensors["w"].numpy(), expected + 7 * dense.double().numpy(), rtol=1e-5, atol=1e-4
    )
    assert partial.tensors["w"].dtype == torch.float64
    assert partial.factor == 1.0


def test_a_product_that_finds_no_memory_costs_no_client_before_it(monkeypatch):
    g = torch.Generator().manual_seed(0)
    base, update = torch.zeros(20, 30), LowRank(torch.randn(13, 20, generator=g), torch.randn(13, 30, generator=g))
    found = WideSum(base)
    take = lambda weight: found.add(found.ready(update, weight), weight)  # noqa: E731
    take(2.0)

    def fails(*arguments, **named):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", fails)
        with pytest.raises(MemoryError):
            take(3.0)
    take(4.0)
    assert found.weight == 6.0
    torch.testing.assert_close(found.total(), 6 * update.left.T @ update.right)


def test_a_client_that_fails_at_its_second_wide_layer_is_in_neither_sum(monkeypatch):
    base = {"first": torch.ones(4, 5), "second": torch.ones(6, 7)}
    nothing = {n: LowRank(torch.zeros(1, len(v)), torch.zeros(1, v.shape[1])) for n, v in base.items()}
    partial, ready = Partial.of({}, 0.0), WideSum.ready
    partial.add_wide(base, nothing, 1.0)

    def fails(self, update, weight):
        if self is partial.wide["second"]:
            raise MemoryError
        return ready(self, update, weight)

    with monkeypatch.context() as patch:
        patch.setattr(WideSum, "ready", fails)
        with pytest.raises(MemoryError):
            partial.add_wide(base, nothing, 10.0)
    partial.add_wide(base, nothing, 1.0)
    partial.complete()
    assert partial.base == {"first": 2.0, "second": 2.0}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.lists(st.booleans(), min_size=1, max_size=9))
def test_blocks_of_updates_and_of_tensors_have_one_mean(seed, block, factored):
    """Whatever clients of a block ended with a tensor, and whatever blocks were added before the last came."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    base, count = draw(20, 30), len(factored)
    weights = torch.randint(1, 500, (count,), generator=g).double()
    updates = [LowRank(draw(3, 20), draw(3, 30)) if f else draw(20, 30) for f in factored]
    ends = [u if isinstance(u, torch.Tensor) else base + u.left.T @ u.right for u in updates]
    expected = np.average(torch.stack(ends).double().numpy(), axis=0, weights=weights.numpy())
    blocks, total = [], None
    for start in range(0, count, block):
        blocks.append(Partial.of({}, 0.0))
        for update, weight in list(zip(updates, weights.tolist()))[start : start + block]:
            blocks[-1].add_wide({"w": base}, {"w": update}, weight)
            blocks[-1].add({}, weight)
        blocks[-1].complete()
    together = mean(settled(None, [*blocks], {"w": base}), {"w": base})["w"]
    torch.testing.assert_close(together.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    for one in blocks:
        total = gather(total, [one])
    assert torch.equal(mean(settled(total, [], {"w": base}), {"w": base})["w"], together)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedavgm"])
def test_a_round_of_factors_is_a_round_of_tensors(dataset, strategy, epochs):
    """One epoch's examples leave the wide layer in factors, three epochs' have no room and are written."""
    sections = {
        "model": {"name": "mcmahan-cnn", "norm": "bn"},
        "algorithm": {"strategy": strategy},
        "training": {"dtype": "float64", "epochs": epochs},
        "simulation": {"workers": 0, "block": 3},
    }
    factored, dense = Small(dataset, **sections), Small(dataset, **sections)
    wide = "classifier.0.0.weight"
    assert came_as_factors(factored, wide) == (3 if epochs == 1 else 0)
    dense.federation.pool.worker.spec = replace(dense.spec, max_update_norm=1e9)
    assert came_as_factors(dense, wide) == 0
    ours, theirs = factored.run(2), dense.run(2)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("client", [0, 1])
def test_a_client_whose_factors_find_no_memory_is_in_no_sum(dataset, monkeypatch, client):
    sections = {"model": {"name": "mcmahan-cnn"}, "simulation": {"workers": 0, "block": 3}}
    small, others = Small(dataset, **sections), Small(dataset, **sections)
    small.federation.pool.worker.spec = replace(small.spec, debug=False)
    (order,) = small.strategy.orders(1, small.federation.shared)
    accepted, accept, ready = [], Worker._accept, WideSum.ready

    def accepting(self, order, outcomes, *of, **options):
        accepted[:] = outcomes.clients
        accept(self, order, outcomes, *of, **options)

    def failing(self, update, weight):
        if accepted == [client]:
            raise MemoryError
        return ready(self, update, weight)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_accept", accepting)
        patch.setattr(WideSum, "ready", failing)
        found = small.federation.train(order, [0, 1, 2]).mean(order.shared)
    assert [f.client for f in small.federation.failures] == [client]
    expected = others.federation.train(order, [c for c in range(3) if c != client]).mean(order.shared)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def came_as_factors(small, name):
    """Clients of a round whose update of a tensor came as factors."""
    count, add = 0, WideSum.add

    def counting(self, update, weight):
        nonlocal count
        count += isinstance(update, LowRank)
        add(self, update, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WideSum, "add", counting)
        (order,) = small.strategy.orders(1, small.strategy.init(small.federation.shared))
        small.federation.train(order, [0, 1, 2])
    assert name in order.shared
    return count


def block_sums(count: int) -> list[Partial]:
    """In float64, whose sums are rounded: of a few numbers in float32 they are exact, in any order."""
    tensors, weights = clients(3, count)
    return [Partial.of({"w": t["w"].double() / 3, "count": t["count"]}, w) for t, w in zip(tensors, weights)]


def grown(tree: Tree, count: int) -> list[Partial]:
    for partial in block_sums(count):
        tree.append(partial)
    return tree.settled({})


LIKE = {"w": torch.empty(4, 3, dtype=torch.float64), "count": torch.empty((), dtype=torch.int64)}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(2, 8))
def test_a_tree_has_the_same_bits_wherever_its_sums_are_added(count, fan):
    taken = []
    apart = Tree(fan, lambda: Apart(lambda sums: gather(None, [*sums]), lambda s: taken.append(s) or s))
    here, there = mean(grown(Tree(fan), count), LIKE), mean(grown(apart, count), LIKE)
    chain = mean(block_sums(count), LIKE)
    for name, value in here.items():
        assert torch.equal(value, there[name])
        torch.testing.assert_close(value, chain[name], rtol=1e-12, atol=1e-14)
        if count <= fan:
            assert torch.equal(value, chain[name])
    levels, full = 1, fan  # whoever holds the tree gets a sum of each level
    while count > full:
        levels, full = levels + 1, fan * (full + 1)
    assert len(taken) <= levels


def test_the_order_of_adding_shows_in_the_bits():
    """Or the test before could not fail."""
    means = [mean(grown(Tree(fan), 80), LIKE)["w"] for fan in (2, 3, 8, float("inf"))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(means, 2))


def test_the_sums_of_a_small_model_are_one_chain_and_those_of_a_large_one_a_tree():
    assert fan_of({"w": torch.empty(LARGE // 4 - 1)}) == float("inf")
    assert fan_of({"w": torch.empty(LARGE // 4)}) == FAN


def test_a_tree_adds_in_float64_what_the_updates_of_wide_layers_are_added_to():
    base = {"w": torch.full((2, 2), 0.5)}
    tree = Tree(2, Chain)
    for number in range(5):
        tree.append(Partial({"w": torch.full((2, 2), float(number))}, 2.0, base={"w": 2.0}))
    (total,) = tree.settled(base)
    assert total.tensors["w"].dtype is torch.float64
    assert total.tensors["w"].tolist() == [[15.0, 15.0]] * 2  # 0 + 1 + 2 + 3 + 4 and five times 2 * 0.5
    assert (total.weight, total.base) == (10.0, {})

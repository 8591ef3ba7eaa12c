"""Counts, blocks and the grow-and-prune step, against numpy and by property."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.models import build_model
from strategies import masks as m

SIZES = {"a": 400, "b": 3000, "c": 50}


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 5000), min_size=1), st.floats(0.001, 1.0))
def test_counts_are_exact_and_leave_no_layer_empty(sizes, density):
    counts = m.uniform_counts(sizes, density)
    assert sum(counts.values()) == max(round(density * sum(sizes.values())), len(sizes))
    assert all(1 <= counts[n] <= sizes[n] for n in sizes)


def test_noisy_counts_by_the_paper_in_numpy():
    """Layer densities are d + (u - 1/2) d; the first draw within 2 % is taken, then made exact on the largest layer."""
    d, counts = 0.1, m.noisy_counts(SIZES, 0.1, np.random.default_rng(3))
    draw = np.random.default_rng(3)
    while True:
        floors = [max(int(np.floor((d + (draw.random() - 0.5) * d) * n)), 1) for n in SIZES.values()]
        if abs(sum(floors) / sum(SIZES.values()) - d) / d < 0.02:
            break
    assert counts["a"] == floors[0]
    assert counts["c"] == floors[2]
    assert abs(counts["b"] - floors[1]) <= 0.02 * d * sum(SIZES.values())
    assert sum(counts.values()) == round(d * sum(SIZES.values()))


def test_prunable_leaves_out_the_first_layer_and_all_but_weights():
    names = m.prunable(build_model("resnet-18", classes=10, shape=(3, 32, 32)))
    assert "conv.weight" not in names
    assert "classifier.weight" in names
    model = build_model("resnet-18", classes=10, shape=(3, 32, 32))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in names) == 11_164_352 - 1728, "conv and fc weights but those of the first conv"


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet-18", 4), ("resnet-20", 3), ("vgg-11", 4), ("small-cnn", 2), ("digits-cnn", 3)],
)
def test_blocks_are_stages_or_pairs(name, count):
    names = m.prunable(build_model(name, classes=10, shape=(3, 32, 32)))
    blocks = m.blocks(names, "block")
    assert [n for b in blocks for n in b] == list(names)
    assert len(blocks) == count
    assert m.blocks(names, "layer") == [[n] for n in names]
    assert m.blocks(names, "entire") == [list(names)]


@given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.integers(0, 40))
def test_adjust_is_grow_and_prune_in_numpy(seed, density, amount):
    draw = np.random.default_rng(seed)
    mask = draw.random(60) < density
    weight = np.where(mask, draw.normal(size=60), 0.0)
    gradient = np.where(draw.random(60) < 0.8, draw.normal(size=60), 0.0)
    new_weight, new_mask = m.adjust(*map(torch.from_numpy, (weight, mask, gradient)), amount)

    candidates = [i for i in np.argsort(-np.abs(gradient)) if not mask[i] and gradient[i] != 0]
    a = min(amount, mask.sum(), len(candidates))
    smallest = [i for i in np.argsort(np.abs(weight)) if mask[i]][:a]
    expected, kept = mask.copy(), weight.copy()
    expected[smallest], kept[smallest] = False, 0.0
    expected[candidates[:a]] = True  # at weight 0
    assert np.array_equal(new_mask.numpy(), expected)
    assert np.array_equal(new_weight.numpy(), kept)
    assert new_mask.sum() == mask.sum()


def test_apply_leaves_no_negative_zero():
    out = m.apply({"w": torch.tensor([-1.0, 2.0])}, {"w": torch.tensor([False, True])})["w"]
    assert not torch.signbit(out).any()

"""Augmentations: seeded, shape-preserving, and what each does to a known image."""

import numpy as np
import pytest
import torch

from fedsim.data.augment import AUGMENTATIONS, augmentation, flip, rotate, shift
from fedsim.errors import ConfigError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_seeded_and_of_the_same_shape(name):
    x = torch.rand(6, 3, 16, 16)
    out = augmentation(name)(x, generator())
    assert out.shape == x.shape
    assert torch.equal(out, augmentation(name)(x, generator()))
    assert name == "none" or not torch.equal(out, augmentation(name)(x, generator(1)))


def test_flip_mirrors_or_leaves():
    x = torch.rand(64, 1, 2, 3)
    out = flip(x, generator())
    mirrored = [torch.equal(o, i.flip(2)) for o, i in zip(out, x)]
    assert 15 < sum(mirrored) < 49
    assert all(m or torch.equal(o, i) for m, o, i in zip(mirrored, out, x))


def test_rotation_by_nothing_is_nothing_and_keeps_the_centre():
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(rotate(x, generator(), degrees=0.0), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x, generator(), degrees=40.0)[:, :, 4, 4], x[:, :, 4, 4], atol=1e-4, rtol=1e-4)


def test_a_quarter_turn_of_an_image_that_is_not_square(monkeypatch):
    """What stays inside is numpy's rot90 of the middle square: nothing is sheared or stretched."""
    x = torch.rand(2, 1, 6, 12)
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.ones(count))  # the angle is then +degrees
    turned = rotate(x, generator(), degrees=90.0)[..., 3:9].numpy()
    np.testing.assert_allclose(turned, np.rot90(x[..., 3:9].numpy(), axes=(2, 3)), atol=1e-4)


def test_shift_moves_whole_pixels():
    x = torch.zeros(20, 1, 8, 8)
    x[:, 0, 4, 4] = 1
    out = shift(x, generator(), padding=2)
    assert (out.sum((1, 2, 3)) == 1).all()
    assert len({tuple(i.nonzero()[0].tolist()) for i in out}) > 5


def test_unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'flip'"):
        augmentation("flipp")

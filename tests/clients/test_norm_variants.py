"""Each normalization variant against its oracle (timm, torch or numpy), under both executors, and its state split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clients.norm_variants import ReplaceBatchNorm, WeightStandardizedConv2d, planes_of_ibn_a
from fedsim.errors import ConfigError
from fedsim.models import build_model
from fedsim.models.norm_layers import (
    AdaptiveMomentumBatchNorm2d,
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    EvoNormB0,
    EvoNormS0,
    GhostBatchNorm2d,
    InstanceBatchNorm2d,
)
from fedsim.registry import parts
from tests.conftest import Small, small_dataset
from tests.oracles import timm_module
from tests.test_engine import agree

VARIANTS = (
    "in",
    "bcn",
    "bcn-estimated",
    "ibn-a",
    "ghost",
    "evonorm-s0",
    "evonorm-b0",
    "adab2n",
    "pooled-statistics",
    "affine-only",
)


def images(batch: int = 6, channels: int = 8, seed: int = 0):
    return torch.randn(batch, channels, 5, 4, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "name"), [(EvoNormS0, "EvoNorm2dS0"), (EvoNormB0, "EvoNorm2dB0")])
def test_evonorm_equals_timm(ours, name):
    make = getattr(timm_module("layers.evo_norm"), name)
    mine, theirs = ours(8), make(8) if ours is EvoNormB0 else make(8, groups=8)
    with torch.no_grad():
        for p in mine.parameters():
            p.copy_(torch.rand(8) + 0.5)
    theirs.load_state_dict(mine.state_dict())
    for seed in range(3):
        close(mine(images(seed=seed)), theirs(images(seed=seed)))
    close(mine.eval()(images()), theirs.eval()(images()))


def test_weight_standardization_equals_timm():
    theirs = timm_module("layers.std_conv").StdConv2d(3, 4, 3, bias=False)
    mine = WeightStandardizedConv2d(3, 4, 3, padding=1, bias=False)
    mine.load_state_dict(theirs.state_dict())
    x = images(channels=3)
    close(mine(x), theirs(x))


def test_ghost_batch_norm_is_batch_norm_on_chunks():
    ghost, plain = GhostBatchNorm2d(8, 3), nn.BatchNorm2d(8)
    x = images(7)
    close(ghost(x), torch.cat([plain(x[:4]), plain(x[4:])]))  # 4 and 3, not 3, 3 and 1
    close(ghost.running_var, plain.running_var)
    close(ghost.eval()(x), plain.eval()(x))


def test_ibn_a_is_two_torch_layers_side_by_side():
    x = images()
    expected = torch.cat([nn.InstanceNorm2d(4)(x[:, :4]), nn.BatchNorm2d(4)(x[:, 4:])], 1)
    close(InstanceBatchNorm2d(8)(x), expected)


def test_batch_channel_norm_is_batch_norm_then_group_norm():
    layer, x = BatchChannelNorm2d(8, 2), images()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0]).view(1, 2, 1))
    group = nn.GroupNorm(2, 8)
    with torch.no_grad():
        group.weight.copy_(torch.tensor([2.0] * 4 + [3.0] * 4))
    close(layer(x), group(nn.BatchNorm2d(8)(x)))


def test_estimated_batch_norm_equals_numpy():
    layer, mean, var = EstimatedBatchNorm2d(8, rate=0.2), np.zeros(8), np.ones(8)
    for seed in range(3):
        x = images(1, seed=seed)
        z = x.double().numpy().transpose(1, 0, 2, 3).reshape(8, -1)
        var = 0.8 * var + 0.2 * ((z - mean[:, None]) ** 2).mean(1)
        mean = 0.8 * mean + 0.2 * z.mean(1)
        expected = ((z - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)).reshape(8, 1, 5, 4).transpose(1, 0, 2, 3)
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-5)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_adaptive_momentum_equals_its_recursion(kappa):
    layer, mean, eta = AdaptiveMomentumBatchNorm2d(8, kappa), np.zeros(8), 0.0
    for seed in range(4):
        x = images(seed=seed)
        eta = 0.1**kappa if seed == 0 else eta / (eta + 0.9**kappa)
        mean = (1 - eta) * mean + eta * x.double().mean((0, 2, 3)).numpy()
        close(layer(x), nn.BatchNorm2d(8)(x))
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    if kappa == 1:
        plain = nn.BatchNorm2d(8)
        for seed in range(4):
            plain(images(seed=seed))
        close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_agrees_with_the_loop(dataset, variant):
    sections = {"algorithm": {"normalization": variant}, "training": {"dtype": "float64"}}
    agree(*(Small(dataset, simulation={"executor": e}, **sections) for e in ("loop", "vmap")), rounds=1)


@pytest.mark.parametrize("variant", ["in", "bcn-estimated", "evonorm-s0", "standardized-weights", "gn"])
def test_trains_on_batches_of_one(dataset, variant):
    small = Small(dataset, algorithm={"normalization": variant}, training={"batch-size": 1, "steps": 3, "lr": 0.01})
    assert small.task.smallest_batch == 1
    assert all(torch.isfinite(v.float()).all() for v in small.run(1).values())


def test_only_the_affine_parameters_and_statistics_travel(dataset):
    task = Small(dataset, algorithm={"normalization": "affine-only"}).task
    assert {task.kinds[n] for n in task.initial()[0]} == {"affine", "stats", "counter"}


def test_evonorm_refuses_a_model_whose_relu_it_cannot_drop(dataset):
    with pytest.raises(ConfigError, match="no ReLU follows"):
        Small(dataset, algorithm={"normalization": "evonorm-s0"}, model={"name": "resnet-20"})


@pytest.mark.parametrize("variant", ["ghost", "evonorm-s0", "pooled-statistics"])
@pytest.mark.parametrize("model", [{"norm": "gn"}, {"name": "logistic"}])
def test_a_replacement_needs_batch_norm(dataset, variant, model):
    with pytest.raises(ConfigError, match="replaces BatchNorm, and the model has none"):
        Small(dataset, algorithm={"normalization": variant}, model=model)


def test_ibn_a_stands_where_its_paper_has_it():
    """After the first convolution of the residual blocks of all stages but the last, as the authors' resnet18_ibn_a."""
    blocks = build_model("resnet-18", classes=4, shape=(3, 16, 16), norm="bn")
    swapped = ReplaceBatchNorm(InstanceBatchNorm2d, choose=planes_of_ibn_a).prepare(blocks)
    found = [path for path, m in swapped.named_modules() if isinstance(m, InstanceBatchNorm2d)]
    assert found == [f"stages.{stage}.{block}.norm1" for stage in (0, 1, 2) for block in (0, 1)]
    plain = build_model("small-cnn", classes=4, shape=(3, 16, 16), norm="bn")
    swapped = ReplaceBatchNorm(InstanceBatchNorm2d, choose=planes_of_ibn_a).prepare(plain)
    assert [type(m[1]) for m in swapped.features] == [InstanceBatchNorm2d, InstanceBatchNorm2d, nn.BatchNorm2d]


def test_evonorm_b0_needs_a_batch_also_without_layers_over_vectors(tmp_path):
    images = small_dataset(tmp_path, shape=(3, 16, 16))
    small = Small(images, algorithm={"normalization": "evonorm-b0"}, model={"name": "vgg-11"})
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in small.task.model.modules())
    assert small.task.smallest_batch == 2


@pytest.mark.parametrize("variant", sorted(parts("normalization")))
def test_the_table_says_what_is_averaged(dataset, variant):
    """The row of clients/NORMALIZATION.md lists the kinds of tensors on the wire."""
    rows = (Path(__file__).parents[2] / "clients" / "NORMALIZATION.md").read_text().splitlines()
    (row,) = [r.split("|") for r in rows if r.startswith(f"| {variant} ")]
    task = Small(dataset, algorithm={"normalization": variant}).task
    kinds = lambda names: ", ".join(sorted({task.kinds[n] for n in names} - {"counter"})) or "none"  # noqa: E731
    assert row[3].strip() == kinds(task.initial()[0])
    assert row[4].strip() == kinds(task.private)
    assert row[5].strip() == str(task.smallest_batch)

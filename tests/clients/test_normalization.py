"""Weight standardization against timm and numpy; state splits by type; surgery on any model."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.normalization import (
    FixedStatistics,
    LocalNormalization,
    LocalStatistics,
    ReplaceNormalization,
    StandardizedConv2d,
    StandardizedWeights,
)
from fedsim.models import build_model
from fedsim.models.norm import NORM_TYPES, norm_names
from fedsim.types import Order
from tests.conftest import IMAGE_MODELS
from tests.oracles import timm_module

SHAPES = {"alexnet": (3, 64, 64), "logistic": (60,), "mcmahan-cnn": (3, 32, 32), "vit-tiny": (3, 32, 32)}


def build(name: str) -> nn.Module:
    return build_model(name, classes=10, shape=SHAPES.get(name, (3, 28, 28)), norm="bn")


@pytest.mark.parametrize(("groups", "padding"), [(1, 1), (4, 0)])
def test_standardized_convolution_equals_timm(groups, padding):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, padding=padding, groups=groups)
    ours = StandardizedConv2d(plain, gamma=1.7128585)
    theirs = timm_module("layers.std_conv").ScaledStdConv2d(
        8, 12, 3, padding=padding, groups=groups, gamma=1.7128585, eps=1e-12
    )
    gain = torch.rand(12, 1, 1, 1) + 0.5
    with torch.no_grad():
        ours.gain.copy_(gain)
        theirs.gain.copy_(gain)
        theirs.weight.copy_(plain.weight)
        theirs.bias.copy_(plain.bias)
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    # and the gradient of the weight, which flows through mean and variance
    (mine,) = torch.autograd.grad(ours(x).square().sum(), [ours.weight])
    (timms,) = torch.autograd.grad(theirs(x).square().sum(), [theirs.weight])
    torch.testing.assert_close(mine, timms, rtol=1e-4, atol=1e-3)


def test_every_filter_has_norm_gain_times_gamma():
    conv = StandardizedConv2d(nn.Conv2d(16, 5, 3), gamma=1.5)
    with torch.no_grad():
        conv.gain.copy_(torch.arange(1.0, 6.0).view(5, 1, 1, 1))
    w = conv.weight.detach().double().numpy().reshape(5, -1)
    expected = (w - w.mean(1, keepdims=True)) / (w.std(1, keepdims=True) * np.sqrt(w.shape[1]))
    expected *= 1.5 * np.arange(1, 6)[:, None]
    found = conv.standardized().detach().numpy().reshape(5, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.5 * np.arange(1, 6), rtol=1e-6)


def test_a_constant_filter_stays_finite():
    conv = StandardizedConv2d(nn.Conv2d(2, 2, 3))
    nn.init.constant_(conv.weight, 3.0)
    out = conv(torch.randn(1, 2, 5, 5)).sum()
    out.backward()
    assert torch.isfinite(conv.weight.grad).all()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_fedwon_strips_every_norm_and_standardizes_every_convolution(name):
    model = StandardizedWeights().prepare(build(name))
    modules = list(model.modules())
    assert not any(isinstance(m, NORM_TYPES) for m in modules)
    assert all(isinstance(m, StandardizedConv2d) for m in modules if isinstance(m, nn.Conv2d))
    assert not any("gain" in n for n, m in model.named_modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("name", [n for n in IMAGE_MODELS if n != "logistic"])
def test_fedbn_keeps_every_normalization_tensor_and_silobn_the_statistics(name):
    model = build(name)
    count = sum(isinstance(m, NORM_TYPES) for m in model.modules())
    private = LocalNormalization().private(model)
    assert private == norm_names(model)
    statistics = 0 if name.startswith("vit") else 3  # LayerNorm has none: mean, variance, counter
    assert len(private) == (2 + statistics) * count  # gamma, beta
    assert len(LocalStatistics().private(model)) == statistics * count
    assert not private & {n for n, p in model.named_parameters() if p.dim() > 1}


def test_layers_with_other_names_are_found():
    block = nn.ModuleDict(
        {"downsample": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "abnormal": nn.Linear(4, 4)}
    )
    assert LocalNormalization().private(block) == {
        f"downsample.1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("kind", ["gn", "ln"])
@pytest.mark.parametrize("name", ["resnet-18", "digits-cnn"])
def test_replaced_models_are_those_built_with_that_norm(name, kind):
    swapped = ReplaceNormalization(kind).prepare(build(name))
    built = build_model(name, classes=10, shape=(3, 28, 28), norm=kind)
    shapes = lambda model: {n: tuple(v.shape) for n, v in model.state_dict().items()}  # noqa: E731
    assert shapes(swapped) == shapes(built)


def test_fixed_statistics_freeze_batchnorm_only_and_only_late():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    plugin = FixedStatistics(last=5)
    for round, training in ((5, True), (6, False)):
        model.train()
        plugin.begin(model, Order(round, {}))
        assert [m.training for m in model] == [True, training, True]
    x = torch.randn(4, 3, 5, 5) + 3
    before = model[1].running_mean.clone()
    model(x).sum().backward()
    assert torch.equal(model[1].running_mean, before)
    assert model[1].weight.grad is not None

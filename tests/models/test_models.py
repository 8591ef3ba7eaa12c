"""The whole zoo, every normalization: shape, gradients, counts, state split by type, vmap."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models import build_model
from fedsim.models.norm import classify, make_norm, norm_names, replace_modules
from tests.conftest import IMAGE_MODELS
from tests.oracles import timm_module

SHAPES = {"alexnet": (3, 64, 64), "logistic": (60,), "mcmahan-cnn": (3, 32, 32), "vit-tiny": (3, 32, 32)}
PARAMETERS = {  # at 10 classes, with BatchNorm
    "digits-cnn": 14_219_210,  # FedBN's digits network; stated by Flower's fedbn baseline
    "alexnet": 57_063_498,  # FedBN's AlexNet
    "resnet-18": 11_173_962,  # the CIFAR ResNet-18
    "resnet-20": 272_474,  # He et al. 2016 state 0.27 M
    "vgg-11": 9_231_114,  # 9,220,480 of convolutions with bias, 5,504 of gamma and beta, 5,130 of the classifier
    "mobilenet-v2": 2_223_872 + 1280 * 10 + 10,  # torchvision's features and a classifier for 10 classes
    "logistic": 60 * 10 + 10,
    "lenet": 456 + 2416 + 48_120 + 10_164 + 850 + 2 * (6 + 16 + 120 + 84),  # LeCun's layers on 3 channels, norms
    "mcmahan-cnn": 2_156_490 + 2 * (32 + 64 + 512),  # McMahan et al. 2017 state about 10^6; norms added
    "small-cnn": (3 * 25 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + 1025 * 64 + 650 + 2 * (16 + 32 + 64 + 64),
    # cls, positions, patches; blocks of 12 C^2 + 13 C; last norm; classifier
    "vit-tiny-32": 96 * (1 + 50) + (3 * 16 + 1) * 96 + 4 * (12 * 96**2 + 13 * 96) + 2 * 96 + 970,
    "vit-tiny": 192 * (1 + 5) + (3 * 256 + 1) * 192 + 12 * (12 * 192**2 + 13 * 192) + 2 * 192 + 1930,
}


def make(name: str, norm: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    shape = SHAPES.get(name, (3, 28, 28))
    return build_model(name, classes=10, shape=shape, norm=norm), shape


def test_the_table_above_is_the_whole_zoo():
    assert sorted(PARAMETERS) == IMAGE_MODELS


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "none"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_forward_backward_and_state(name, norm):
    model, shape = make(name, norm)
    if norm == "bn":
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 10)
    F.cross_entropy(out, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    kinds = classify(model)
    assert kinds.keys() == model.state_dict().keys()
    has = {kind for kind in kinds.values()}
    vit = name.startswith("vit")  # has LayerNorm, whatever the norm
    normed = name != "logistic" and not vit
    assert ("stats" in has) == ("counter" in has) == (norm == "bn" and normed)
    assert ("affine" in has) == ((norm != "none" and normed) or vit)


@pytest.mark.parametrize("name", [n for n in IMAGE_MODELS if n not in ("alexnet", "resnet-18", "vgg-11")])
def test_vmap_over_clients_equals_the_loop(name):
    model, shape = make(name, "bn")
    model = model.double()
    params = {n: torch.stack([p, p + 0.01]) for n, p in model.named_parameters()}
    buffers = {n: torch.stack([b, b]) for n, b in model.named_buffers()}
    x, y = torch.randn(2, 4, *shape, dtype=torch.float64), torch.randint(0, 10, (2, 4))

    def loss(params, buffers, x, y):
        buffers = {n: b.clone() for n, b in buffers.items()}
        return F.cross_entropy(functional_call(model, {**params, **buffers}, (x,)), y)

    stacked = vmap(grad(loss))({n: p.detach() for n, p in params.items()}, buffers, x, y)
    for i in range(2):
        single = grad(loss)(
            {n: p[i].detach() for n, p in params.items()}, {n: b[i] for n, b in buffers.items()}, x[i], y[i]
        )
        for n in single:
            torch.testing.assert_close(stacked[n][i], single[n], rtol=1e-7, atol=1e-9)


def test_norms_are_found_by_type_whatever_they_are_called():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(4))
    assert norm_names(model) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked", "4.weight", "4.bias"
    }  # fmt: skip
    assert norm_names(nn.BatchNorm1d(3)) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    misleading = nn.ModuleDict({"bn_free": nn.Linear(2, 2)})
    assert norm_names(misleading) == set()
    assert set(classify(misleading).values()) == {"weight"}


def test_replace_modules_reaches_every_depth():
    model, _ = make("resnet-18", "bn")
    replaced = replace_modules(model, lambda path, m: nn.Identity() if isinstance(m, nn.BatchNorm2d) else None)
    assert norm_names(replaced) == set()
    assert isinstance(replace_modules(nn.BatchNorm2d(2), lambda p, m: nn.Identity()), nn.Identity)


def test_layer_and_group_norm_are_timms():
    timm = timm_module("layers.norm")
    x = torch.randn(2, 48, 5, 5)
    torch.testing.assert_close(make_norm("ln", 48)(x), timm.GroupNorm1(48)(x))
    torch.testing.assert_close(make_norm("gn", 48)(x), timm.GroupNorm(48, num_groups=16)(x))  # gcd(32, 48) = 16


def test_unknown_names_and_shapes_are_explained():
    with pytest.raises(ConfigError, match="did you mean 'small-cnn'"):
        build_model("smal-cnn", classes=10, shape=(3, 28, 28))
    with pytest.raises(ConfigError, match="64x64"):
        build_model("alexnet", classes=10, shape=(3, 28, 28))

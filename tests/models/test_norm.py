"""Normalization layers are found by type in any torch model: subclasses, wrapped, shared and misnamed ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fedsim.errors import ConfigError
from fedsim.models import build_model
from fedsim.models.norm import classify, make_norm, norm_names, replace_modules
from tests.conftest import IMAGE_MODELS

TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


class Recalibrated(nn.BatchNorm2d):
    """A subclass with a tensor of its own."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.mix = nn.Parameter(torch.zeros(channels))
        self.register_buffer("source_mean", torch.zeros(channels))


class Stem(nn.Module):
    """Nothing is called bn, and what is called bn is none."""

    def __init__(self):
        super().__init__()
        self.bn_projection = nn.Conv2d(3, 4, 1)
        self.scale = Recalibrated(4)
        self.register_buffer("bn_table", torch.zeros(2))


def test_subclasses_and_misleading_names():
    kinds = classify(Stem())
    assert kinds == {
        "bn_projection.weight": "weight",
        "bn_projection.bias": "weight",
        "bn_table": "buffer",
        "scale.weight": "affine",
        "scale.bias": "affine",
        "scale.mix": "affine",
        "scale.running_mean": "stats",
        "scale.running_var": "stats",
        "scale.num_batches_tracked": "counter",
        "scale.source_mean": "buffer",
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_type_of_torch_has_its_tensors_found(layer):
    assert norm_names(nn.Sequential(nn.Linear(4, 4), layer)) == {f"1.{n}" for n in layer.state_dict()} != set()


def test_a_parametrized_norm_is_still_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), parametrizations.weight_norm(nn.GroupNorm(2, 4)))
    assert {n for n in model.state_dict() if n.startswith("1.")} == norm_names(model)


def test_a_shared_layer_has_all_its_names_and_is_replaced_once():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm)
    assert norm_names(model) == {f"{i}.{n}" for i in (1, 3) for n in TENSORS} <= classify(model).keys()
    asked = []

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        asked.append(path)
        return nn.LayerNorm(4) if module is norm else None

    replaced = replace_modules(model.eval(), swap)
    assert replaced[1] is replaced[3]
    assert not replaced[1].training  # as the layer it replaces
    assert asked == ["", "0", "1", "2"]


@pytest.mark.parametrize("channels", [6, 16, 48, 64, 84, 512, 2048])
def test_group_norm_on_vectors_keeps_the_values(channels):
    layer, x = make_norm("gn", channels, dims=1), torch.randn(8, channels, dtype=torch.float64)
    assert channels % layer.num_groups == 0
    assert channels // layer.num_groups >= min(16, channels)
    groups = x.numpy().reshape(8, layer.num_groups, -1)
    expected = (groups - groups.mean(-1, keepdims=True)) / (groups.var(-1, keepdims=True) + layer.eps) ** 0.5
    torch.testing.assert_close(layer.double()(x), torch.from_numpy(expected.reshape(8, channels)))


def test_layer_norm_of_images_is_torchs_over_channels_and_pixels():
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(make_norm("ln", 6)(x), F.layer_norm(x, (6, 5, 5)))


def test_norm_none_has_no_norm_and_an_unknown_one_is_refused():
    assert not list(make_norm("none", 8).parameters())
    with pytest.raises(ConfigError, match="known: bn, gn, ln, none"):
        make_norm("batch", 8)


@pytest.mark.parametrize("name", [n for n in IMAGE_MODELS if n != "alexnet"])
def test_models_are_a_function_of_the_seed_and_copy(name):
    shape = (3, 32, 32) if name == "vit-tiny" else (3, 28, 28)
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(build_model(name, classes=10, shape=shape))
    state, again = built[0].state_dict(), copy.deepcopy(built[1]).state_dict()
    assert all(torch.equal(state[n], again[n]) for n in state)
    before = torch.get_rng_state()
    built[0](torch.randn(2, *shape, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)  # no randomness in the forward pass


def test_published_parameter_counts_of_other_inputs():
    def count(name: str, shape: tuple[int, ...]) -> int:
        return sum(p.numel() for p in build_model(name, classes=10, shape=shape, norm="none").parameters())

    assert count("mcmahan-cnn", (1, 28, 28)) == 1_663_370  # stated in McMahan et al. 2017
    assert count("mcmahan-cnn", (3, 32, 32)) == 2_432 + 51_264 + 2_097_664 + 5_130 == 2_156_490
    assert count("lenet", (1, 28, 28)) == 61_706  # LeNet-5, every map connected

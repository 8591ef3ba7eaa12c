"""Small convolutional networks.

digits-cnn   FedBN's network for Digits-Five (Li et al., ICLR 2021), 14,219,210 parameters at 10 classes
small-cnn    90,954 parameters, one per cent of its work, for a laptop: trains in seconds
lenet        LeNet-5 with ReLU and max pooling (LeCun et al. 1998), normalization after each hidden layer
mcmahan-cnn  the CIFAR network of the FedAvg paper (McMahan et al. 2017), 2,156,490 parameters at 10 classes
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedsim.models import image_shape, register
from fedsim.models.norm import make_norm


def conv(
    inputs: int,
    outputs: int,
    kernel: int,
    norm: str,
    *,
    stride: int = 1,
    pool: bool = True,
    padding: int | None = None,
) -> nn.Module:
    """Convolution, normalization, 2x2 max pooling if asked for, and ReLU: which, being monotone, may as well come last,
    with the same values and gradients and a quarter of the work."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding)
    pooling = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(convolution, make_norm(norm, outputs, dims=2), *pooling, nn.ReLU())


def dense(inputs: int, outputs: int, norm: str) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), make_norm(norm, outputs, dims=1), nn.ReLU())


class ConvNet(nn.Sequential):
    """Convolutional features, then a fully connected classifier: [B, C, H, W] -> [B, classes]."""

    def __init__(self, features: nn.Module, classifier: nn.Module):
        super().__init__(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


@register("digits-cnn")
def digits_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    c, h, w = image_shape(shape, 4)
    features = nn.Sequential(
        conv(c, 64, 5, norm),  # [64, 14, 14]
        conv(64, 64, 5, norm),  # [64, 7, 7]
        conv(64, 128, 5, norm, pool=False),  # [128, 7, 7]
    )
    flat = 128 * (h // 4) * (w // 4)
    return ConvNet(features, nn.Sequential(dense(flat, 2048, norm), dense(2048, 512, norm), nn.Linear(512, classes)))


@register("small-cnn")
def small_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    """Strides in place of pooling: a step of 32 images takes some 3 ms on one core."""
    c, h, w = image_shape(shape, 8)
    features = nn.Sequential(
        conv(c, 16, 5, norm, stride=2, pool=False),  # [16, 14, 14]
        conv(16, 32, 3, norm, stride=2, pool=False),  # [32, 7, 7]
        conv(32, 64, 3, norm, stride=2, pool=False),  # [64, 4, 4]
    )
    flat = 64 * -(-h // 8) * -(-w // 8)
    return ConvNet(features, nn.Sequential(dense(flat, 64, norm), nn.Linear(64, classes)))


@register("lenet")
def lenet(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    c, h, w = image_shape(shape, 16)
    features = nn.Sequential(conv(c, 6, 5, norm), conv(6, 16, 5, norm, padding=0))  # [16, 5, 5] of 28x28
    flat = 16 * ((h // 2 - 4) // 2) * ((w // 2 - 4) // 2)
    return ConvNet(features, nn.Sequential(dense(flat, 120, norm), dense(120, 84, norm), nn.Linear(84, classes)))


@register("mcmahan-cnn")
def mcmahan_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    """Two 5x5 convolutions (32, 64) and a layer of 512; the paper's has no normalization: use norm = "none"."""
    c, h, w = image_shape(shape, 4)
    features = nn.Sequential(conv(c, 32, 5, norm), conv(32, 64, 5, norm))  # [64, 8, 8] of 32x32
    flat = 64 * (h // 4) * (w // 4)
    return ConvNet(features, nn.Sequential(dense(flat, 512, norm), nn.Linear(512, classes)))

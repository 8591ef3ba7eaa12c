"""Layer, norm, ReLU: the step that most convolutional networks repeat."""

from __future__ import annotations

from torch import nn

from fedsim.models.norm import make_norm


def conv_block(inputs: int, outputs: int, kernel: int, norm: str, **options) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, **options), make_norm(norm, outputs, dims=2), nn.ReLU()]


def linear_block(inputs: int, outputs: int, norm: str) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), make_norm(norm, outputs, dims=1), nn.ReLU()]

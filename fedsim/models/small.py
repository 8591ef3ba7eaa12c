"""A small convolutional network for digits: minutes of federated training on one CPU core, not a published model."""

from __future__ import annotations

from torch import nn

from fedsim.models.blocks import conv_block, linear_block
from fedsim.models.registry import image_shape, register


@register("small-cnn")
def small_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    channels, height, width = image_shape(shape, at_least=8)
    pixels = (height // 8) * (width // 8)
    return nn.Sequential(  # [B, 3, 28, 28]
        *conv_block(channels, 16, 5, norm, padding=2),
        nn.MaxPool2d(2),  # [B, 16, 14, 14]
        *conv_block(16, 32, 3, norm, padding=1),
        nn.MaxPool2d(2),  # [B, 32, 7, 7]
        *conv_block(32, 32, 3, norm, padding=1),
        nn.MaxPool2d(2),  # [B, 32, 3, 3]
        nn.Flatten(),  # [B, 288]
        *linear_block(32 * pixels, 64, norm),
        nn.Linear(64, classes),
    )

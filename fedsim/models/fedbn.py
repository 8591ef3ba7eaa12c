"""The two networks of FedBN.

Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021,
appendix. Every convolution and linear layer has a bias; no dropout, no pre-trained weights.

Deviation: their state-dict names (``features.bn1``) are not kept, as the layers here need not be BatchNorm.
"""

from __future__ import annotations

from torch import nn

from fedsim.models.blocks import conv_block, linear_block
from fedsim.models.registry import image_shape, register


@register("digits-cnn")
def digits_cnn(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    """Three convolutions and three linear layers; 14,219,210 parameters for 3 x 28 x 28 and 10 classes."""
    channels, height, width = image_shape(shape, at_least=4)
    pixels = (height // 4) * (width // 4)
    return nn.Sequential(  # [B, 3, 28, 28]
        *conv_block(channels, 64, 5, norm, padding=2),
        nn.MaxPool2d(2),  # [B, 64, 14, 14]
        *conv_block(64, 64, 5, norm, padding=2),
        nn.MaxPool2d(2),  # [B, 64, 7, 7]
        *conv_block(64, 128, 5, norm, padding=2),  # [B, 128, 7, 7]
        nn.Flatten(),  # [B, 6272]
        *linear_block(128 * pixels, 2048, norm),
        *linear_block(2048, 512, norm),
        nn.Linear(512, classes),
    )

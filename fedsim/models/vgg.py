"""VGG-11 with normalization (Simonyan and Zisserman, ICLR 2015), configuration A for small images: a linear classifier
on globally pooled features in place of the three wide layers. 9,231,114 parameters at 10 classes."""

from __future__ import annotations

from torch import nn

from fedsim.models import image_shape, register
from fedsim.models.cnn import ConvNet, conv

# (channels, pooled after)
PLAN = ((64, True), (128, True), (256, False), (256, True), (512, False), (512, True), (512, False), (512, False))


@register("vgg-11")
def vgg_11(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    inputs, layers = image_shape(shape, 16)[0], []
    for channels, pool in PLAN:
        layers.append(conv(inputs, channels, 3, norm, pool=pool))
        inputs = channels
    return ConvNet(nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1)), nn.Linear(inputs, classes))

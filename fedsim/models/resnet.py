"""Residual networks for small images (He et al., CVPR 2016): a 3x3 stem of stride 1 and no first pooling.

resnet-18  stages of 64, 128, 256, 512 channels, two blocks each, 1x1 projections: 11,173,962 parameters at 10 classes
resnet-20  stages of 16, 32, 64 channels, three blocks each, projections ("option B"): 272,474 parameters at 10 classes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models import image_shape, register
from fedsim.models.norm import make_norm


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = make_norm(norm, outputs, dims=2)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = make_norm(norm, outputs, dims=2)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, make_norm(norm, outputs, dims=2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, channels: int, widths: tuple[int, ...], blocks: int, classes: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.norm = make_norm(norm, widths[0], dims=2)
        stages, inputs = [], widths[0]
        for number, width in enumerate(widths):
            strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
            layers = [BasicBlock(inputs if i == 0 else width, width, s, norm) for i, s in enumerate(strides)]
            stages.append(nn.Sequential(*layers))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(F.relu(self.norm(self.conv(x))))  # [B, C, H / 2^(stages - 1), ...]
        return self.classifier(torch.mean(h, dim=(2, 3)))


@register("resnet-18")
def resnet_18(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return ResNet(image_shape(shape, 8)[0], (64, 128, 256, 512), 2, classes, norm)


@register("resnet-20")
def resnet_20(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return ResNet(image_shape(shape, 8)[0], (16, 32, 64), 3, classes, norm)

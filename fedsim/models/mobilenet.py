"""MobileNetV2 (Sandler et al., CVPR 2018) for small images: the stem and the second stage keep their resolution.

2,236,682 parameters at 10 classes, the width-1.0 network's 2,223,872 plus a classifier of 12,810. No dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.models import image_shape, register
from fedsim.models.norm import make_norm

# expansion, channels, blocks, stride of the first block
PLAN = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def unit(
    inputs: int, outputs: int, kernel: int, stride: int, norm: str, groups: int = 1, act: bool = True
) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, make_norm(norm, outputs, dims=2), *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm: str):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *([unit(inputs, hidden, 1, 1, norm)] if expansion > 1 else []),
            unit(hidden, hidden, 3, stride, norm, groups=hidden),
            unit(hidden, outputs, 1, 1, norm, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    def __init__(self, channels: int, classes: int, norm: str):
        super().__init__()
        layers, inputs = [unit(channels, 32, 3, 1, norm)], 32
        for expansion, outputs, blocks, stride in PLAN:
            for number in range(blocks):
                layers.append(InvertedResidual(inputs, outputs, stride if number == 0 else 1, expansion, norm))
                inputs = outputs
        self.features = nn.Sequential(*layers, unit(inputs, 1280, 1, 1, norm))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.mean(self.features(x), dim=(2, 3)))


@register("mobilenet-v2")
def mobilenet_v2(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return MobileNetV2(image_shape(shape, 8)[0], classes, norm)

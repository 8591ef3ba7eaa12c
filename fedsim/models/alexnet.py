"""FedBN's AlexNet with BatchNorm (Li et al., ICLR 2021) for Office-Caltech-10 and DomainNet-10.

AlexNet (Krizhevsky et al. 2012, the one-column form of 2014) with a normalization layer after every hidden layer, no
dropout and no pre-training: 57,063,498 parameters at 10 classes. Pooled to 6x6 before the classifier, so that it takes
images of any size from 64 pixels on.
"""

from __future__ import annotations

from torch import nn

from fedsim.models import image_shape, register
from fedsim.models.cnn import ConvNet, dense
from fedsim.models.norm import make_norm


@register("alexnet")
def alexnet(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    c, _, _ = image_shape(shape, 64)

    def layer(inputs: int, outputs: int, kernel: int, stride: int, padding: int, pool: bool) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        pooling = [nn.MaxPool2d(3, 2)] if pool else []
        return nn.Sequential(convolution, make_norm(norm, outputs, dims=2), *pooling, nn.ReLU())

    features = nn.Sequential(
        layer(c, 64, 11, 4, 2, pool=True),  # [64, 31, 31] of 256x256
        layer(64, 192, 5, 1, 2, pool=True),  # [192, 15, 15]
        layer(192, 384, 3, 1, 1, pool=False),
        layer(384, 256, 3, 1, 1, pool=False),
        layer(256, 256, 3, 1, 1, pool=True),  # [256, 7, 7]
        nn.AdaptiveAvgPool2d(6),  # [256, 6, 6]
    )
    head = nn.Sequential(dense(256 * 36, 4096, norm), dense(4096, 4096, norm), nn.Linear(4096, classes))
    return ConvNet(features, head)

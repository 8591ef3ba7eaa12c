"""Multinomial logistic regression on the flattened example: F * classes + classes parameters."""

from __future__ import annotations

from math import prod

from torch import nn

from fedsim.models import register


@register("logistic")
def logistic(classes: int, shape: tuple[int, ...], norm: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))

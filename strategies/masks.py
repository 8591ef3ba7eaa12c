"""Masks as pure functions: what may be pruned, how many weights each layer keeps, and one grow-and-prune step.

A mask is a bool tensor of its weight's shape, True where the weight is kept; masks go by the weight's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.types import Tensors


def prunable(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights of convolutions and linear layers in the model's order, the first layer left out.

    The first layer is small and every later one sees the image through it; biases and normalization are not pruned.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    return tuple(f"{path}.weight" for path in layers[1:])


def blocks(names: Sequence[str], granularity: str) -> list[list[str]]:
    """Groups of weights that are adjusted together, in the model's order.

    ``layer``: each by itself. ``entire``: all. ``block``: those below the same stage or residual block (the first two
    parts of the path), a classifier with the last of them; pairs of layers in a model without stages (VGG).
    """
    if granularity == "layer":
        return [[n] for n in names]
    if granularity == "entire":
        return [list(names)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    found = list(groups.values())
    if all(len(g) == 1 for g in found):
        return [list(names[i : i + 2]) for i in range(0, len(names), 2)]
    if len(found[-1]) == 1:
        found[-2:] = [found[-2] + found[-1]]
    return found


def uniform_counts(sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """Weights that each layer keeps at the same density in every layer; together round(density * all)."""
    return exact({n: math.floor(density * size) for n, size in sizes.items()}, sizes, density)


def noisy_counts(sizes: Mapping[str, int], density: float, draw: np.random.Generator, most: int = 10_000):
    """FedTiny's candidate: layer densities d_l ~ U[d/2, 3d/2], drawn until together they are within 2 % of d.

    Then made exact, so that every candidate, and every method compared, has the same density.

    Raises:
        ValueError: no draw was accepted (a model of one tiny layer).
    """
    total = sum(sizes.values())
    for _ in range(most):
        counts = {n: max(math.floor((density + (draw.random() - 0.5) * density) * s), 1) for n, s in sizes.items()}
        if abs(sum(counts.values()) / total - density) / density < 0.02:
            return exact(counts, sizes, density)
    raise ValueError(f"no layer densities within 2 % of {density} in {most} draws")


def exact(counts: Mapping[str, int], sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """Counts that sum to round(density * all weights), each layer keeping at least one weight.

    The difference goes to the largest layers, where it changes the density least.
    """
    out = {n: min(max(c, 1), sizes[n]) for n, c in counts.items()}
    missing = max(round(density * sum(sizes.values())), len(sizes)) - sum(out.values())
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        change = min(max(missing, 1 - out[name]), sizes[name] - out[name])
        out[name] += change
        missing -= change
    return out


def top(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.reshape(-1).topk(count).indices] = True
    return mask.view(scores.shape)


def magnitude(weights: Tensors, counts: Mapping[str, int]) -> Tensors:
    """The largest weights of each layer."""
    return {n: top(weights[n].abs(), c) for n, c in counts.items()}


def apply(tensors: Tensors, masks: Tensors) -> Tensors:
    """Zeros where a mask prunes (+0.0: a product with the mask would leave -0.0)."""
    return {n: torch.where(masks[n], v, 0) if n in masks else v for n, v in tensors.items()}


def density(masks: Tensors) -> float:
    """Kept share of all masked weights."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def adjust(weight: Tensor, mask: Tensor, gradient: Tensor, amount: int) -> tuple[Tensor, Tensor]:
    """Grow the ``amount`` pruned positions of largest |gradient| at weight 0, prune as many of the smallest weights.

    A position pruned here cannot grow in the same step, nor a grown one be pruned. Fewer move if fewer pruned
    positions have a gradient, so the number of kept weights never changes.

    Returns:
        (weight, mask) after the step.
    """
    candidates = torch.where(mask, 0, gradient.abs()).reshape(-1)
    amount = min(amount, int(mask.sum()), int((candidates > 0).sum()))
    smallest = torch.where(mask, weight.abs(), torch.inf).reshape(-1)
    new = mask.clone().reshape(-1)
    new[smallest.topk(amount, largest=False).indices] = False
    kept = torch.where(new.view(mask.shape), weight, 0)
    new[candidates.topk(amount).indices] = True
    return kept, new.view(mask.shape)

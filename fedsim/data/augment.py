"""Augmentation as tensor code, each function drawing from the generator it is given: x float [B, C, H, W] -> same."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.errors import ConfigError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability one half."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored.to(x.device).view(-1, 1, 1, 1), x.flip(3), x)


def rotate(x: Tensor, generator: torch.Generator, degrees: float = 30.0) -> Tensor:
    """Rotate each image by an angle uniform in +-degrees, bilinear, zeros outside."""
    height, width = x.shape[2:]  # the grid runs from -1 to 1 along both axes, so that a plain rotation would shear
    angle = (torch.rand(len(x), generator=generator) * 2 - 1) * math.radians(degrees)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(len(x))
    rows = [[cos, -sin * height / width, zero], [sin * width / height, cos, zero]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1).to(x)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def shift(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random crop of the image padded with zeros."""
    height, width = x.shape[2:]
    padded = F.pad(x, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, r : r + height, c : c + width] for image, (r, c) in zip(padded, offsets)])


AUGMENTATIONS: dict[str, tuple[Augmentation, ...]] = {
    "none": (),
    "flip": (flip,),
    "flip-rotate": (flip, rotate),  # FedBN's, on Office-Caltech-10 and DomainNet-10
    "crop-flip": (shift, flip),  # the usual one on CIFAR
}


def augmentation(name: str) -> Augmentation:
    """A chain of augmentations by name.

    Raises:
        ConfigError: no such name.
    """
    if name not in AUGMENTATIONS:
        near = difflib.get_close_matches(name, AUGMENTATIONS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(AUGMENTATIONS)}"
        raise ConfigError(f"training.augment = '{name}': no such augmentation; {hint}")

    def apply(x: Tensor, generator: torch.Generator) -> Tensor:
        for step in AUGMENTATIONS[name]:
            x = step(x, generator)
        return x

    return apply

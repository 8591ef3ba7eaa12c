"""Floating-point operations of a model, counted by torch on a forward pass."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of one example's forward pass by module path; '' is the whole model.

    ``example`` has no batch dimension; convolutions and matrix products count, elementwise work does not.
    """
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example.unsqueeze(0))
    root = type(model).__name__
    counts = counter.get_flop_counts()
    totals = {path: sum(ops.values()) for path, ops in counts.items()}
    named = {p.removeprefix(root + "."): n for p, n in totals.items() if p not in (root, "Global")}
    return {**named, "": totals.get("Global", 0)}


def training_flops(forward: int) -> int:
    """Forward and backward of one example: three times the forward pass (Evci et al. 2020)."""
    return 3 * forward

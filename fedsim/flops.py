"""Floating-point operations of a model, counted by torch on a forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from fedsim.types import Tensors

# Torch hides the counter from its compiler by a wrapper that loads all of it: 1.6 s and 60 MB to count once.
_FlopCounterMode.__torch_dispatch__ = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)  # type: ignore[method-assign]


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


def masked_flops(forward: Mapping[str, int], masks: Tensors) -> float:
    """FLOPs of a forward pass whose masked layers skip what is pruned: each scaled by its density.

    Forward and backward together are three such passes; a dense gradient of the weights makes one of them dense
    (Evci et al. 2020).
    """
    saved = 0.0
    for name, mask in masks.items():
        saved += forward.get(name.rpartition(".")[0], 0) * (1 - int(mask.sum()) / mask.numel())
    return forward[""] - saved


def training_memory(parameters: int, masks: Tensors, dense_gradient: bool = False) -> int:
    """Bytes of weights and gradients in single precision, sparse ones as value and two indices (COO).

    As FedTiny's paper counts; activations are not in it. ``parameters``: of the whole model, masked or not.
    """
    masked, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    weights = 3 * kept + parameters - masked
    return 4 * (weights + (parameters if dense_gradient else weights))

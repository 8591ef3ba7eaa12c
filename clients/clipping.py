"""Adaptive gradient clipping (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization",
ICML 2021), unit by unit:

    g_i <- g_i * clip * max(||w_i||, eps) / ||g_i||     if ||g_i|| > clip * max(||w_i||, eps)

A unit is an output row of a linear layer or an output filter of a convolution; a bias or a gain is one unit as a whole
(timm's and DeepMind's convention; dimension 0 is the output in PyTorch).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.plugin import Plugin
from fedsim.types import Tensors, View


def unitwise_norm(x: Tensor) -> Tensor:
    """||x_i|| of every output unit, broadcastable to x: [O, ...] -> [O, 1, ...]; of a vector or scalar: one norm."""
    if x.squeeze().dim() <= 1:
        return x.norm()
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))


class AdaptiveGradientClipping(Plugin):
    """Args: clip: lambda of the paper. eps: floor of ||w_i||. skip_last: leave the last linear layer alone (NFNets)."""

    per_tensor = True

    def __init__(self, clip: float = 0.1, eps: float = 1e-3, skip_last: bool = False):
        self.clip, self.eps, self.skip_last = clip, eps, skip_last
        self.skipped: frozenset[str] = frozenset()

    def prepare(self, model: nn.Module) -> nn.Module:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if self.skip_last and linear:
            self.skipped = frozenset(f"{linear[-1]}.{leaf}" for leaf in ("weight", "bias"))
        return model

    def update(self, grads: Tensors, state: Tensors, params: Tensors, view: View) -> tuple[Tensors, Tensors]:
        return {n: g if n in self.skipped else self._clip(g, params[n]) for n, g in grads.items()}, state

    def _clip(self, grad: Tensor, weight: Tensor) -> Tensor:
        limit = self.clip * unitwise_norm(weight).clamp(min=self.eps)
        norm = unitwise_norm(grad)
        return torch.where(norm > limit, grad * (limit / norm.clamp(min=1e-6)), grad)

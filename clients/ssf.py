"""Scale and shift of features on a frozen network: one set for all examples, or a pool to choose from for each.

SSF (Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022), on each channel of a layer's output:

    y = gamma * x + beta,    gamma ~ N(1, 0.02^2), beta ~ N(0, 0.02^2) at first

A pool (FedIns, Feng et al., ICCV 2023) has P rows [P, C] of gamma and beta at every place, P keys and P classifiers.
For each example, q(x) is what the unmodified backbone gives its classifier (a ViT's CLS token after the final norm, a
CNN's pooled feature), from a forward pass of its own:

    top(x) = the k rows i of largest cos(q(x), key_i);    gamma(x), beta(x), logits(x): means over them
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models.norm import NORM_TYPES, replace_modules
from fedsim.models.vit import VisionTransformer
from fedsim.models.weights import head_path
from fedsim.types import Tensors

MATCHING = "matching"  # entry of the model's aux output


class Mixture:
    """The rows in force, [B, P] of sum 1, seen by every adapter of a model; None: the unmodified backbone."""

    weights: Tensor | None = None


class ScaleAndShift(nn.Module):
    """A layer and P rows of gamma and beta for its output channels."""

    def __init__(self, layer: nn.Module, pool: int, mixture: Mixture):
        super().__init__()
        self.layer, self.mixture = layer, mixture
        self.channels_last = isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm)
        channels = len(next(layer.parameters()))
        self.gamma = nn.Parameter(torch.empty(pool, channels).normal_(1.0, 0.02))
        self.beta = nn.Parameter(torch.empty(pool, channels).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.layer(x), self.mixture.weights
        if rows is None:
            return y
        inner = (1,) * (y.dim() - 2)
        shape = (len(rows), *inner, -1) if self.channels_last else (len(rows), -1, *inner)
        return (rows @ self.gamma).reshape(shape) * y + (rows @ self.beta).reshape(shape)


class PooledHead(nn.Module):
    """P linear classifiers. Without a mixture it hands its input through: the query."""

    def __init__(self, features: int, classes: int, pool: int, mixture: Mixture):
        super().__init__()
        self.mixture = mixture
        # Kaiming's deviation for each classifier: of [P, classes, C] as a whole it would take a fan-in of classes * C.
        self.weight = nn.Parameter(torch.empty(pool, classes, features).normal_(0.0, (2 / features) ** 0.5))
        self.bias = nn.Parameter(torch.zeros(pool, classes))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mixture.weights
        if rows is None:
            return x
        logits = torch.einsum("bc,pnc->bpn", x, self.weight) + self.bias  # [B, P, classes]
        return (rows.unsqueeze(-1) * logits).sum(1)


class Adapted(nn.Module):
    """A backbone with adapters: images -> logits [B, classes] and, with a pool, {MATCHING: 1 - sum of the k cosines}.

    Args:
        top_k: rows of the pool that an example uses.
        batch_mean: every example of a batch uses the mean of all their rows, as the code released in 2023 did.
    """

    def __init__(self, backbone: nn.Module, features: int, mixture: Mixture, pool: int, top_k: int, batch_mean: bool):
        super().__init__()
        self.backbone, self.mixture, self.top_k, self.batch_mean = backbone, mixture, top_k, batch_mean
        self.keys = nn.Parameter(nn.init.trunc_normal_(torch.empty(pool, features), std=0.02)) if pool > 1 else None

    def similarity(self, x: Tensor) -> Tensor:
        """cos(q(x), key_i), [B, P]."""
        assert self.keys is not None, "a pool of one has no keys"
        with torch.no_grad():
            query = self.backbone(x)  # [B, C]
        return F.normalize(query, dim=-1) @ F.normalize(self.keys, dim=-1).T

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensors]:
        if self.keys is None:
            return self._mix(x, x.new_ones(len(x), 1))
        similarity = self.similarity(x)
        best, rows = similarity.topk(self.top_k, -1)  # [B, k]
        weights = torch.zeros_like(similarity).scatter(-1, rows, 1 / self.top_k)  # [B, P]
        if self.batch_mean:
            weights = weights.mean(0, keepdim=True).expand_as(weights)
        return self._mix(x, weights), {MATCHING: (1 - best.sum(-1)).mean()}

    def _mix(self, x: Tensor, weights: Tensor) -> Tensor:
        self.mixture.weights = weights
        try:
            return self.backbone(x)
        finally:
            self.mixture.weights = None


def places(model: nn.Module) -> set[str]:
    """Paths of the layers that SSF follows. ViT: patch projection, every LayerNorm and linear layer but the classifier
    (Lian et al.); other models: every normalization layer with an affine part."""
    kinds = (nn.Conv2d, nn.Linear, nn.LayerNorm) if isinstance(model, VisionTransformer) else NORM_TYPES
    paths = {path for path, m in model.named_modules() if isinstance(m, kinds) and list(m.parameters())}
    return paths - {head_path(model)}


def adapt(model: nn.Module, pool: int, top_k: int, batch_mean: bool = False) -> Adapted:
    """``model`` frozen, with adapters after its ``places`` and a pool of classifiers. Changes ``model``."""
    after, head, mixture = places(model), head_path(model), Mixture()
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer, persistent=False)  # running statistics are frozen too, hence not sent
    features = model.get_submodule(str(head)).in_features

    def swap(path: str, module: nn.Module) -> nn.Module | None:
        if path == head:
            return PooledHead(module.in_features, module.out_features, pool, mixture)  # type: ignore[arg-type]
        return ScaleAndShift(module, pool, mixture) if path in after else None

    return Adapted(replace_modules(model, swap), features, mixture, pool, top_k, batch_mean)  # type: ignore[arg-type]


@torch.no_grad()
def merged(model: Adapted, weights: Tensor) -> nn.Module:
    """The plain network that has absorbed one mixture ``weights`` [P] of the pool: no adapter costs at inference."""

    def absorb(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, PooledHead):
            weight, bias = torch.einsum("p,pnc->nc", weights, module.weight), weights @ module.bias
            head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            head.weight, head.bias = nn.Parameter(weight), nn.Parameter(bias)
            return head
        if not isinstance(module, ScaleAndShift):
            return None
        layer, gamma, beta = module.layer, weights @ module.gamma, weights @ module.beta
        weight, shift = layer.get_parameter("weight"), getattr(layer, "bias", None)
        layer.weight = nn.Parameter(weight * gamma.reshape(-1, *(1,) * (weight.dim() - 1)))
        layer.bias = nn.Parameter(beta if shift is None else shift * gamma + beta)
        return layer

    return replace_modules(copy.deepcopy(model.backbone), absorb)

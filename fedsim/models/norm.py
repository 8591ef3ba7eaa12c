"""Normalization layers: the one place they are made, and the one place they are found again in any torch model.

Layers are found by type and full path, never by a substring of the name: ``"bn" in name`` misses ``downsample.1``,
``features.3`` and ``norm``. State-dict names are those of ``model.state_dict()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from fedsim.errors import ConfigError
from fedsim.models.norm_layers import BatchChannelNorm2d, EstimatedBatchNorm2d, EvoNormB0, EvoNormS0

NORMS = ("bn", "gn", "ln", "none")
BUFFERS = {
    **dict.fromkeys(("running_mean", "running_var", "seen_mean", "seen_square"), "stats"),
    **dict.fromkeys(("num_batches_tracked", "seen_batches"), "counter"),
}

# SyncBatchNorm and timm's BatchNormAct2d are _BatchNorm. LocalResponseNorm has no tensors.
NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    BatchChannelNorm2d,
    EstimatedBatchNorm2d,
    EvoNormB0,
    EvoNormS0,
)


def make_norm(kind: str, channels: int, *, dims: int = 2) -> nn.Module:
    """A normalization layer for images [B, C, H, W] (``dims`` 2) or vectors [B, C] (``dims`` 1).

    bn: BatchNorm. gn: GroupNorm of 32 groups, or as many as divide both 32 and C; on vectors, groups of 16 values at
    least (a group of one value normalizes to 0, of two to +-1). ln: LayerNorm; on images over (C, H, W) with affine
    parameters per channel, as timm's GroupNorm1, not per element as ``nn.LayerNorm([C, H, W])``. none: Identity.
    """
    if kind not in NORMS:
        raise ConfigError(f"model.norm = '{kind}': no such normalization; known: {', '.join(NORMS)}")
    if kind == "bn":
        return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm1d(channels)
    if kind == "gn":
        most = 32 if dims == 2 else max(1, channels // 16)
        return nn.GroupNorm(math.gcd(32, most, channels), channels)
    if kind == "ln":
        return nn.GroupNorm(1, channels) if dims == 2 else nn.LayerNorm(channels)
    return nn.Identity()


def norm_names(model: nn.Module, types: tuple[type[nn.Module], ...] = NORM_TYPES) -> set[str]:
    """Names of all tensors inside modules of these types, ``model`` itself and parametrized layers included."""
    modules = model.named_modules(remove_duplicate=False)  # state_dict lists a shared module under each of its names
    inside = tuple(f"{path}." if path else "" for path, module in modules if isinstance(module, types))
    return {name for name in model.state_dict() if name.startswith(inside)}


def classify(model: nn.Module) -> dict[str, str]:
    """Every state-dict name -> what it is.

    "affine": parameters of normalization layers (gamma, beta); "weight": all other parameters; "stats": running mean
    and variance; "counter": num_batches_tracked; "buffer": all other buffers.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = norm_names(model)

    def kind(name: str) -> str:
        if name in parameters:
            return "affine" if name in norms else "weight"
        return BUFFERS.get(name.rpartition(".")[2], "buffer") if name in norms else "buffer"

    return {name: kind(name) for name in model.state_dict()}


def replace_modules(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Put ``make(path, module)`` in the place of every module; None: keep it and look inside. Changes ``model``.

    The root has the path "" and may be replaced too, hence the return value. A module that is used in two places is
    replaced by one module.
    """
    made: dict[nn.Module, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> nn.Module:
        if module in made:
            return made[module]
        new = make(path, module)
        made[module] = module if new is None else new.train(module.training)
        if new is None:
            for name, child in module._modules.items():  # named_children() leaves out the second use of a module
                if child is not None:
                    module._modules[name] = visit(f"{path}.{name}" if path else name, child)
        return made[module]

    return visit("", model)

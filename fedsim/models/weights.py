"""Initial weights from the user's safetensors file: names of ``state_dict``; those of our ViT are timm's."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import DataError
from fedsim.models.vit import VisionTransformer
from fedsim.types import Tensors

LISTED = 5  # names of each kind in a message


def head_path(model: nn.Module) -> str | None:
    """Path of the classifier: the last linear layer. None: there is none."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return paths[-1] if paths else None


def resample_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embedding [1, 1 + n * n, C] of n x n patches -> [1, 1 + h * w, C]: bicubic, the CLS entry as it is.

    Raises:
        ValueError: the patches of ``positions`` are not a square.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patch positions are not a square grid")
    if (side, side) == tuple(grid):
        return positions
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, C, n, n]
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    return torch.cat([cls, image.flatten(2).transpose(1, 2).to(positions.dtype)], 1)


def fit(tensors: Tensors, model: nn.Module) -> Tensors:
    """``tensors`` under the names and shapes of ``model``, as far as they can be made to fit.

    A ViT's position embedding is resampled when the grid of patches differs. A classifier for another number of
    classes is left out (it keeps its initialization): pre-training had other classes.
    """
    wanted, fitted = model.state_dict(), dict(tensors)
    positions = fitted.get("pos_embed")
    if isinstance(model, VisionTransformer) and positions is not None and positions.dim() == 3:
        fitted["pos_embed"] = resample_positions(positions, model.grid)
    head = head_path(model)
    names = [f"{head}.weight", f"{head}.bias"]
    if any(n in fitted and n in wanted and len(fitted[n]) != len(wanted[n]) for n in names):
        fitted = {n: v for n, v in fitted.items() if n not in names}
    return fitted


def read_weights(path: str | Path) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        DataError: no such file, or not a whole safetensors file.
    """
    path = Path(path).expanduser()
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise DataError(f"model.weights = '{path}': cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise DataError(
            f"model.weights = '{path}': not a safetensors file ({error}); .pth files are not read"
        ) from None


def weights_sha256(path: str | Path) -> str:
    """Checksum of the file."""
    with open(Path(path).expanduser(), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into ``model``: all of them, save that a classifier may be absent (see ``fit``).

    Raises:
        DataError: missing, unexpected or misshapen tensors, all of them in one message.
    """
    try:
        found = fit(read_weights(path), model)
    except ValueError as error:
        raise DataError(f"model.weights = '{path}': pos_embed: {error}") from None
    wanted, head = model.state_dict(), head_path(model)
    optional = {f"{head}.weight", f"{head}.bias"}
    missing = [n for n in wanted if n not in found and n not in optional]
    unexpected = [n for n in found if n not in wanted]
    misshapen = [
        f"{n} (expected {tuple(v.shape)}, found {tuple(found[n].shape)})"
        for n, v in wanted.items()
        if n in found and found[n].shape != v.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        lines = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
        raise DataError(f"model.weights = '{path}': not the weights of this model\n  " + "\n  ".join(lines))
    model.load_state_dict(found, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f", ... ({len(names) - LISTED} more)" if len(names) > LISTED else "")

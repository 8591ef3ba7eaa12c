"""The one boundary at which an update is checked before anything believes it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedsim.types import Tensors


def refuse(tensors: Tensors, expected: Tensors) -> str | None:
    """Why ``tensors`` is no update of ``expected`` (names, shapes, dtypes, finiteness), or None if it is one."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        return f"tensor '{missing[0]}' is missing ({len(missing)} of {len(expected)} are)"
    if extra:
        return f"tensor '{extra[0]}' is not part of the model"
    for name, value in tensors.items():
        want = expected[name]
        if not isinstance(value, torch.Tensor):
            return f"'{name}' is {type(value).__name__}, expected a tensor"
        if value.shape != want.shape:
            return f"'{name}' has shape {tuple(value.shape)}, expected {tuple(want.shape)}"
        if value.dtype != want.dtype:
            return f"'{name}' is {value.dtype}, expected {want.dtype}"
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            return f"'{name}' holds a value that is not finite"
    return None


def refuse_count(examples: object, most: int | None = None) -> str | None:
    """Why an example count is not believable, or None. ``most``: what the client's shard holds, if known."""
    if isinstance(examples, bool) or not isinstance(examples, int | float) or not math.isfinite(examples):
        return f"example count is {examples!r}, expected a whole number"
    if examples != int(examples) or examples < 1:
        return f"example count is {examples!r}, expected at least 1"
    if most is not None and examples > most:
        return f"example count is {examples!r}, the shard holds {most}"
    return None


def refuse_report(report: Tensors) -> str | None:
    """Why what a plug-in reports is not believable: a value that is not finite."""
    bad = next((n for n, v in report.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
    return f"report '{bad}' holds a value that is not finite" if bad is not None else None


def refuse_metrics(metrics: Mapping[str, float]) -> str | None:
    """Why metrics are not believable: a number that is not finite."""
    bad = next((n for n, v in metrics.items() if not math.isfinite(v)), None)
    return f"metric '{bad}' is {metrics[bad]!r}" if bad is not None else None

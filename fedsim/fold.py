"""Weighted sums of client tensors: the partial sums of a block, and their combination in block order.

Every product and sum is in float64 and in a fixed order (clients by number inside a block, blocks by number), so the
mean has the same bits for any number of workers and any order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedsim.types import Tensors


@dataclass
class Partial:
    """sum_k p_k theta_k and sum_k p_k over the clients of one block.

    A block of one client keeps its tensors as they are, since 1 * theta needs no float64: half the traffic.
    """

    tensors: Tensors
    weight: float
    scaled: bool = True

    @classmethod
    def of(cls, tensors: Tensors, weight: float) -> Partial:
        return cls(tensors, weight, scaled=False)

    @classmethod
    def of_rows(cls, tensors: Tensors, weights: Sequence[float]) -> Partial:
        """The sum over the rows of stacked tensors [k, ...], each weighted."""
        w = torch.tensor(weights, dtype=torch.float64)
        sums = {n: torch.mv(v.to(torch.float64).reshape(len(w), -1).T, w).view(v.shape[1:]) for n, v in tensors.items()}
        return cls(sums, math.fsum(weights))

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one client's tensors in place.

        Raises:
            ValueError: they have other names or shapes than the sum, which is left as it was.
        """
        if tensors.keys() != self.tensors.keys() or any(tensors[n].shape != v.shape for n, v in self.tensors.items()):
            raise ValueError("what is to be summed has other names or shapes than the block's other clients sent")
        for name, total in self.sums().items():
            total.add_(tensors[name], alpha=weight)
        self.weight += weight

    def sums(self) -> Tensors:
        if not self.scaled:
            self.tensors = {n: v.to(torch.float64, copy=True).mul_(self.weight) for n, v in self.tensors.items()}
            self.scaled = True
        return self.tensors


def merge(partials: Iterable[Partial]) -> Partial:
    """Combine block sums in the order given (block order).

    Raises:
        ValueError: there is nothing to combine.
    """
    total: Partial | None = None
    for partial in partials:
        if total is None:
            total = Partial({n: v.clone() for n, v in partial.sums().items()}, partial.weight)
        else:
            for name, value in partial.sums().items():
                total.tensors[name].add_(value)
            total.weight += partial.weight
    if total is None:
        raise ValueError("no replies to combine")
    return total


def mean(total: Partial, like: Tensors) -> Tensors:
    """sum_k p_k theta_k / sum_k p_k of the names and in the dtypes of ``like``; integer tensors are rounded."""
    out = {}
    for name, value in ((n, v) for n, v in total.sums().items() if n in like):
        average, dtype = value / total.weight, like[name].dtype
        out[name] = (average if dtype.is_floating_point else average.round()).to(dtype)
    return out

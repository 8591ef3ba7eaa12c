"""Weighted sums of client tensors: the partial sums of a block, and their combination in block order.

Every sum is in a fixed order (clients by number inside a block, blocks by number, one after the other or in a tree), so
the mean has the same bits for any number of workers and any order of arrival. It is in float64, as is every product,
but for those of ``WideSum``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsim.types import LowRank, Tensors

PIECE = 1 << 16  # numbers: as many sums in float64, and as many terms, fit in a core's own cache
TOGETHER = 2  # blocks' sums that wait, while others are trained, to be added to those before them
LARGE = 1 << 22  # bytes of a model: the sums of many blocks are added in a tree, which several can do at once
FAN = 8  # sums that a tree adds at a time


@dataclass
class Partial:
    """sum_k p_k theta_k and sum_k p_k over the clients of one block.

    A block of one client keeps its tensors as they are, since 1 * theta needs no float64: half the traffic.

    Attributes:
        base: how often the order's own tensor has still to be added to the sum of that name (``settled`` does it).
        wide: the sums of tensors that are not known as tensors until the block is complete.
    """

    tensors: Tensors
    weight: float
    scaled: bool = True
    base: dict[str, float] = field(default_factory=dict)
    wide: dict[str, WideSum] = field(default_factory=dict)

    @property
    def factor(self) -> float:
        """What the tensors have still to be multiplied by."""
        return 1.0 if self.scaled else self.weight

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
            _accumulate(total, tensors[name], weight)
        self.weight += weight

    def add_wide(self, base: Tensors, updates: Mapping[str, LowRank | Tensor], weight: float) -> None:
        """The rest of a client: what it adds to ``base``, or what it ends with. It is added to all sums or to none.

        A tensor must come this way from all clients of a block or from none."""
        for name in updates.keys() - self.wide.keys():
            self.wide[name] = WideSum(base[name])
        ready = {name: self.wide[name].ready(update, weight) for name, update in updates.items()}
        for name, update in ready.items():
            self.wide[name].add(update, weight)

    def complete(self) -> None:
        """All clients of the block have been added."""
        if self.wide:
            self.tensors = self.sums() | {name: wide.total() for name, wide in self.wide.items()}
            self.base = {name: wide.weight for name, wide in self.wide.items() if wide.weight}
            self.wide = {}

    def own(self) -> None:
        """Copy the tensors if they are still those that came, whose owner will write to them."""
        if not self.scaled:
            self.tensors = {n: v.clone() for n, v in self.tensors.items()}

    def sums(self) -> Tensors:
        """The tensors with the weight in them, made new in float64 if it was not."""
        if not self.scaled:
            self.tensors = {n: _scaled(v, self.weight) for n, v in self.tensors.items()}
            self.scaled = True
        return self.tensors


class WideSum:
    """sum_k p_k (base + left_k^T right_k) over the clients of a block, but for the base: ``weight`` is how often it has
    still to be added. The updates' sum is one product of all their factors: a matrix is passed through once for a
    block, where single clients' would be written, checked and summed in float64 each.

    The product is in the tensors' own precision; what it rounds is the update, not the weight.
    """

    def __init__(self, base: Tensor):
        self.like, self.weight = base, 0.0
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self.updates = torch.empty(base.shape, dtype=base.dtype)  # now, where a client may fail for want of memory
        self.multiplied = False
        self.dense: Tensor | None = None

    def ready(self, update: LowRank | Tensor, weight: float) -> LowRank | Tensor:
        """What a client adds to the base, or the tensor it ends with, for ``add``: all that takes memory is here."""
        if isinstance(update, Tensor):
            if self.dense is None:
                self.dense = torch.zeros(self.like.shape, dtype=torch.float64)
            return update
        if sum(map(len, self.left)) * sum(self.like.shape) > self.like.numel():  # they take more room than the matrix
            self._multiply()
        return LowRank(update.left * weight, update.right)

    def add(self, update: LowRank | Tensor, weight: float) -> None:
        """What ``ready`` made of a client's."""
        if isinstance(update, Tensor):
            assert self.dense is not None, "ready() was called"
            _accumulate(self.dense, update, weight)
            return
        self.left.append(update.left)
        self.right.append(update.right)
        self.weight += weight

    def _multiply(self) -> None:
        left, right = torch.cat(self.left), torch.cat(self.right)
        if self.multiplied:
            self.updates.addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=self.updates)
        self.multiplied, self.left, self.right = True, [], []

    def total(self) -> Tensor:
        """In the tensors' own precision if no client ended with a tensor, else float64."""
        if self.left:
            self._multiply()
        if self.dense is None:
            return self.updates
        if self.multiplied:
            _accumulate(self.dense, self.updates)
        return self.dense


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of each, flattened, after another: long sums pass through a core's cache, not through memory."""
    return zip(*(t.split(PIECE) for t in tensors))


def _add(total: Tensor, piece: Tensor, weight: float) -> None:
    """total += weight * piece, with the same bits wherever a sum's terms are multiplied: the product of a number in
    float32 and a count is exact in float64, that of one in float64 is rounded before it is added."""
    if piece.dtype is torch.float64 and weight != 1:
        total.add_(piece * weight)
    else:
        total.add_(piece, alpha=weight)


def _scaled(value: Tensor, weight: float) -> Tensor:
    out = torch.empty(value.shape, dtype=torch.float64)
    for into, piece in _pieces(out.view(-1), value.reshape(-1)):
        into.copy_(piece).mul_(weight)
    return out


def _accumulate(total: Tensor, value: Tensor, weight: float = 1.0) -> None:
    for into, piece in _pieces(total.view(-1), value.reshape(-1)):
        _add(into, piece, weight)


def gather(total: Partial | None, partials: list[Partial]) -> Partial:
    """Add block sums, in block order, to those before them; ``partials`` is emptied. The mean of the sum has the bits
    of the mean of all blocks' sums."""
    if total is None:
        first = partials.pop(0)
        total = Partial({n: _scaled(v, first.factor) for n, v in first.tensors.items()}, first.weight, base=first.base)
    for name, value in total.tensors.items():
        for into, *pieces in _pieces(value.view(-1), *(p.tensors[name].reshape(-1) for p in partials)):
            for partial, piece in zip(partials, pieces):
                _add(into, piece, partial.factor)
    total.weight = sum((p.weight for p in partials), total.weight)
    for partial in partials:
        total.base = {n: total.base.get(n, 0.0) + partial.base.get(n, 0.0) for n in {**total.base, **partial.base}}
    partials.clear()
    return total


def fan_of(tensors: Tensors) -> float:
    """How many sums of such tensors are added one after the other before their sum is one of so many again."""
    return FAN if sum(v.nbytes for v in tensors.values()) >= LARGE else math.inf


class Chain:
    """Sums that are added here, a few at a time as they come."""

    def __init__(self) -> None:
        self.count, self.waiting = 0, list[Partial]()
        self.total: Partial | None = None

    def append(self, partial: Partial) -> None:
        self.count += 1
        self.waiting.append(partial)
        if len(self.waiting) == TOGETHER:
            self.total = gather(self.total, self.waiting)

    def close(self) -> Partial:
        """Their sum."""
        return gather(self.total, self.waiting)

    def rest(self) -> tuple[Partial | None, list[Partial]]:
        """The sum of the first of them, and the others."""
        return self.total, self.waiting

    def take(self, total: Partial) -> Partial:
        """What ``close`` has given."""
        return total


class Apart:
    """Sums that are elsewhere and are added there.

    Args:
        add: the sum of several, in order, elsewhere too.
        take: a sum, from where it is.
    """

    def __init__(self, add: Callable[[list[Any]], Any], take: Callable[[Any], Partial]):
        self.add, self.take, self.sums = add, take, list[Any]()

    @property
    def count(self) -> int:
        return len(self.sums)

    def append(self, partial: Any) -> None:
        self.sums.append(partial)

    def close(self) -> Any:
        """Their sum, and none of them is held any longer."""
        sums, self.sums = self.sums, []
        return self.add(sums) if len(sums) > 1 else sums[0]

    def rest(self) -> tuple[None, list[Partial]]:
        return None, [self.take(self.close())] if self.sums else []


class Tree:
    """Adds the sums of blocks, given in block order: ``fan`` of them to one, and as many such sums again.

    Args:
        group: what holds and adds the sums of a level.
    """

    def __init__(self, fan: float, group: Callable[[], Chain | Apart] = Chain):
        self.fan, self.group = fan, group
        self.levels = [group()]  # the higher, the earlier the blocks

    def append(self, partial: Any) -> None:
        for number, level in enumerate(self.levels):
            if level.count < self.fan:
                level.append(partial)
                return
            self.levels[number] = self.group()
            self.levels[number].append(partial)
            partial = level.close()
        self.levels.append(self.group())
        self.levels[-1].append(partial)

    def settled(self, base: Tensors) -> list[Partial]:
        """What all come to, as ``settled`` gives it."""
        *lower, top = self.levels
        sums = [(level, level.close()) for level in reversed(lower)]
        total, partials = top.rest()
        return settled(total, [*partials, *(level.take(s) for level, s in sums)], base)


def settled(total: Partial | None, partials: list[Partial], base: Tensors) -> list[Partial]:
    """The sum of the first blocks, if ``gather`` has made one, and those after it; all as one sum, made in its place,
    if there was something still to be added to them: ``base`` are the order's tensors."""
    sums = partials if total is None else [total, *partials]
    if not any(p.base for p in sums):
        return sums
    total = gather(total, partials)
    for name, times in total.base.items():
        _accumulate(total.tensors[name], base[name], times)
    total.base = {}
    return [total]


def merge(partials: Iterable[Partial]) -> Partial:
    """Combine block sums in the order given (block order).

    Raises:
        ValueError: there is nothing to combine.
    """
    total: Partial | None = None
    for partial in partials:
        total = gather(total, [partial])
    if total is None:
        raise ValueError("no replies to combine")
    return total


def mean(partials: Sequence[Partial], like: Tensors) -> Tensors:
    """sum_k p_k theta_k / sum_k p_k of the names and in the dtypes of ``like``, over block sums in block order; integer
    tensors are rounded.

    Raises:
        ValueError: there is nothing to combine.
    """
    if not partials:
        raise ValueError("no replies to combine")
    weight = sum(p.weight for p in partials)
    out = {}
    for name, want in like.items():
        if name in partials[0].tensors:
            out[name] = torch.empty(partials[0].tensors[name].shape, dtype=want.dtype)
            values = [p.tensors[name].reshape(-1) for p in partials]
            for into, first, *others in _pieces(out[name].view(-1), *values):
                total = first.to(torch.float64, copy=True).mul_(partials[0].factor)
                for partial, piece in zip(partials[1:], others):
                    _add(total, piece, partial.factor)
                total.div_(weight)
                into.copy_(total if want.dtype.is_floating_point else total.round_())
    return out

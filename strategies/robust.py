"""Aggregation that withstands f malicious clients of n, in place of the weighted mean of any strategy.

    median         by coordinate (Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards
                   Optimal Statistical Rates", ICML 2018)                                                  n >= 2f + 1
    trimmed-mean   by coordinate, without the f largest and f smallest (the same paper)                    n >= 2f + 1
    krum           the update whose n - f - 2 nearest others are nearest, sum of squared distances (Blanchard,
                   El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries", NeurIPS 2017)       n >= 2f + 3
    multi-krum     the mean of the n - f - 2 updates of lowest score (the same paper)                      n >= 2f + 3
    bulyan         Krum picks n - 2f updates, one after the other among those left; by coordinate, the mean of the
                   n - 4f values nearest to their median (El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of
                   Distributed Learning in Byzantium", ICML 2018)                                          n >= 4f + 3
    norm-clipping  w + mean_k p_k min(1, c / ||Delta_k||) Delta_k (Sun, Kairouz, Suresh, McMahan, "Can You Really
                   Backdoor Federated Learning?", 2019); c = 0 takes the median of the round's norms, n >= 2f + 1

A rule wraps the strategy from outside: FedAdam, FedHyper or a server half with masks see the replies as the rule leaves
them, so every mean they take is a robust one. Distances and norms are over all floating-point tensors that are shared,
statistics included. All but clipping weigh the clients alike: a weight is one more thing to lie about. What plug-ins
report of the model's size, and single numbers, go through the coordinate rules too; other reports (FedTiny's and
PruneFL's gradients of pruned weights, the losses of candidate masks) only through the rules that select.

Deviations: of equal scores Krum takes the update nearer to all others (Blanchard et al.: the lower number). In Bulyan's
last selections Krum has fewer than f + 3 updates left and takes one neighbour at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients.control import ControlVariates, DynamicRegularizer, NormalizedUpdate
from clients.update_norm import UpdateNorm
from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.fold import Partial
from fedsim.local import ClientTask
from fedsim.registry import Part, nothing_shared, preset, register
from fedsim.strategy import Replies, Strategy, Wrapper
from fedsim.types import FOLDED, Order, Reply, Tensors

Rule = Callable[[Order, Replies], Replies]


def median(stack: Tensor) -> Tensor:
    """[n, ...] -> [...]: the middle value of each coordinate, of an even number the mean of the two in the middle."""
    n, ordered = len(stack), stack.sort(0).values
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(stack: Tensor, f: int) -> Tensor:
    """[n, ...] -> [...]: mean of each coordinate without its f smallest and f largest values."""
    return stack.sort(0).values[f : len(stack) - f].mean(0)


def nearest_mean(stack: Tensor, count: int) -> Tensor:
    """[n, ...] -> [...]: mean of the ``count`` values of each coordinate that are nearest to their median."""
    ordered = stack.sort(0).values
    nearest = (ordered - median(stack)).abs().argsort(dim=0, stable=True)[:count]
    return ordered.gather(0, nearest).mean(0)


def stacked(replies: Sequence[Reply], name: str) -> Tensor:
    """A shared tensor of every reply, float64 [n, ...]."""
    return torch.stack([r.shared[name].double() for r in replies])


def floating(tensors: Tensors) -> list[str]:
    return sorted(n for n, v in tensors.items() if v.is_floating_point())


def distances(replies: Sequence[Reply]) -> Tensor:
    """Squared L2 distances between updates, float64 [n, n]."""
    total = torch.zeros(len(replies), len(replies), dtype=torch.float64)
    for name in floating(replies[0].shared):
        flat = stacked(replies, name).flatten(1)  # [n, d]
        for i, row in enumerate(flat):
            total[i] += (flat - row).square().sum(1)
    return total


def krum_order(between: Tensor, f: int) -> list[int]:
    """Updates by ascending Krum score, from their squared distances [n, n]; of equal scores the one that is nearer to
    all the others comes first (with a single neighbour the two nearest updates always tie)."""
    n = len(between)
    others = between.sort(1).values[:, 1:]  # the smallest is the distance to itself
    by_sum = others.sum(1).argsort(stable=True)
    return by_sum[others[:, : max(n - f - 2, 1)].sum(1)[by_sum].argsort(stable=True)].tolist()


def bulyan_selection(between: Tensor, f: int) -> list[int]:
    """The n - 2f updates that Krum picks one after the other, ascending."""
    left = list(range(len(between)))
    while len(left) > 2 * f:
        rows = torch.tensor(left)
        left.remove(left[krum_order(between[rows][:, rows], f)[0]])
    return sorted(set(range(len(between))) - set(left))


def selected(replies: Replies, chosen: Sequence[int]) -> Replies:
    """Only the chosen replies, each weighing the same."""
    return Replies([replies.singles[i] for i in sorted(chosen)], (), "uniform", replies.population)


def by_coordinate(replies: Replies, rule: Callable[[Tensor], Tensor]) -> Replies:
    """Replies that all say what ``rule`` makes of them, in the model and in the reports it can be applied to."""
    singles = replies.singles
    shared = {n: rule(stacked(singles, n)) for n in singles[0].shared}  # float64
    names = set.intersection(*(set(r.report) for r in singles))
    told = {n: [r.report[n] for r in singles] for n in sorted(names)}
    told = {n: vs for n, vs in told.items() if n.startswith(FOLDED) or (vs[0].dim() == 0 and vs[0].is_floating_point())}
    report = {n: rule(torch.stack([v.double() for v in vs])) for n, vs in told.items()}
    total = Partial.of({**shared, **{n: v for n, v in report.items() if n.startswith(FOLDED)}}, 1.0)
    alike = [
        replace(
            r,
            shared={n: _like(v, r.shared[n]) for n, v in shared.items()},
            report={**r.report, **{n: _like(v, r.report[n]) for n, v in report.items()}},
        )
        for r in singles
    ]
    return Replies(alike, [total], "uniform", replies.population)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return (value if like.is_floating_point() else value.round()).to(like.dtype)


def clipped(order: Order, replies: Replies, bound: float) -> Replies:
    """Every update scaled down to the norm ``bound``, or to the median of the norms if that is 0."""
    names = floating(replies.singles[0].shared)
    deltas = [{n: r.shared[n].double() - order.shared[n].double() for n in names} for r in replies.singles]
    norms = torch.stack([torch.stack([d.square().sum() for d in delta.values()]).sum().sqrt() for delta in deltas])
    limit = bound or float(median(norms))
    singles = []
    for reply, delta, norm in zip(replies.singles, deltas, norms.tolist()):
        if norm > limit:
            scaled = {
                n: (order.shared[n].double() + d * (limit / norm)).to(order.shared[n].dtype) for n, d in delta.items()
            }
            reply = replace(reply, shared={**reply.shared, **scaled})
        singles.append(reply)
    return Replies(singles, (), replies.weighting, replies.population)


@dataclass(frozen=True)
class Median:
    """Args: f: malicious clients expected."""

    f: int

    @property
    def needs(self) -> int:
        return 2 * self.f + 1

    def __call__(self, order: Order, replies: Replies) -> Replies:
        return by_coordinate(replies, median)


class TrimmedMean(Median):
    def __call__(self, order: Order, replies: Replies) -> Replies:
        return by_coordinate(replies, lambda stack: trimmed_mean(stack, self.f))


@dataclass(frozen=True)
class Krum:
    """Args: f: malicious clients expected. multi: average the n - f - 2 best instead of taking the best."""

    f: int
    multi: bool = False

    @property
    def needs(self) -> int:
        return 2 * self.f + 3

    def __call__(self, order: Order, replies: Replies) -> Replies:
        keep = len(replies) - self.f - 2 if self.multi else 1
        return selected(replies, krum_order(distances(replies.singles), self.f)[:keep])


@dataclass(frozen=True)
class Bulyan:
    """Args: f: malicious clients expected."""

    f: int

    @property
    def needs(self) -> int:
        return 4 * self.f + 3

    def __call__(self, order: Order, replies: Replies) -> Replies:
        picked = selected(replies, bulyan_selection(distances(replies.singles), self.f))
        return by_coordinate(picked, lambda stack: nearest_mean(stack, len(stack) - 2 * self.f))


@dataclass(frozen=True)
class NormClipping:
    """Args: f: malicious clients expected. bound: c; 0: the median of the round's norms."""

    f: int
    bound: float = 0.0

    @property
    def needs(self) -> int:
        return 1 if self.bound else 2 * self.f + 1

    def __call__(self, order: Order, replies: Replies) -> Replies:
        return clipped(order, replies, self.bound)


class Robust(Wrapper):
    """Args: base: whose means become robust ones. rule: what is done to the replies before the base sees them.

    Raises:
        ValueError: ``aggregate`` is given fewer replies than the rule needs.
    """

    def __init__(self, base: Strategy, rule: Median | Krum | Bulyan | NormClipping):
        super().__init__(base)
        self.rule = rule
        self.needs = max(rule.needs, base.needs)

    def orders(self, round: int, state: Tensors) -> list[Order]:
        return [o if o.task == "score" else replace(o, fold=False) for o in self.base.orders(round, state)]

    def aggregate(self, round: int, state: Tensors, order: Order, replies: Replies) -> Tensors:
        if len(replies) < self.rule.needs:
            raise ValueError(
                f"{len(replies)} replies, {type(self.rule).__name__} of f = {self.rule.f} needs {self.needs}"
            )
        if order.task != "score" and floating(order.returned):
            replies = self.rule(order, replies)
        return self.base.aggregate(round, state, order, replies)


def _check(clips: bool) -> Callable[[ClientTask, Config], str | None]:
    def check(task: ClientTask, config: Config) -> str | None:
        kinds = {type(plugin) for plugin in task.plugins}
        if kinds & {ControlVariates, DynamicRegularizer}:
            return "the server's correction is the mean of the clients' own, which the outcome of a robust rule is not"
        if clips and kinds & {NormalizedUpdate, UpdateNorm}:
            return "the server rule steps by what the clients report, which clipping their models does not bound"
        return nothing_shared(task, config)

    return check


def _part(rule: Median | Krum | Bulyan | NormClipping) -> Part:
    if rule.f < 0:
        raise ConfigError(
            f"algorithm.byzantine = {rule.f}: expected the number of malicious clients to withstand, 0 or more"
        )

    def wrap(base: Strategy | None, task: ClientTask) -> Strategy:
        assert base is not None
        return Robust(base, rule)

    return Part((), wrap, _check(isinstance(rule, NormClipping)))


def _register(name: str, summary: str, rule: Callable[[int], Median | Krum | Bulyan]) -> None:
    @register("aggregation", name)
    def part(config: Config, *, byzantine: int = 1) -> Part:
        return _part(rule(byzantine))

    preset(name, summary, aggregation=name)


_register("median", "median of each coordinate", Median)
_register("trimmed-mean", "mean of each coordinate without its extremes", TrimmedMean)
_register("krum", "the update nearest to its neighbours", Krum)
_register("multi-krum", "mean of the updates nearest to their neighbours", lambda f: Krum(f, multi=True))
_register("bulyan", "Krum's choice of updates, then near the median of each coordinate", Bulyan)


@register("aggregation", "norm-clipping")
def norm_clipping(config: Config, *, byzantine: int = 1, clip_norm: float = 0.0) -> Part:
    if not 0 <= clip_norm < float("inf"):
        raise ConfigError(
            f"algorithm.clip-norm = {clip_norm}: expected a norm, or 0 for the median of the round's norms"
        )
    return _part(NormClipping(byzantine, clip_norm))


preset("norm-clipping", "updates scaled down to a bound on their norm", aggregation="norm-clipping")

"""The one boundary at which an update is checked before anything believes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.types import FOLDED, Tensors


@dataclass(frozen=True)
class Policy:
    """What is asked of updates beside being well-formed; zeros ask nothing.

    Attributes:
        max_update_norm: the most by which training may move the shared tensors, in L2 over all of floating point.
        quorum: share of the clients asked whose updates must be believed; with fewer the round is void.
        set_aside_after: refused updates after which a client is not asked any more.
        max_examples: what the largest shard holds, where a client's own shard is not known.
    """

    max_update_norm: float = 0.0
    quorum: float = 0.0
    set_aside_after: int = 0
    max_examples: int = 0

    def void(self, believed: int, asked: int, needs: int = 1) -> str | None:
        """Why so few believed updates change nothing, or None. ``needs``: without which the rule cannot work."""
        share = f"{believed} of {asked} updates can be used"
        if believed < self.quorum * asked:
            return f"{share}, the quorum is {self.quorum:g}"
        return f"{share}, the aggregation rule needs {needs}" if believed < needs else None


WELL_FORMED = Policy()  # nothing beyond


@dataclass
class Offenders:
    """Refused updates by client, and who is set aside for them."""

    policy: Policy
    refused: dict[int, int] = field(default_factory=dict)

    def record(self, client: int) -> bool:
        """Count a refused update; True if the client is set aside from now on."""
        self.refused[client] = self.refused.get(client, 0) + 1
        return self.refused[client] == self.policy.set_aside_after

    @property
    def aside(self) -> list[int]:
        """Clients that are not asked any more, ascending."""
        limit = self.policy.set_aside_after
        return sorted(c for c, count in self.refused.items() if limit and count >= limit)


def refuse_form(tensors: Tensors, expected: Tensors) -> str | None:
    """Why ``tensors`` does not look like ``expected`` (names, shapes, dtypes), or None if it does."""
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
    return None


def refuse(tensors: Tensors, expected: Tensors) -> str | None:
    """Why ``tensors`` is no update of ``expected`` (names, shapes, dtypes, finiteness), or None if it is one."""
    if reason := refuse_form(tensors, expected):
        return reason
    bad = next((n for n, v in tensors.items() if not bool(rows_finite({n: v[None]}).all())), None)
    return f"'{bad}' holds a value that is not finite" if bad is not None else None


def rows_finite(tensors: Tensors) -> Tensor:
    """Which rows of stacked tensors [k, ...] hold finite values alone: bool [k], or a true scalar for no tensors."""
    fine = torch.tensor(True)
    for value in tensors.values():
        if value.is_floating_point() and value.numel():
            # One pass that allocates nothing: the extremes are NaN if any value is. Row by row only if there is cause.
            flat = value.reshape(len(value), -1)
            if not all(bool(torch.isfinite(extreme)) for extreme in flat.aminmax()):
                low, high = flat.aminmax(dim=1)
                fine = fine & (torch.isfinite(low) & torch.isfinite(high)).cpu()
    return fine


def refuse_norm(tensors: Tensors, before: Tensors, most: float) -> str | None:
    """Why an update moves too far from ``before``, or None: its L2 norm over all floating-point tensors, statistics
    included, is above ``most``. ``most`` 0 refuses nothing; ``tensors`` have been through ``refuse``."""
    if not most:
        return None
    squares = (
        float((v.double() - before[n].double()).square().sum())
        for n, v in sorted(tensors.items())
        if v.is_floating_point()
    )
    norm = math.sqrt(math.fsum(squares))
    return f"the update has norm {norm:.6g}, the bound is {most:g}" if norm > most else None


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


def refuse_odd(reports: Mapping[int, Tensors]) -> dict[int, str]:
    """Of reports by client those whose model-sized entries are not like most clients' (names, shapes, dtypes), and why:
    what is to be summed must be alike, and one client must not decide what the others should look like."""
    looks = {
        client: tuple((n, tuple(v.shape), v.dtype) for n, v in sorted(report.items()) if n.startswith(FOLDED))
        for client, report in sorted(reports.items())
    }
    usual = Counter(looks.values()).most_common(1)[0][0] if looks else ()
    reason = "its report differs from the other clients' in names, shapes or dtypes"
    return {client: reason for client, look in looks.items() if look != usual}


def refuse_metrics(metrics: Mapping[str, float]) -> str | None:
    """Why metrics are not believable: a number that is not finite."""
    bad = next((n for n, v in metrics.items() if not math.isfinite(v)), None)
    return f"metric '{bad}' is {metrics[bad]!r}" if bad is not None else None

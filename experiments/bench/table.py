"""From runs to medians, ratios, the proof of equal work, a Markdown table and the curve of cost against clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from experiments.bench.peers import CONTENDERS
from experiments.bench.reporting import Result
from experiments.bench.workloads import Workload, workload


@dataclass(frozen=True)
class Run:
    """One start of one contender. Repetition 0 is not timed; ``peak`` bytes are measured in it alone."""

    contender: str
    workload: str
    repetition: int
    load: float
    peak: int
    result: Result | None
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """A contender on a workload.

    Attributes:
        seconds: a round, median over ``rounds`` timed ones; nan if it failed.
        first: the first round, median over the starts.
        ratio: to the reference's ``seconds``.
        loss: of the last start; ``equal``: that of every start agrees with the reference's, or need not
            (``exact`` is False: it rounds otherwise by permission).
    """

    contender: str
    seconds: float
    rounds: int
    first: float
    ratio: float
    peak: int
    loss: float
    equal: bool
    error: str = ""
    exact: bool = True


def _timed(runs: Sequence[Run], contender: str, workload: str) -> list[Result]:
    mine = [r for r in runs if (r.contender, r.workload) == (contender, workload) and r.repetition]
    return [r.result for r in mine if r.result]


def seconds_of(results: Sequence[Result]) -> list[float]:
    """Of all rounds after the first of each start."""
    return [s for result in results for s in result.seconds[1:]]


def summaries(workload: Workload, runs: Sequence[Run], reference: str) -> list[Summary]:
    """Fastest first, failures last."""
    mine = [r for r in runs if r.workload == workload.name]
    base = _timed(mine, reference, workload.name)
    unit = median(seconds_of(base)) if base else math.nan
    truth = base[0].loss if base else math.nan
    found = []
    for name in dict.fromkeys(r.contender for r in mine):
        results = _timed(mine, name, workload.name)
        error = next((r.error for r in mine if r.contender == name and r.error), "")
        peak = max(r.peak for r in mine if r.contender == name)
        if not results or error:
            found.append(Summary(name, math.nan, 0, math.nan, math.nan, peak, math.nan, False, error))
            continue
        times = seconds_of(results)
        exact = CONTENDERS[name].exact if name in CONTENDERS else True
        equal = not exact or all(abs(r.loss - truth) <= workload.tolerance * abs(truth) for r in results)
        middle, first = median(times), median(r.seconds[0] for r in results)
        found.append(Summary(name, middle, len(times), first, middle / unit, peak, results[-1].loss, equal, "", exact))
    return sorted(found, key=lambda s: (math.isnan(s.seconds), s.seconds))


def markdown(workload: Workload, rows: Sequence[Summary], reference: str) -> str:
    lines = [
        f"### {workload.name}: {workload.cohort} clients a round, {workload.samples} samples",
        "",
        f"Times relative to `{reference}`. Equal work: its training loss, but for a share of {workload.tolerance:g}.",
        "",
        "| contender | ratio | s a round | rounds | clients/s | ms a sample | first round, s | PSS, MB | final loss |"
        " equal work |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for s in rows:
        if s.error:
            lines.append(f"| {s.contender} | | | | | | | | | {s.error} |")
            continue
        peak = f"{s.peak / 1e6:.0f}" if s.peak else ""
        speed = f"{workload.cohort / s.seconds:.4g} | {1e3 * s.seconds / workload.samples:.4g}"
        lines.append(
            f"| {s.contender} | {s.ratio:.3g} | {s.seconds:.4g} | {s.rounds} | {speed} | {s.first:.3g} | {peak}"
            f" | {s.loss:.5f} | {('yes' if s.equal else '**no**') if s.exact else 'rounds otherwise'} |"
        )
    return "\n".join([*lines, ""])


def curve(runs: Sequence[Run], path: Path) -> None:
    """Log-log plot of seconds against clients a round, for contenders timed on two sizes of ``tiny`` or more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[int, float]] = {}
    for name, size in dict.fromkeys((r.contender, r.workload) for r in runs):
        times = seconds_of(_timed(runs, name, size))
        if times and workload(size).model == "logistic":
            lines.setdefault(name, {})[workload(size).cohort] = median(times)
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name, points in lines.items():
        axes.loglog(*zip(*sorted(points.items())), marker="o", label=name)
    axes.set_xlabel("clients a round")
    axes.set_ylabel("seconds a round")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""Is the difference between two methods more than chance? A paired test over seeds and domains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import wilcoxon

from fedsim.errors import ConfigError
from fedsim.results.run import RunDirectory, by_method


def compare(runs: Sequence[RunDirectory], first: str, second: str) -> str:
    """A line: mean difference in points and the p-value of Wilcoxon's signed-rank test (two-sided).

    The pairs are the accuracies of the two methods on the same domain with the same seed.

    Raises:
        ConfigError: a method is not among the runs, or the two have no seed and domain in common.
    """
    methods = by_method(runs)
    for name in (first, second):
        if name not in methods:
            raise ConfigError(f"--compare: no run of '{name}'; there are {', '.join(methods)}")
    accuracy = [
        {(r.summary["seed"], domain): 100 * a for r in methods[name] for domain, a in r.summary["accuracy"].items()}
        for name in (first, second)
    ]
    pairs = sorted(accuracy[0].keys() & accuracy[1].keys())
    if not pairs:
        raise ConfigError(f"--compare: '{first}' and '{second}' have no seed and domain in common")
    differences = np.array([accuracy[0][pair] - accuracy[1][pair] for pair in pairs])
    p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
    return (
        f"{first} - {second}: {differences.mean():+.1f} points over {len(pairs)} pairs of seed and domain"
        f" (Wilcoxon signed-rank test, p = {p:.3g})"
    )

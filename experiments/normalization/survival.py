"""Tables and figure of the study: python survival.py [RUNS, default runs/normalization] > tables.md

Writes survival.png and by_domain.md beside this file.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fedsim.results.run import RunDirectory, find_runs
from fedsim.results.table import cell_of

BATCHES = (1, 2, 4, 32)
SETTINGS = {1: "5 clients, all of them a round", 10: "50 clients, 5 of them a round"}
WITHOUT_A_BATCH = ("gn", "ln", "in", "evonorm-s0", "bcn-estimated", "fedwon")
BY_THE_BATCH = (
    "fedavg-bn",
    "fedbn",
    "silobn",
    "fixbn",
    "fbn",
    "adab2n",
    "ghost",
    "ibn-a",
    "affine-only",
    "evonorm-b0",
    "bcn",
)
ORDER = WITHOUT_A_BATCH + BY_THE_BATCH
Cells = dict[tuple[str, int, int], list[RunDirectory]]  # method, clients a domain, batch size -> seeds


def collect(root: Path) -> Cells:
    cells: Cells = defaultdict(list)
    for run in find_runs([root]):
        each, size = run.config["federation"]["clients-per-domain"], run.config["training"]["batch-size"]
        cells[run.method, each, size].append(run)
    return cells


def means(runs: list[RunDirectory]) -> list[float]:
    """Accuracy of each seed, the mean over its domains, in per cent."""
    return [100 * float(np.mean(list(r.summary["accuracy"].values()))) for r in runs]


def show(runs: list[RunDirectory], method: str, size: int) -> str:
    if runs:
        return cell_of(means(runs)).show(" ± ")
    if method == "ghost" and 1 < size <= 8:
        return "as BN"  # one chunk of at most ghost-size = 8: the bits of fedavg-bn
    return "refused" if size == 1 and method in BY_THE_BATCH else "-"


def survival(cells: Cells) -> list[str]:
    lines = []
    for each, setting in SETTINGS.items():
        lines += [f"\n| {setting} | " + " | ".join(f"batch {b}" for b in BATCHES) + " |"]
        lines += ["| --- |" + " ---: |" * len(BATCHES)]
        for method in ORDER:
            lines.append(f"| {method} | " + " | ".join(show(cells[method, each, b], method, b) for b in BATCHES) + " |")
    return lines


def by_domain(cells: Cells) -> list[str]:
    domains = next(runs for runs in cells.values() if runs)[0].domains
    lines = []
    for each, setting in SETTINGS.items():
        lines += [f"\n| {setting} | batch | " + " | ".join(domains) + " | seeds |"]
        lines += ["| --- | ---: |" + " ---: |" * (len(domains) + 1)]
        for method in ORDER:
            for size in BATCHES:
                if runs := cells[method, each, size]:
                    values = [cell_of([100 * r.summary["accuracy"][d] for r in runs]).show(" ± ") for d in domains]
                    lines.append(f"| {method} | {size} | " + " | ".join(values) + f" | {len(runs)} |")
    return lines


def draw(cells: Cells, path: Path) -> None:
    """Method by batch size, a panel a setting; a line between those that look at the batch and those that do not."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 7.2), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis").with_extremes(bad="0.88")
    for ax, (each, setting) in zip(axes, SETTINGS.items()):
        found = [[cells[method, each, size] for size in BATCHES] for method in ORDER]
        grid = np.array([[np.mean(means(runs)) if runs else np.nan for runs in row] for row in found])
        image = ax.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=10, vmax=85, aspect="auto")
        for (r, c), value in np.ndenumerate(grid):
            text = show(found[r][c], ORDER[r], BATCHES[c]) if np.isnan(value) else f"{value:.0f}"
            ax.text(c, r, text, ha="center", va="center", fontsize=9, color="white" if value < 50 else "black")
        ax.axhline(len(WITHOUT_A_BATCH) - 0.5, color="white", linewidth=4)
        ax.set(title=setting, xlabel="batch size", xticks=range(len(BATCHES)), xticklabels=BATCHES)
        ax.set(yticks=range(len(ORDER)), yticklabels=ORDER)
        ax.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="accuracy (%), mean over domains and seeds", shrink=0.6)
    figure.suptitle("Above the line: normalization that does not look at the batch", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    found = collect(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/normalization"))
    here = Path(__file__).parent
    print("\n".join(survival(found)))
    head = "# By domain\n\nAccuracy (%) after the last round, mean ± standard deviation over seeds; see README.md."
    (here / "by_domain.md").write_text("\n".join([head, *by_domain(found)]) + "\n")
    draw(found, here / "survival.png")

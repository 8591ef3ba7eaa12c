"""Tables and figure of the study: python survival.py [RUNS, default runs/normalization] > tables.md

Writes survival.png beside this file.
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
SETTINGS = {1: "5 clients, all a round", 10: "50 clients, 5 a round"}
NEED_A_BATCH = ("fedavg-bn", "fedbn", "fbn")  # refused with batches of one
ORDER = ("fedavg-bn", "fedbn", "fbn", "gn", "bcn-estimated", "fedwon")
Cells = dict[tuple[str, int, int], list[RunDirectory]]  # method, clients a domain, batch size -> seeds


def collect(root: Path) -> Cells:
    cells: Cells = defaultdict(list)
    for run in find_runs([root]):
        each, size = run.config["federation"]["clients-per-domain"], run.config["training"]["batch-size"]
        cells[run.method, each, size].append(run)
    return cells


def means(runs: list[RunDirectory]) -> list[float]:
    return [100 * float(np.mean(list(r.summary["accuracy"].values()))) for r in runs]


def show(runs: list[RunDirectory], method: str, size: int) -> str:
    if not runs:
        return "refused" if size == 1 and method in NEED_A_BATCH else "-"
    return cell_of(means(runs)).show(" ± ")


def print_survival(cells: Cells) -> None:
    for each, setting in SETTINGS.items():
        print(f"\n| {setting} | " + " | ".join(f"batch {b}" for b in BATCHES) + " |")
        print("| --- |" + " ---: |" * len(BATCHES))
        for method in ORDER:
            print(f"| {method} | " + " | ".join(show(cells[method, each, b], method, b) for b in BATCHES) + " |")


def print_domains(cells: Cells) -> None:
    domains = next(runs for runs in cells.values() if runs)[0].domains
    for each, setting in SETTINGS.items():
        print(f"\n| {setting} | batch | " + " | ".join(domains) + " | seeds |")
        print("| --- | ---: |" + " ---: |" * (len(domains) + 1))
        for method in ORDER:
            for size in BATCHES:
                if runs := cells[method, each, size]:
                    values = [cell_of([100 * r.summary["accuracy"][d] for r in runs]).show(" ± ") for d in domains]
                    print(f"| {method} | {size} | " + " | ".join(values) + f" | {len(runs)} |")


def draw(cells: Cells, folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, (each, setting) in zip(axes, SETTINGS.items()):
        for number, method in enumerate(ORDER):
            found = [(x, means(cells[method, each, b])) for x, b in enumerate(BATCHES) if cells[method, each, b]]
            x = [x + 0.03 * (number - 2.5) for x, _ in found]
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in found]
            ax.errorbar(
                x, [np.mean(v) for _, v in found], spread, marker="o", capsize=2, label=method, color=f"C{number}"
            )
            if method in NEED_A_BATCH:
                ax.plot(0.03 * (number - 2.5), 3, "x", color=f"C{number}")
        ax.axhline(10, color="grey", linewidth=0.8, linestyle=":")
        ax.set(title=setting, xlabel="batch size (cross: refused)", xticks=range(len(BATCHES)), xticklabels=BATCHES)
    axes[0].set(ylabel="mean accuracy over domains (%)", ylim=(0, 100))
    axes[0].legend(fontsize="small")
    figure.savefig(folder / "survival.png", dpi=140)


if __name__ == "__main__":
    found = collect(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/normalization"))
    print_survival(found)
    print_domains(found)
    draw(found, Path(__file__).parent)

"""The rates that tune.sh tried, as markdown: python rates.py [RUNS, default runs/normalization_lr] > rates.md"""

import sys
from collections import defaultdict
from pathlib import Path

from fedsim.results.run import find_runs


def table(root: Path) -> list[str]:
    found: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for run in find_runs([root]):
        training = run.config["training"]
        found[run.method, training["batch-size"]][training["lr"]] = 100 * run.summary["validation_accuracy"]
    rates = sorted({lr for row in found.values() for lr in row})
    lines = [
        "| method | batch | " + " | ".join(f"{lr:g}" for lr in rates) + " |",
        "| --- |" + " ---: |" * (len(rates) + 1),
    ]
    for (method, size), row in sorted(found.items()):
        best = max(row.values())
        cells = [
            f"**{row[lr]:.1f}**" if row.get(lr) == best else f"{row[lr]:.1f}" if lr in row else "fails" for lr in rates
        ]
        lines.append(f"| {method} | {size} | " + " | ".join(cells) + " |")
    return lines


HEAD = """# Rates

Validation accuracy (%) after 15 rounds, five clients, seed 100; `fails`: no update was finite in three rounds."""


if __name__ == "__main__":
    print(HEAD, end="\n\n")
    print("\n".join(table(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/normalization_lr"))))

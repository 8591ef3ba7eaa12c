"""What each evaluation mode gains over another on the same trained models, as a markdown table:

python paired.py test|unseen "METHOD MODE" RUNS...

A cell is the difference in points, paired by seed: mean ± standard deviation over seeds, and in how many seeds it is
above zero. `worst client` is the lowest accuracy of a client's model on its own domain.
"""

import sys
from collections import defaultdict
from pathlib import Path

from fedsim.results.run import find_runs
from fedsim.results.table import cell_of

Scores = dict[str, dict[str, dict[int, float]]]  # "METHOD MODE" -> domain -> seed -> per cent


def collect(paths: list[Path], split: str) -> Scores:
    found: Scores = defaultdict(lambda: defaultdict(dict))
    for run in find_runs(paths):
        for mode, entry in run.summary.get("modes", {}).get(split, {}).items():
            figures = entry["accuracy"] | ({"worst client": entry["worst_client"]} if split == "test" else {})
            for domain, value in figures.items():
                found[f"{run.method} {mode}"][domain][run.summary["seed"]] = 100 * value
    for row in found.values():
        domains = [values for domain, values in row.items() if domain != "worst client"]
        row["mean"] = {seed: sum(v[seed] for v in domains) / len(domains) for seed in domains[0]}
    return found


def gains(scores: Scores, base: str) -> list[str]:
    columns = list(scores[base])
    lines = [f"| gain over {base} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in scores.items():
        if name != base:
            differences = [[v - scores[base][c][seed] for seed, v in row[c].items()] for c in columns]
            cells = [f"{cell_of(d).show(' ± ')} ({sum(v > 0 for v in d)}/{len(d)})" for d in differences]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    split, base, *paths = sys.argv[1:]
    print("\n".join(gains(collect([Path(p) for p in paths], split), base)))

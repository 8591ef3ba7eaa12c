"""Run directories with known figures."""

import json
from pathlib import Path

import pytest

from fedsim.results.store import MetricStore

DOMAINS = ("mnist", "street")


def write_run(folder: Path, name: str, seed: int, accuracy: tuple[float, float], rates: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'name = "{name}"\n')
    summary = {
        "name": name,
        "strategy": name,
        "model": "small-cnn",
        "seed": seed,
        "rounds": 4,
        "accuracy": dict(zip(DOMAINS, accuracy)),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    store = MetricStore(folder / "metrics.sqlite")
    for round in (2, 4):
        rows = [(round, -1, d, "test", "accuracy", 100 * a * round / 4, 100.0) for d, a in zip(DOMAINS, accuracy)]
        if rates:
            rows.append((round, -1, "", "", "server-lr", 1.0 + round, 1.0))
            rows += [(round, c, d, "train", "client-lr", 0.1 * round, 1.0) for c, d in enumerate(DOMAINS)]
        store.add(rows)
    store.commit()
    store.close()
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    figures = {
        ("fedavg", 0): (0.9, 0.5),
        ("fedavg", 1): (0.8, 0.6),
        ("fedbn", 0): (0.95, 0.7),
        ("fedbn", 1): (0.85, 0.8),
    }
    return [write_run(tmp_path / f"{n}-{s}", n, s, a) for (n, s), a in figures.items()]

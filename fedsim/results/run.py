"""Reading run directories, one or many, grouped into methods with their seeds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import DataError
from fedsim.results.store import MetricStore


class RunDirectory:
    """A finished run.

    Attributes:
        summary: contents of summary.json.
        config: contents of config.toml.

    Raises:
        DataError: the folder is no finished run; the message says what is missing.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{path}: no such run directory")
        try:
            reading = "config.toml"
            self.config: dict[str, Any] = tomllib.loads((self.path / reading).read_text())
            reading = "summary.json"
            self.summary: dict[str, Any] = json.loads((self.path / reading).read_text())
        except FileNotFoundError as error:
            name = Path(error.filename).name
            hint = "; the run is not finished: 'fedsim resume' it" if name == "summary.json" else ""
            raise DataError(f"{path}: no run directory, {name} is missing{hint}") from None
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.path / reading}: damaged ({error}); 'fedsim resume {path}' mends a summary"
            ) from None
        _check_summary(self.path / "summary.json", self.summary)

    @property
    def method(self) -> str:
        return str(self.summary["name"])

    @property
    def domains(self) -> list[str]:
        return list(self.summary["accuracy"])

    def metrics(self) -> MetricStore:
        return MetricStore(self.path / "metrics.sqlite", create=False)


def _check_summary(path: Path, summary: Any) -> None:
    mend = "expected as 'fedsim run' writes it; 'fedsim resume' writes it anew"
    if not isinstance(summary, dict):
        raise DataError(f"{path}: holds a {type(summary).__name__}, {mend}")
    if missing := {"name", "strategy", "accuracy", "seed", "rounds"} - summary.keys():
        raise DataError(f"{path}: '{min(missing)}' is missing, {mend}")
    accuracy = summary["accuracy"]
    if not isinstance(accuracy, dict) or not accuracy or not all(type(v) in (int, float) for v in accuracy.values()):
        raise DataError(f"{path}: accuracy is {accuracy!r}, expected a number for every domain, {mend}")


def find_runs(paths: Sequence[Path]) -> list[RunDirectory]:
    """Run directories among ``paths`` and, where one is a folder of runs, inside it.

    Raises:
        DataError: nothing there is a run.
    """
    runs = []
    for path in map(Path, paths):
        if (path / "config.toml").exists() or not path.is_dir():
            runs.append(RunDirectory(path))
            continue
        inside = sorted(p.parent for p in path.rglob("summary.json"))
        if not inside:
            raise DataError(f"{path}: no run directory, and no finished run inside")
        runs += [RunDirectory(p) for p in inside]
    return runs


def by_method(runs: Sequence[RunDirectory]) -> dict[str, list[RunDirectory]]:
    """Name -> runs (seeds), in the order of first appearance.

    Raises:
        DataError: two runs of one name have the same seed, or other domains.
    """
    methods: dict[str, list[RunDirectory]] = {}
    for run in runs:
        mine = methods.setdefault(run.method, [])
        twin = next((r for r in mine if r.summary["seed"] == run.summary["seed"]), None)
        if twin is not None:
            raise DataError(
                f"{run.path} and {twin.path}: both are '{run.method}' with seed {run.summary['seed']}; name one of them"
            )
        if mine and set(mine[0].domains) != set(run.domains):
            raise DataError(f"{run.path} and {mine[0].path}: the same name but other domains")
        mine.append(run)
    return methods

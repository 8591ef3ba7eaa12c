"""Many runs of several configurations over a grid of values, side by side in processes; the best by validation.

Finished runs are kept and unfinished ones resumed, so a sweep can be stopped and started again. Values are compared on
held-out training examples (``federation.validation``), never on a test split.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from fedsim.config import Config, load_config
from fedsim.errors import ConfigError


def parse_grid(items: Sequence[str]) -> dict[str, list[str]]:
    """``["training.lr=0.01,0.1", "seed=0,1"]`` -> values by key.

    Raises:
        ConfigError: an item is not KEY=VALUE,VALUE,...
    """
    grid = {}
    for item in items:
        key, equals, values = item.partition("=")
        if not equals or not values:
            raise ConfigError(f"--grid {item}: expected KEY=VALUE,VALUE,..., for example training.lr=0.01,0.1")
        grid[key.strip()] = [v.strip() for v in values.split(",")]
    return grid


def points(grid: dict[str, list[str]]) -> list[list[str]]:
    """Every combination, as ``--set`` items; the last key changes fastest."""
    return [[f"{k}={v}" for k, v in zip(grid, combination)] for combination in itertools.product(*grid.values())]


def folder_name(point: Sequence[str]) -> str:
    """``["training.lr=0.1", "seed=1"]`` -> ``lr-0.1_seed-1``."""
    parts = [item.partition("=") for item in point]
    return "_".join(f"{key.rpartition('.')[2]}-{value}" for key, _, value in parts) or "run"


def sweep(
    files: Sequence[Path], grid: dict[str, list[str]], overrides: list[str], out: Path, jobs: int
) -> list[tuple[Config, list[str], Path]]:
    """Run every file at every point of the grid into ``out/NAME/POINT``.

    Returns (configuration, point, folder) of the runs that finished; one that fails (a rate too large, say) is named
    and the others go on.

    Raises:
        ConfigError, DataError: a configuration is bad, before anything runs.
    """
    from fedsim.registry import resolve

    todo = []
    for file in files:
        for point in points(grid):
            config = load_config(file, [*overrides, *point, "simulation.workers=0"])
            resolve(config)
            todo.append((config, point, out / config.name / folder_name(point)))
    context = get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(jobs, context, _end_with_parent, (os.getpid(), stop)) as pool:
        running = [pool.submit(_job, config.as_dict(), str(folder)) for config, _, folder in todo]
        finished = []
        try:
            for (config, point, folder), job in zip(todo, running):
                accuracy, failure = job.result()
                print(f"{folder}: {failure or f'mean accuracy {accuracy:.2%}'}", flush=True)
                if failure is None:
                    finished.append((config, point, folder))
        except BaseException:  # Ctrl-C: runs under way stop after their round, and no other begins
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return finished


_stopped: list[Event] = []  # in a worker: its sweep's


def _end_with_parent(parent: int, stop: Event) -> None:
    """A worker whose sweep was killed ends at once, one whose sweep was interrupted after its round: the next sweep
    resumes its run. The sweep alone gets the Ctrl-C."""
    os.setpgid(0, 0)
    _stopped.append(stop)

    def watch() -> None:
        while os.getppid() == parent:
            if stop.wait(0.5):
                os.kill(os.getpid(), signal.SIGTERM)
                break
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _job(values: dict, folder: str) -> tuple[float, str | None]:
    """(mean accuracy, None) or (0, why the run failed)."""
    from fedsim.config import parse_config
    from fedsim.errors import FedsimError
    from fedsim.run import resume, run

    path = Path(folder)
    if any(stop.is_set() for stop in _stopped):  # the pool hands out a few jobs ahead, which it cannot take back
        return 0.0, "not begun"
    if (path / "summary.json").exists():
        return json.loads((path / "summary.json").read_text())["mean_accuracy"], None
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        try:
            summary = resume(path) if (path / "config.toml").exists() else run(parse_config(values), path)
        except FedsimError as error:
            return 0.0, f"failed: {error}"
    return summary["mean_accuracy"], None


def best(results: Sequence[tuple[Config, list[str], Path]]) -> dict[str, tuple[list[str], float]]:
    """Configuration name -> (grid point, validation accuracy) of its best run; seeds at a point are averaged.

    Empty if the runs held no validation data out.
    """
    scores: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for config, point, folder in results:
        summary = json.loads((folder / "summary.json").read_text())
        if "validation_accuracy" in summary:
            setting = tuple(item for item in point if not item.startswith("seed="))
            scores.setdefault((config.name, setting), []).append(summary["validation_accuracy"])
    chosen: dict[str, tuple[list[str], float]] = {}
    for (name, setting), values in scores.items():
        mean = sum(values) / len(values)
        if name not in chosen or mean > chosen[name][1]:
            chosen[name] = (list(setting), mean)
    return chosen


def draw_grid(results: Sequence[tuple[Config, list[str], Path]], grid: dict[str, list[str]], out: Path) -> list[str]:
    """Heat map of a sweep over two keys (beside the seed) into ``out``; the lines to print, none for another sweep."""
    from fedsim.results.heatmap import cells_of, heatmap, table

    keys = [k for k in grid if k != "seed"]
    if len(keys) != 2 or not results:
        return []
    rows, columns = keys
    methods = cells_of([(point, folder) for _, point, folder in results], rows, columns)
    figure = heatmap(methods, (rows, grid[rows]), (columns, grid[columns]))
    for kind in ("png", "svg"):
        figure.savefig(out / f"heatmap.{kind}", dpi=160)
    lines = []
    for name, cells in methods.items():
        lines += [
            f"{name}: mean accuracy (%), rows {rows}, columns {columns}",
            *table(cells, grid[rows], grid[columns]),
        ]
    return [*lines, f"picture: {out / 'heatmap.png'}"]

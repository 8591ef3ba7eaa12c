"""Running configurations one after the other, and the quick recipe that ``fedsim run`` starts with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsim.config import Config, load_config
from fedsim.errors import ConfigError


def quick_recipe() -> list[Path]:
    """FedAvg, FedBN and FedWon on five domains of real digits with the small CNN."""
    folder = Path(__file__).parent
    return [folder / f"{name}.toml" for name in ("fedavg", "fedbn", "fedwon")]


def run_all(
    files: Sequence[Path], overrides: list[str], out: Path | None, seeds: list[int] | None, *, debug: bool = False
) -> list[Path]:
    """Run every file with every seed, then print the table and draw the pictures.

    Every configuration is read and checked before the first one runs. One run goes into ``out`` itself, several into
    ``out/NAME-seedN``.

    Raises:
        ConfigError, DataError: see ``fedsim.run.run``.
    """
    points = [[f"seed={s}"] for s in seeds] if seeds else [[]]
    configs = [load_config(f, [*overrides, *point]) for f in files for point in points]
    if out is None:
        name = configs[0].name if len(configs) == 1 else "compare"
        out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = [out] if len(configs) == 1 else [out / f"{c.name}-seed{c.seed}" for c in configs]
    with _ray_for(configs):
        from fedsim.run import run  # takes seconds, in which Ray starts

        _check(configs, folders)
        for config, folder in zip(configs, folders):
            run(config, folder, debug=debug)
    report(folders, out)
    return folders


def _check(configs: list[Config], folders: list[Path]) -> None:
    from fedsim.registry import resolve

    for config in configs:
        resolve(config)
    if twins := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(
            f"{twins[0].name}: two of the runs have this name and seed; change 'name' in one of the files"
        )


@contextlib.contextmanager
def _ray_for(configs: list[Config]) -> Iterator[None]:
    """One Ray for all the runs: starting it takes seconds."""
    cpus = max(c.simulation.workers * c.simulation.threads for c in configs)
    if cpus == 0:
        yield
        return
    from fedsim.ray_session import session

    with session(cpus, configs[0].simulation.address):
        yield


def report(runs: Sequence[Path], out: Path) -> None:
    """Print the table of the runs and draw their pictures into ``out/plots``."""
    from fedsim.results.cli import plot, table

    table(list(runs), format="text", transpose=False, published=None, compare=None)
    plot(list(runs), out=out / "plots")

"""The command line. Every failure is one plain message and a documented exit code."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Annotated

import click
import typer

from fedsim import interrupts
from fedsim.errors import FedsimError

app = typer.Typer(
    name="fedsim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Simulate federated learning on clients from different domains.

    Start here: `fedsim run` compares FedAvg, FedBN and FedWon on real digits from five domains in about a
    minute and draws the accuracy of each domain. Then run a recipe of your own: `fedsim run CONFIG.toml`.

    Exit codes: 0 done, 2 bad configuration or input, 130 interrupted (resume with `fedsim resume`), 1 anything else.
    """,
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="override a configuration key, e.g. training.lr=0.1; repeatable"),
]
Debug = Annotated[bool, typer.Option("--debug", help="re-raise a client's error and show tracebacks")]


@app.command()
def run(
    config: Annotated[
        list[Path] | None, typer.Argument(help="TOML files, run one after the other; none: the quick recipe")
    ] = None,
    set: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="run directory (with several runs: their parent); default runs/NAME-TIME")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="a seed, or several as 0,1,2: one run each")] = None,
    executor: Annotated[str | None, typer.Option(help="auto, loop or vmap")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; 0: in this process, without Ray")] = None,
    debug: Debug = False,
) -> None:
    """Run a configuration, or compare several; ends with a table and pictures of accuracy per domain."""
    interrupts.raise_in_main_thread()
    from fedsim.recipes import quick_recipe, run_all

    overrides = list(set or [])
    overrides += [f'simulation.executor="{executor}"'] if executor is not None else []
    overrides += [f"simulation.workers={workers}"] if workers is not None else []
    seeds = _seeds(seed) if seed is not None else None
    run_all(config or quick_recipe(), overrides, out, seeds, debug=debug)


def _seeds(text: str) -> list[int]:
    from fedsim.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seed {text}: expected a whole number or several, separated by commas") from None


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")],
    round: Annotated[int | None, typer.Option(help="continue from this round's checkpoint, not the newest")] = None,
    allow_other_numerics: Annotated[
        bool, typer.Option(help="continue although executor, block, threads, device or torch differ from the run's")
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue a run that was stopped or killed; it ends with the bits of an undisturbed one."""
    interrupts.raise_in_main_thread()
    from fedsim.recipes import report
    from fedsim.run import resume as continue_run

    continue_run(path, round=round, allow_other_numerics=allow_other_numerics, debug=debug)
    report([path], path)


@app.command()
def sweep(
    configs: Annotated[list[Path], typer.Argument(help="TOML files")],
    grid: Annotated[
        list[str],
        typer.Option("--grid", metavar="A.B=V,V", help="values to try, e.g. training.lr=0.01,0.1; repeatable"),
    ],
    out: Annotated[Path, typer.Option(help="folder of the runs: OUT/NAME/POINT")],
    set: Set = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs side by side, one process each")] = 2,
) -> None:
    """Run configurations over a grid of values; names the best of each by validation, if examples are held out.

    A finished run is kept and an unfinished one resumed when the same sweep is started again (Ctrl-C stops the runs
    under way after their round). A grid of two keys
    (beside the seed) ends with a heat map, rows the first key's values, and its figures as tables.
    """
    interrupts.raise_in_main_thread()
    from fedsim.sweep import best, draw_grid, parse_grid
    from fedsim.sweep import sweep as run_sweep

    values = parse_grid(grid)
    results = run_sweep(configs, values, list(set or []), out, jobs)
    for line in draw_grid(results, values, out):
        print(line)
    for name, (point, accuracy) in best(results).items():
        print(f"{name}: best on validation at {' '.join(point)} ({accuracy:.2%})")


@app.command(name="list")
def list_() -> None:
    """List strategies, the parts of each axis with their options, evaluation modes, models and data sets."""
    from rich.console import Console

    from fedsim.config import kebab, toml_value
    from fedsim.data import NAMES
    from fedsim.evaluation import mode_names
    from fedsim.models import model_names
    from fedsim.registry import AXES, options_of, parts, presets

    console = Console()
    console.print("[bold]strategies[/bold] (algorithm.strategy)")
    for name, preset in presets().items():
        console.print(f"  {name:14} {preset.summary}", highlight=False)
    for axis in AXES[1:]:
        console.print(f"[bold]{axis}[/bold] (algorithm.{axis})")
        for name, builder in parts(axis).items():
            options = ", ".join(f"{kebab(k)} = {toml_value(v)}" for k, v in options_of(builder).items())
            console.print(f"  {name:22} {options}", highlight=False)
    console.print("[bold]evaluation modes[/bold] (evaluation.modes)\n  " + ", ".join(mode_names()), highlight=False)
    console.print("[bold]models[/bold] (model.name)\n  " + ", ".join(model_names()), highlight=False)
    console.print("[bold]data sets[/bold] (federation.dataset)\n  " + ", ".join(NAMES), highlight=False)


@app.command()
def doctor() -> None:
    """Say what this machine offers: versions, cores, memory, GPUs, cache folder."""
    import os
    import platform

    import flwr
    import numpy
    import ray
    import torch
    from rich.console import Console

    from fedsim.data import cache_folder

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.cuda.device_count()} GPUs",
        "flwr": flwr.__version__,
        "ray": ray.__version__,
        "numpy": numpy.__version__,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{pages / 2**30:.1f} GiB",
        "cache": str(cache_folder()),
    }
    for name, value in lines.items():
        Console().print(f"{name:8} {value}", highlight=False)


@functools.cache
def _mount() -> None:
    from fedsim.data_cli import app as data
    from fedsim.deployment.cli import client, keys, server
    from fedsim.results.cli import plot, table

    app.command()(server)
    app.command()(client)
    app.add_typer(keys, name="keys", help="Keys and certificates of a deployment.")
    app.command()(plot)
    app.command()(table)
    app.add_typer(data, name="data", help="Show, describe and partition data sets.")


def main() -> None:
    """Entry point of the ``fedsim`` command."""
    debug = "--debug" in sys.argv
    started = time.time()
    interrupts.asked.clear()
    try:
        _mount()
        try:
            code = app(standalone_mode=False, prog_name="fedsim")
        finally:  # whatever became of an interrupt: nothing, another error, click's silent exit at a broken pipe
            interrupts.raise_if_asked()
        if code == 130:  # typer's word for an interrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "fedsim"
        print(f"fedsim: {error.format_message()} (see '{command} --help')", file=sys.stderr)
        sys.exit(2)
    except FedsimError as error:
        if debug:
            raise
        print(f"fedsim: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except (KeyboardInterrupt, click.Abort):
        print(f"fedsim: interrupted after {time.time() - started:.0f} s", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        print(f"fedsim: {error.filename or 'a file'}: {error.strerror or error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        print(f"fedsim: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""``fedsim plot`` and ``fedsim table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories, or folders of them")]


def plot(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help="folder of the pictures; default: plots/ of the first RUN")] = None,
) -> None:
    """Draw accuracy by domain, final bars, clients by rounds and learning rates, as PNG and SVG."""
    from fedsim.results.plots import draw_all
    from fedsim.results.run import find_runs

    paths = draw_all(find_runs(runs), out or Path(runs[0]) / "plots")
    print(f"pictures: {paths[0]}" + "".join(f", {p.name}" for p in paths[1:4]) + (" ..." if len(paths) > 4 else ""))


def table(
    runs: Runs,
    format: Annotated[str, typer.Option(help="text, markdown, csv or latex")] = "text",
    transpose: Annotated[bool, typer.Option("--transpose", help="domains in rows, as in the papers")] = False,
    costs: Annotated[bool, typer.Option("--costs", help="FLOPs, memory and bytes instead of the domains")] = False,
    modes: Annotated[str, typer.Option(help="evaluation modes by domain: test, or unseen for those left out")] = "",
    published: Annotated[Path | None, typer.Option(help="TOML file of published figures to show beside ours")] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="paired test of two methods over seeds and domains")
    ] = None,
) -> None:
    """Print accuracy by method and domain, or what it cost: mean and standard deviation over seeds."""
    from fedsim.results.compare import compare as compare_methods
    from fedsim.results.costs import collect_costs
    from fedsim.results.modes import collect_modes
    from fedsim.results.run import find_runs
    from fedsim.results.table import add_published, collect, render

    found = find_runs(runs)
    results = collect_modes(found, modes) if modes else collect_costs(found) if costs else collect(found)
    if published is not None:
        results = add_published(results, published)
    print(render(results, format, transpose=transpose))
    if compare is not None:
        print(compare_methods(found, *compare))

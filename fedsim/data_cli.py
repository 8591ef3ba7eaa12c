"""``fedsim data``: look at a data set and at a partition before training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="digits, digits-five, office-caltech-10, folder, ...")]
Root = Annotated[str, typer.Option(help="folder of your own copy")]


@app.command()
def show(
    name: Name, root: Root = "", out: Annotated[Path, typer.Option(help="folder of the pictures")] = Path(".")
) -> None:
    """Draw a contact sheet of every domain: a row a class."""
    from fedsim.data import load_dataset
    from fedsim.data.pictures import contact_sheet

    dataset = load_dataset(name, root)
    out.mkdir(parents=True, exist_ok=True)
    for domain in dataset.domains:
        path = out / f"{name}-{domain}.png"
        contact_sheet(dataset, domain).save(path)
        print(path)


@app.command()
def info(name: Name, root: Root = "") -> None:
    """Print counts, label histograms and the checksum, which is computed anew and compared."""
    import numpy as np

    from fedsim.data import load_dataset

    dataset = load_dataset(name, root)
    dataset.verify()
    few = len(dataset.classes) <= 12
    table = Table(box=None, padding=(0, 2, 0, 0))  # 77 columns with ten classes: narrow enough for any terminal or pipe
    table.add_column("domain")
    table.add_column("split")
    table.add_column("examples", justify="right")
    table.add_column(f"of each class ({dataset.classes[0]} .. {dataset.classes[-1]})", no_wrap=True)
    for domain in dataset.domains:
        for split, labels in (("train", dataset.y_train), ("test", dataset.y_test)):
            rows = dataset.slice(domain, split)
            counts = np.bincount(np.asarray(labels[rows]).reshape(-1), minlength=len(dataset.classes))
            shown = " ".join(f"{c:4d}" for c in counts) if few else f"{counts.min()} to {counts.max()}"
            table.add_row(domain, split, str(len(rows)), shown)
    Console().print(table)
    print(f"{dataset.name}: examples of shape {dataset.shape}, sha256 {dataset.digest}")
    print(f"in {dataset.folder}")


@app.command()
def partition(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file")],
    out: Annotated[Path, typer.Option(help="picture to write")] = Path("partition.png"),
) -> None:
    """Draw who holds what under a configuration: clients by classes, coloured by domain."""
    from fedsim.config import load_config
    from fedsim.data import from_config
    from fedsim.data.pictures import partition_figure, save
    from fedsim.registry import resolve

    resolved, _ = resolve(load_config(config))
    dataset, shards = from_config(resolved)
    save(partition_figure(dataset, shards), out)
    sizes = shards.sizes
    print(f"{len(shards)} clients, {sizes.min()} to {sizes.max()} examples each, {sizes.sum()} in all; drawn in {out}")

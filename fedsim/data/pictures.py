"""Pictures of data: a contact sheet of each domain, and a partition as clients by classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from fedsim.data.dataset import Dataset
from fedsim.data.partition import Partition

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito


def contact_sheet(dataset: Dataset, domain: str, columns: int = 14, scale: int = 3) -> Image.Image:
    """The first training images of every class, a row a class."""
    x, y = dataset.x_train, dataset.y_train
    _, height, width = dataset.shape
    sheet = np.full(
        ((height + 1) * len(dataset.classes) + 1, (width + 1) * columns + 1, 3), (255, 0, 255), np.uint8
    )  # magenta: no picture looks like a gap
    mine = dataset.slice(domain, "train")
    for label in range(len(dataset.classes)):
        for column, row in enumerate(mine[np.asarray(y[mine]) == label][:columns]):
            image = np.broadcast_to(np.asarray(x[row]).transpose(1, 2, 0), (height, width, 3))
            top, left = label * (height + 1) + 1, column * (width + 1) + 1
            sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def partition_figure(dataset: Dataset, shards: Partition, most: int = 60) -> Figure:
    """Clients by classes; area of a dot: examples of that class; colour: domain. The first ``most`` clients."""
    clients, classes = min(len(shards), most), len(dataset.classes)
    figure = Figure(figsize=(0.9 + 0.24 * max(clients, 10) + 1.2, 0.9 + 0.28 * classes), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts = np.stack(
        [np.bincount(np.asarray(dataset.y_train[shards[c]]).reshape(-1), minlength=classes) for c in range(clients)]
    )
    largest = max(counts.max(), 1)
    mixed = "#777777"
    for client in range(clients):
        number = shards.domain[client]
        colour = COLOURS[number % len(COLOURS)] if number >= 0 else mixed
        axes.scatter(np.full(classes, client), range(classes), s=160 * counts[client] / largest, color=colour)
    axes.set(xlim=(-0.7, clients - 0.3), ylim=(classes - 0.4, -0.6))
    axes.set_xlabel(f"client ({clients} of {len(shards)})" if clients < len(shards) else "client")
    axes.set_ylabel("class")
    axes.set_yticks(range(classes), dataset.classes, fontsize=8)
    axes.set_title(f"{dataset.name}: examples a class (largest dot: {largest})", fontsize=9, loc="left")
    present = sorted(set(shards.domain[:clients].tolist()))
    labels = [(COLOURS[n % len(COLOURS)], shards.domains[n]) if n >= 0 else (mixed, "mixed domains") for n in present]
    figure.legend(handles=[Patch(color=c, label=t) for c, t in labels], loc="outside right upper", fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

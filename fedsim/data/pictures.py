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
from fedsim.errors import DataError

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito
MIXED = "#777777"
DOT = 110.0  # area of the largest dot, square points


def contact_sheet(dataset: Dataset, domain: str, columns: int = 14, height: int = 84) -> Image.Image:
    """The first training images of every class, a row a class, each about ``height`` pixels high.

    Raises:
        DataError: the examples are no images.
    """
    if len(dataset.shape) != 3:
        raise DataError(f"{dataset.name}: examples of shape {dataset.shape} are no images, there is nothing to show")
    x, mine = dataset.x_train, dataset.slice(domain, "train")
    labels = np.asarray(dataset.y_train[mine])
    _, h, w = dataset.shape
    sheet = np.full(((h + 1) * len(dataset.classes) + 1, (w + 1) * columns + 1, 3), 255, np.uint8)
    for label in range(len(dataset.classes)):
        for column, row in enumerate(mine[labels == label][:columns]):
            top, left = label * (h + 1) + 1, column * (w + 1) + 1
            sheet[top : top + h, left : left + w] = np.asarray(x[row]).transpose(1, 2, 0)
    picture = Image.fromarray(sheet)
    scale = max(1, height // h)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def partition_figure(dataset: Dataset, shards: Partition, most: int = 60) -> Figure:
    """Clients by classes; area of a dot: examples of that class; colour: domain. Of more than ``most`` clients, so
    many are drawn, evenly spaced."""
    shown = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), most)).astype(np.int64))
    classes = len(dataset.classes)
    counts = np.stack(
        [np.bincount(np.asarray(dataset.y_train[shards[c]]).reshape(-1), minlength=classes) for c in shown]
    )
    largest = max(int(counts.max()), 1)
    width, height = 2.6 + 0.24 * max(len(shown), 12), 1.2 + 0.26 * min(max(classes, 4), 40)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place, label = np.nonzero(counts)
    domain = shards.domain[shown]
    colours = np.array([COLOURS[n % len(COLOURS)] if n >= 0 else MIXED for n in domain])
    axes.scatter(place, label, s=DOT * counts[place, label] / largest, color=colours[place], zorder=2)
    axes.set(xlim=(-0.7, len(shown) - 0.3), ylim=(classes - 0.4, -0.6), axisbelow=True)
    ticks = np.arange(0, len(shown), -(-len(shown) // 12))
    axes.set_xticks(ticks, [str(c) for c in shown[ticks]], fontsize=8)
    rows = np.arange(0, classes, -(-classes // 40))
    axes.set_yticks(rows, [dataset.classes[r] for r in rows], fontsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_xlabel("client" if len(shown) == len(shards) else f"client ({len(shown)} of {len(shards)}, evenly spaced)")
    axes.set_ylabel("class")
    axes.set_title(f"{dataset.name}: examples of each class; the largest dot is {largest}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    present = [
        (COLOURS[n % len(COLOURS)], shards.domains[n]) if n >= 0 else (MIXED, "mixed") for n in np.unique(domain)
    ]
    figure.legend(handles=[Patch(color=c, label=t) for c, t in present], loc="outside right upper", fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

"""Pictures of the clients of a run: accuracy of each by round, and learning rates."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from fedsim.results.figure import SMALL, label_axes, new_figure, style, whole_rounds
from fedsim.results.run import RunDirectory


def client_heatmap(run: RunDirectory) -> Figure:
    """Clients by evaluated rounds; a client without a model of its own shows that of its domain."""
    store = run.metrics()
    rows = store.read("accuracy", "test")
    store.close()
    rounds = sorted({r for r, *_ in rows})
    owners = sorted({(domain, client) for _, client, domain, *_ in rows}, key=lambda o: (run.domains.index(o[0]), o[1]))
    values = np.full((len(owners), len(rounds)), np.nan)
    for round, client, domain, total, weight in rows:
        values[owners.index((domain, client)), rounds.index(round)] = 100 * total / weight
    figure = new_figure(5.6, max(1.8, 0.9 + 0.22 * min(len(owners), 40)))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
    if len(owners) <= 40:
        labels = [f"{domain}, client {client}" if client >= 0 else domain for domain, client in owners]
        axes.set_yticks(range(len(owners)), labels, fontsize=SMALL)
    ticks = np.arange(len(rounds) - 1, -1, -math.ceil(len(rounds) / 10))[::-1]  # even steps that end at the last round
    axes.set_xticks(ticks, [rounds[t] for t in ticks], fontsize=SMALL)
    axes.set_xlabel("communication round", fontsize=SMALL + 1)
    axes.set_title(run.method, fontsize=SMALL + 2, loc="left")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("test accuracy (%)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def learning_rates(run: RunDirectory) -> Figure | None:
    """The server's rate by round, each client's (thin) and their means by domain, if the run adapted any."""
    store = run.metrics()
    server, clients = store.read("server-lr", ""), store.read("client-lr", "train")
    store.close()
    if not server and not clients:
        return None
    figure = new_figure(5.6, 3.0)
    panels = np.atleast_1d(figure.subplots(1, int(bool(server)) + int(bool(clients)))).tolist()
    if server:
        axes = panels.pop(0)
        axes.plot([r for r, *_ in server], [total / weight for *_, total, weight in server], **style(0))
        label_axes(axes, "communication round", "server rate alpha")
        whole_rounds(axes)
    if clients:
        axes = panels.pop(0)
        domains = list(dict.fromkeys(domain for _, _, domain, *_ in clients))
        for number, domain in enumerate(domains):
            mine = [(r, c, total / weight) for r, c, d, total, weight in clients if d == domain]
            for client in sorted({c for _, c, _ in mine}):
                points = [(r, v) for r, c, v in mine if c == client]
                axes.plot(*zip(*points), color=style(number)["color"], alpha=0.2, linewidth=0.7)
            rounds = sorted({r for r, *_ in mine})
            means = [float(np.mean([v for r, _, v in mine if r == round])) for round in rounds]
            label = f"mean of {domain}" if len(domains) > 1 else "mean of the clients"
            axes.plot(rounds, means, label=label, markevery=max(1, len(rounds) // 8), **style(number))
        label_axes(axes, "communication round", "client rate beta")
        whole_rounds(axes)
        axes.legend(fontsize=SMALL, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure

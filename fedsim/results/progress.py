"""Live progress: a bar and the latest accuracies on a terminal, one plain line an evaluated round in a file."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Use as a context manager around the round loop."""

    def __init__(self, name: str, rounds: int, console: Console | None = None):
        self.name, self.rounds = name, rounds
        self.console = console or Console()
        self.first: tuple[float, int, int] | None = None  # time, round and examples of the first report
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task(self.name, total=self.rounds, text="first round ...")
            self.bar.start()
        else:
            self._print(f"{self.name}: {self.rounds} rounds")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, round: int, *, accuracy: Mapping[str, float] | None, loss: float | None, examples: int) -> None:
        """Report an evaluated round. ``accuracy``: domain -> 0..1; ``examples``: seen since the start."""
        now = time.perf_counter()
        if self.first is None:  # start-up belongs to no round
            self.first = (now, round, examples)
        parts = []
        if accuracy:
            parts += [f"{domain} {100 * value:.1f}" for domain, value in accuracy.items()][:8]
            parts += [f"mean {100 * sum(accuracy.values()) / len(accuracy):.1f}"]
        parts += [f"loss {loss:.3f}"] if loss is not None else []
        elapsed, rounds = now - self.first[0], round - self.first[1]
        if rounds > 0:
            parts.append(f"{(examples - self.first[2]) / max(elapsed, 1e-9):,.0f} examples/s")
            parts.append(f"{clock(elapsed / rounds * (self.rounds - round))} left")
        if self.bar:
            self.bar.update(self.task, completed=round, text="  ".join(parts))
        else:
            self._print(f"round {round}/{self.rounds}  " + "  ".join(parts))

    def note(self, message: str) -> None:
        """An event worth a line: a rejected update, a resumed run."""
        self._print(f"{self.name}: {message}")

    def _print(self, line: str) -> None:
        # A path or the name of a tensor may hold brackets, which rich would take for its markup.
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

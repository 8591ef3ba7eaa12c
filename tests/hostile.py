"""Clients that misbehave, for tests: they train with the rest, and what they hand over is spoiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fedsim.local import Outcomes
from fedsim.types import Tensors
from fedsim.worker import EXECUTORS

Spoil = Callable[[Tensors], Tensors]


def floats(tensors: Tensors) -> list[str]:
    return sorted(n for n, v in tensors.items() if v.dtype.is_floating_point)


def scaled(factor: float) -> Spoil:
    """Every floating-point tensor times ``factor``: finite, and far away."""
    return lambda shared: {n: v * factor if n in floats(shared) else v for n, v in shared.items()}


def hand_over(monkeypatch: pytest.MonkeyPatch, client: int, spoil: Spoil, rounds: set[int] | None = None) -> None:
    """From now on ``client``'s trained tensors are spoiled before the worker looks at them (in these rounds alone).
    For federations in this process."""

    def wrap(executor: Callable) -> Callable:
        def run(task, order, block, lr, fetch) -> Iterator[Outcomes]:
            for outcomes in executor(task, order, block, lr, fetch):
                for row, number in enumerate(outcomes.clients):
                    one = outcomes.one(row)
                    if number == client and (rounds is None or order.round in rounds):
                        spoilt = spoil({n: v[0] for n, v in one.shared.items()})
                        one = replace(one, shared={n: v[None] for n, v in spoilt.items()})
                    yield one

        return run

    for name, executor in list(EXECUTORS.items()):
        monkeypatch.setitem(EXECUTORS, name, wrap(executor))

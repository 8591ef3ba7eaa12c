"""Clients that misbehave, for tests: they train with the rest, and what they hand over is spoiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fedsim.local import Outcome
from fedsim.types import Order, Tensors
from fedsim.worker import EXECUTORS

Spoil = Callable[[Tensors], Tensors]


def floats(tensors: Tensors) -> list[str]:
    return sorted(n for n, v in tensors.items() if v.dtype.is_floating_point)


def scaled(factor: float) -> Spoil:
    """Every floating-point tensor times ``factor``: finite, and far away."""
    return lambda shared: {n: v * factor if n in floats(shared) else v for n, v in shared.items()}


def tamper(monkeypatch: pytest.MonkeyPatch, client: int, change: Callable[[Order, Outcome], Outcome]) -> None:
    """From now on what ``client`` ends with goes through ``change`` before the worker looks at it. For federations in
    this process."""

    def wrap(executor: Callable) -> Callable:
        def run(task, order, block, lr) -> Iterator[Outcome]:
            for outcome in executor(task, order, block, lr):
                yield change(order, outcome) if outcome.client == client else outcome

        return run

    for name, executor in list(EXECUTORS.items()):
        monkeypatch.setitem(EXECUTORS, name, wrap(executor))


def hand_over(monkeypatch: pytest.MonkeyPatch, client: int, spoil: Spoil, rounds: set[int] | None = None) -> None:
    """``client`` hands over spoiled tensors (in these rounds alone)."""

    def change(order: Order, outcome: Outcome) -> Outcome:
        return replace(outcome, shared=spoil(outcome.shared)) if rounds is None or order.round in rounds else outcome

    tamper(monkeypatch, client, change)

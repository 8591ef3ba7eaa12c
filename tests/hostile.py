"""Clients that misbehave, for tests: they train with the rest, and what they hand over is spoiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from fedsim.local import Outcomes
from fedsim.types import Order, Tensors
from fedsim.worker import EXECUTORS

Spoil = Callable[[Tensors], Tensors]
Change = Callable[[Order, Outcomes], Outcomes]


def floats(tensors: Tensors) -> list[str]:
    return sorted(n for n, v in tensors.items() if v.dtype.is_floating_point)


def scaled(factor: float) -> Spoil:
    """Every floating-point tensor times ``factor``: finite, and far away."""
    return lambda shared: {n: v * factor if n in floats(shared) else v for n, v in shared.items()}


def _changed(outcome: Outcomes, order: Order, change: Change) -> Outcomes:
    bare = lambda tree: {n: v[0] for n, v in tree.items()}  # noqa: E731
    after = change(order, replace(outcome, shared=bare(outcome.shared), report=bare(outcome.report)))
    column = lambda tree: {n: v[None] for n, v in tree.items()}  # noqa: E731
    loss = torch.as_tensor(after.loss, dtype=torch.float64).reshape(1)
    return replace(after, shared=column(after.shared), report=column(after.report), loss=loss)


def tamper(monkeypatch: pytest.MonkeyPatch, client: int, change: Change) -> None:
    """From now on what ``client`` ends with goes through ``change`` before the worker looks at it: one client's
    outcome, its tensors without the dimension of the clients. For federations in this process."""

    def wrap(executor: Callable) -> Callable:
        def run(task, order, block, lr, fetch) -> Iterator[Outcomes]:
            for outcomes in executor(task, order, block, lr, fetch):
                for row, number in enumerate(outcomes.clients):
                    one = outcomes.one(row)
                    yield _changed(one, order, change) if number == client else one

        return run

    for name, executor in list(EXECUTORS.items()):
        monkeypatch.setitem(EXECUTORS, name, wrap(executor))


def hand_over(monkeypatch: pytest.MonkeyPatch, client: int, spoil: Spoil, rounds: set[int] | None = None) -> None:
    """``client`` hands over spoiled tensors (in these rounds alone)."""

    def change(order: Order, outcome: Outcomes) -> Outcomes:
        return replace(outcome, shared=spoil(outcome.shared)) if rounds is None or order.round in rounds else outcome

    tamper(monkeypatch, client, change)

"""Where blocks run: in this process, or in Ray actors (``fedsim.ray_pool``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from fedsim.fold import Apart, Chain
from fedsim.worker import Worker, WorkerSpec


class WorkerLost(Exception):
    """A call could not be finished: the worker that ran it died or took too long, as often as retries allow.

    Args:
        stage: ``worker`` or ``time``.
    """

    def __init__(self, reason: str, stage: str = "worker"):
        super().__init__(reason)
        self.stage = stage


class SumLost(Exception):
    """A sum that was apart cannot be had."""


class Pool(Protocol):
    retried: list[tuple[int, str]]
    """Numbers of the last ``map``'s calls that were repeated, once for each time, and why."""
    apart: bool
    """Whether large sums are better added elsewhere than by the caller."""

    def map(
        self, method: str, common: Any, calls: Sequence[tuple], *, apart: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Call ``worker.method(common, *call)`` for every call; yield (number of the call, result) as they end.

        ``common`` is the same for all of them and travels once; the first of ``call`` is a sequence of clients or of
        evaluation jobs. A result may be a ``WorkerLost``.

        Args:
            apart: a result's ``partial``, if it has one, is for a ``group`` alone, and perhaps not here.
        """
        ...

    def group(self, apart: bool) -> Chain | Apart:
        """What adds the sums of a ``map``. An ``Apart`` may raise ``SumLost`` in the end: what it adds can be lost with
        those who hold it."""
        ...

    def close(self) -> None: ...


class InProcess:
    """One worker in this process: no Ray, easiest to debug, the same bits."""

    apart = False

    def __init__(self, spec: WorkerSpec):
        self.worker = Worker(spec)
        self.retried: list[tuple[int, str]] = []

    def map(
        self, method: str, common: Any, calls: Sequence[tuple], *, apart: bool = False
    ) -> Iterator[tuple[int, Any]]:
        for number, call in enumerate(calls):
            yield number, getattr(self.worker, method)(common, *call)

    def group(self, apart: bool) -> Chain:
        return Chain()

    def close(self) -> None:
        pass

"""Blocks in persistent Ray actors.

A round's order is put into the object store once (small ones go with every call). A worker that dies or hangs is
replaced and its call repeated: a block is a pure function of its arguments, so the repetition has the same bits.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from fedsim.errors import ConfigError
from fedsim.fold import Apart, Chain
from fedsim.pool import WorkerLost
from fedsim.ray_actors import LOST, Workers, first_line, register_tensors
from fedsim.ray_session import Session, current
from fedsim.ray_sums import Adders
from fedsim.worker import WorkerSpec

SMALL = 1 << 15  # bytes of a model: an object in the store takes milliseconds, as long as training many of these
GRACE = 10.0  # seconds beyond the limits of a call's clients or models: to send the call, gather, send the result


class RayPool:
    """``workers`` actors of ``spec.threads`` CPUs each.

    Args:
        gpus: GPUs (or a fraction of one) for each actor.
        address: of a running cluster; empty starts one on this machine, which ``close`` ends again.
        retries: how often a call is repeated after its actor died or took too long.
        limit: seconds for each item (client, evaluation job) of the sequence that is the first input of a call; 0: any
            time. A call that takes longer than its items together and ``GRACE``, the start of its actor not counted,
            has its actor killed and replaced, and is repeated after the other calls.

    Raises:
        ConfigError: the cluster cannot be reached, or has not the CPUs or GPUs asked for.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: int,
        *,
        gpus: float = 0.0,
        address: str = "",
        retries: int = 2,
        limit: float = 0.0,
    ):
        self.retries, self.limit = retries, limit
        self.retried: list[tuple[int, str]] = []
        self.small = sum(v.nbytes for v in spec.task.model.state_dict().values()) <= SMALL
        self.workers = Workers(spec, workers, gpus, retries)
        self.adders = Adders(self.workers, retries)
        self.apart = self.adders.wanted
        # Ray that others keep going, or one of this pool's own
        self.own = None if current() or ray.is_initialized() else Session(workers * spec.threads)
        try:
            self._open(workers * spec.threads, gpus, address)
        except BaseException:  # an interrupt too: nobody has this pool yet to close it
            self.close()
            raise

    def _open(self, cpus: int, gpus: float, address: str) -> None:
        if self.own:
            self.own.start(address)
        if ours := self.own or current():
            ours.wait()
        have, workers = ray.cluster_resources(), len(self.workers)
        if gpus * workers > have.get("GPU", 0) or cpus > have.get("CPU", 0):
            raise ConfigError(
                f"simulation: {workers} workers with {gpus} GPUs each need {cpus} CPUs and {gpus * workers:g} GPUs;"
                f" Ray found {have.get('CPU', 0):g} and {have.get('GPU', 0):g}: lower workers, threads or"
                " gpus-per-worker"
            )
        register_tensors()
        for worker in range(workers):
            self.workers.launch(worker)

    def map(
        self, method: str, common: Any, calls: Sequence[tuple], *, apart: bool = False
    ) -> Iterator[tuple[int, Any]]:
        self.retried = []
        return _Map(self, method, common, calls, apart).results()

    def group(self, apart: bool) -> Chain | Apart:
        return self.adders.group() if apart else Chain()

    def put(self, argument: Any) -> Any:
        """In the object store; as it is if the model is small, when Ray sends it with the call."""
        return argument if self.small else ray.put(argument)

    def close(self) -> None:
        self.workers.close()
        self.adders.close()
        if self.own:
            self.own.close()


@dataclass(frozen=True)
class _Running:
    worker: int
    number: int
    tries: int
    limit: float
    deadline: float
    partial: Any  # reference to its sum, if that is kept apart


class _Map:
    """One ``map``: every call waits, runs (perhaps again) and is done."""

    def __init__(self, pool: RayPool, method: str, common: Any, calls: Sequence[tuple], apart: bool):
        self.pool, self.workers = pool, pool.workers
        self.method, self.common, self.calls, self.apart = method, pool.put(common), calls, apart
        self.waiting = deque((number, 0) for number in range(len(calls)))  # (number, times it has been tried)
        self.ready: dict[int, tuple[Any, int]] = {}  # by number: one call more for every worker
        self.idle = self.workers.up()
        self.running: dict[Any, _Running] = {}  # by reference to the result
        self.done: deque[tuple[int, Any]] = deque()

    def results(self) -> Iterator[tuple[int, Any]]:
        """(number of the call, result) as they come."""
        while True:
            self._send()
            while self.done:  # only now that their workers have something to do
                yield self.done.popleft()
            if not self.running and not self.waiting:
                return
            for reference in self._wait():
                if reference in self.workers.starting:
                    self.idle += self.workers.started(reference)
                else:
                    self._receive(reference)
            self._end_overdue()

    def _send(self) -> None:
        while self.waiting and self.idle:
            (number, tries), worker = self.waiting.popleft(), self.idle.pop(0)
            call, size = self.ready.pop(number) if number in self.ready else self._arguments(number)
            limit = self.pool.limit * size + GRACE if self.pool.limit else math.inf
            reference, partial = self.workers.call(worker, self.method, self.common, call, apart=self.apart)
            self.running[reference] = _Running(worker, number, tries, limit, time.monotonic() + limit, partial)

    def _arguments(self, number: int) -> tuple[Any, int]:
        """A call's arguments, and how many clients or models they are."""
        call = self.calls[number]
        return self.pool.put(call), len(call[0])

    def _wait(self) -> list[Any]:
        """The reference of a result that has come, or of a worker; none at a deadline, and if there was a call to be
        read ahead, which hides behind the training of the others."""
        left = min((run.deadline for run in self.running.values()), default=math.inf) - time.monotonic()
        timeout = None if left == math.inf else max(left, 0.0)
        next_ones = itertools.islice(self.waiting, len(self.workers))
        following = next((number for number, _ in next_ones if number not in self.ready), None)
        if following is not None:
            self.ready[following], timeout = self._arguments(following), 0.0
        return ray.wait([*self.running, *self.workers.starting], num_returns=1, timeout=timeout)[0]

    def _receive(self, reference: Any) -> None:
        run = self.running.pop(reference)
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except LOST as error:
            self.workers.launch(run.worker)
            if run.tries < self.pool.retries:
                self.pool.retried.append((run.number, f"its worker died: {first_line(error)}"))
                self.waiting.appendleft((run.number, run.tries + 1))
            else:
                lost = WorkerLost(f"its worker died {run.tries + 1} times: {first_line(error)}")
                self.done.append((run.number, lost))
            return
        self.idle.append(run.worker)
        if run.partial is not None and result.replies:
            result.partial = run.partial, self.workers.processes[run.worker][0]
        self.done.append((run.number, result))

    def _end_overdue(self) -> None:
        for reference, run in list(self.running.items()):
            if time.monotonic() < run.deadline:
                continue
            del self.running[reference]
            self.workers.replace(run.worker)
            if run.tries < self.pool.retries:
                self.pool.retried.append((run.number, f"no result within {run.limit:g} s"))
                self.waiting.append((run.number, run.tries + 1))
            else:
                lost = WorkerLost(f"no result within {run.limit:g} s, {run.tries + 1} times", "time")
                self.done.append((run.number, lost))

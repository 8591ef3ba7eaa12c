"""Persistent Ray actors. With ``fedsim.ray_session`` the only module that imports Ray.

The worker's specification and a round's order are put into the object store once (small ones go with every call);
tensors cross as numpy arrays, which Ray maps into the actors without a copy. A worker that dies or hangs is replaced
and its call repeated: a block is a pure function of its arguments, so the repetition has the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.errors import ConfigError, FedsimError
from fedsim.fold import Apart, Chain, Partial, gather
from fedsim.local import ClientTask
from fedsim.pool import SumLost, WorkerLost
from fedsim.processes import keep_memory
from fedsim.ray_session import Session, current
from fedsim.worker import Worker, WorkerSpec

LOST = (RayActorError, OutOfMemoryError)  # the process of an actor is gone
SMALL = 1 << 15  # bytes of a model: an object in the store takes milliseconds, as long as training many of these
MANY = 8  # workers whose large sums are not left to the driver to add, which two or four do not keep busy
PATIENCE = 300.0  # seconds for sums that are added already, or nearly
GRACE = 10.0  # seconds beyond the limits of a call's clients or models: to send the call, gather, send the result


def _from_numpy(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the store's memory is read-only, and nobody writes to it
        return torch.from_numpy(array)


def _register_tensors() -> None:
    ray.util.register_serializer(torch.Tensor, serializer=lambda t: t.detach().cpu().numpy(), deserializer=_from_numpy)


class _Actor:
    def __init__(self, task: ClientTask, rest: dict[str, Any]):
        """The specification in two parts: the worker keeps the rest, and with it all of that object, in the store."""
        keep_memory()
        _register_tensors()
        self.worker = Worker(WorkerSpec(task, **rest), lends=True)

    def where(self) -> tuple[str, int]:
        """(node, process)"""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def call(self, method: str, common: Any, call: tuple) -> Any:
        return getattr(self.worker, method)(common, *call)

    @ray.method(num_returns=2)
    def call_apart(self, method: str, common: Any, call: tuple) -> tuple[Any, Any]:
        """The result, and its sum as an object of its own, which stays in this node's store."""
        result = self.call(method, common, call)
        partial, result.partial = result.partial, None
        return result, partial


class _Adder:
    """Adds sums on the node where they are."""

    def __init__(self) -> None:
        keep_memory()
        _register_tensors()
        torch.set_num_threads(1)

    def add(self, *sums: Partial) -> Partial:
        return gather(None, list(sums))


@dataclass(frozen=True)
class _Running:
    actor: int
    number: int
    tries: int
    limit: float
    deadline: float
    partial: Any  # its sum, if it is kept apart


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
        self.spec = spec
        self.small = sum(v.nbytes for v in spec.task.model.state_dict().values()) <= SMALL
        self.sent: tuple[Any, ...] = ()  # the specification in the object store: while workers start
        self.remote = ray.remote(num_cpus=spec.threads, num_gpus=gpus, max_restarts=0)(_Actor)
        self.apart = workers >= MANY
        # No worker's call: that would wait for the end of its block, and be lost with the worker. Ray repeats these.
        self.adder = ray.remote(num_cpus=0, max_restarts=retries, max_task_retries=retries)(_Adder)
        self.adders: dict[tuple[str, int], Any] = {}  # by node, where there is something to add, and number there
        self.turn = itertools.count()
        self.actors: list[Any] = [None] * workers
        self.processes: list[tuple[str, int]] = [("", 0)] * workers
        self.starting: dict[Any, int] = {}  # reference -> actor
        self.stillborn = 0  # actors in a row that died as they started
        # Ray that others keep going, or one of this pool's own
        self.own = None if current() or ray.is_initialized() else Session(workers * spec.threads)
        try:
            self._open(workers, gpus, address)
        except BaseException:  # an interrupt too: nobody has this pool yet to close it
            self.close()
            raise

    def _open(self, workers: int, gpus: float, address: str) -> None:
        if self.own:
            self.own.start(address)
        if ours := self.own or current():
            ours.wait()
        have = ray.cluster_resources()
        cpus = workers * self.spec.threads
        if gpus * workers > have.get("GPU", 0) or cpus > have.get("CPU", 0):
            raise ConfigError(
                f"simulation: {workers} workers with {gpus} GPUs each need {cpus} CPUs and {gpus * workers:g} GPUs;"
                f" Ray found {have.get('CPU', 0):g} and {have.get('GPU', 0):g}: lower workers, threads or"
                " gpus-per-worker"
            )
        _register_tensors()
        for actor in range(workers):
            self._launch(actor)

    def _launch(self, actor: int) -> None:
        if not self.sent:
            rest = {f.name: getattr(self.spec, f.name) for f in fields(self.spec) if f.name != "task"}
            self.sent = ray.put(self.spec.task), ray.put(rest)
        self.actors[actor] = self.remote.remote(*self.sent)
        self.starting[self.actors[actor].where.remote()] = actor

    def _started(self, reference: Any) -> int | None:
        """The actor that has just come up; None if it died and is being replaced.

        Raises:
            FedsimError: one after the other dies.
        """
        actor = self.starting.pop(reference)
        try:
            self.processes[actor] = ray.get(reference)
        except LOST as error:
            self.stillborn += 1
            if self.stillborn > self.retries:
                raise FedsimError(f"{self.stillborn} workers in a row died as they started: {_line(error)}") from None
            self._launch(actor)
            return None
        self.stillborn = 0
        if not self.starting:
            self.sent = ()
        return actor

    def _replace(self, actor: int) -> None:
        node, process = self.processes[actor]
        ray.kill(self.actors[actor])
        if node == ray.get_runtime_context().get_node_id():
            # Ray asks the process to end itself, and one that is stopped would keep its CPU from its successor.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._launch(actor)

    def map(
        self, method: str, common: Any, calls: Sequence[tuple], *, apart: bool = False
    ) -> Iterator[tuple[int, Any]]:
        shared, self.retried = self._put(common), []
        waiting = deque((number, 0) for number in range(len(calls)))
        idle = [actor for actor in range(len(self.actors)) if actor not in self.starting.values()]
        running: dict[Any, _Running] = {}  # by reference
        ready: dict[int, Any] = {}  # by number: one call more for every actor
        done: list[tuple[int, Any]] = []
        while True:
            while waiting and idle:
                (number, tries), actor = waiting.popleft(), idle.pop(0)
                call, size = ready.pop(number) if number in ready else self._call(calls[number])
                limit = self.limit * size + GRACE if self.limit else math.inf
                handle, partial = self.actors[actor], None
                if apart:
                    reference, partial = handle.call_apart.remote(method, shared, call)
                else:
                    reference = handle.call.remote(method, shared, call)
                running[reference] = _Running(actor, number, tries, limit, time.monotonic() + limit, partial)
            yield from done  # now that their actors have something to do
            done = []
            if not running and not waiting:
                return
            left = min((r.deadline for r in running.values()), default=math.inf) - time.monotonic()
            timeout = None if left == math.inf else max(left, 0.0)
            following = next((n for n, _ in itertools.islice(waiting, len(self.actors)) if n not in ready), None)
            if following is not None:  # reading it hides behind the training of the others
                ready[following], timeout = self._call(calls[following]), 0.0
            for reference in ray.wait([*running, *self.starting], num_returns=1, timeout=timeout)[0]:
                if reference in self.starting:
                    came = self._started(reference)
                    idle += [] if came is None else [came]
                    continue
                run = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except LOST as error:
                    self._launch(run.actor)
                    if run.tries < self.retries:
                        self.retried.append((run.number, f"its worker died: {_line(error)}"))
                        waiting.appendleft((run.number, run.tries + 1))
                        continue
                    result = WorkerLost(f"its worker died {run.tries + 1} times: {_line(error)}")
                else:
                    idle.append(run.actor)
                    if apart and result.replies:
                        result.partial = run.partial, self.processes[run.actor][0]
                done.append((run.number, result))
            for reference, run in list(running.items()):
                if time.monotonic() < run.deadline:
                    continue
                del running[reference]
                self._replace(run.actor)
                if run.tries < self.retries:
                    self.retried.append((run.number, f"no result within {run.limit:g} s"))
                    waiting.append((run.number, run.tries + 1))
                else:
                    lost = WorkerLost(f"no result within {run.limit:g} s, {run.tries + 1} times", "time")
                    done.append((run.number, lost))

    def group(self, apart: bool) -> Chain | Apart:
        return Apart(self._add, self._take) if apart else Chain()

    def _add(self, sums: list[tuple[Any, str]]) -> tuple[Any, str]:
        """On the node that holds the most of them, where ``MANY`` workers have an adder."""
        references, nodes = zip(*sums)
        node = max(nodes, key=nodes.count)
        workers = sum(at == node for at, _ in self.processes)
        key = node, next(self.turn) % math.ceil(max(workers, 1) / MANY)
        if key not in self.adders:
            there = NodeAffinitySchedulingStrategy(node, soft=True)
            self.adders[key] = self.adder.options(scheduling_strategy=there).remote()
        return self.adders[key].add.remote(*references), node

    def _take(self, partial: tuple[Any, str]) -> Partial:
        """
        Raises:
            SumLost: with a node, or with an adder that died as often as retries allow, or hangs.
        """
        try:
            return ray.get(partial[0], timeout=PATIENCE)
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise error.as_instanceof_cause() from None
            reason = _line(error.cause)
        except RayError as error:
            reason = _line(error)
        for adder in self.adders.values():
            ray.kill(adder)
        self.adders = {}
        raise SumLost(f"the sum of some blocks is lost: {reason}")

    def _put(self, argument: Any) -> Any:
        """In the object store; as it is if the model is small, when Ray sends it with the call."""
        return argument if self.small else ray.put(argument)

    def _call(self, call: tuple) -> tuple[Any, int]:
        """A call's arguments, and how many clients or models they are."""
        return self._put(call), len(call[0])

    def close(self) -> None:
        for actor in filter(None, [*self.actors, *self.adders.values()]):
            ray.kill(actor)
        if self.own:
            self.own.close()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]

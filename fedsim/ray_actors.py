"""The Ray actors that train and evaluate, and how tensors come to them and back.

Tensors cross as numpy arrays, which Ray maps into the actors without a copy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from dataclasses import fields
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from fedsim.errors import FedsimError
from fedsim.local import ClientTask
from fedsim.processes import keep_memory
from fedsim.worker import Worker, WorkerSpec

LOST = (RayActorError, OutOfMemoryError)  # the process of an actor is gone


def _from_numpy(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the store's memory is read-only, and nobody writes to it
        return torch.from_numpy(array)


def register_tensors() -> None:
    """In every process that sends or receives them."""
    ray.util.register_serializer(torch.Tensor, serializer=lambda t: t.detach().cpu().numpy(), deserializer=_from_numpy)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


class _Actor:
    def __init__(self, task: ClientTask, rest: dict[str, Any]):
        """The specification in two parts: the worker keeps the rest, and with it all of that object, in the store."""
        keep_memory()
        register_tensors()
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


class Workers:
    """``count`` actors by number, each of ``spec.threads`` CPUs; one that dies or is given up gets a successor.

    The specification is in the object store as long as workers start, not longer.

    Args:
        gpus: GPUs (or a fraction of one) for each.
        retries: how many may die in a row as they start.
    """

    def __init__(self, spec: WorkerSpec, count: int, gpus: float, retries: int):
        self.spec, self.retries = spec, retries
        self.remote = ray.remote(num_cpus=spec.threads, num_gpus=gpus, max_restarts=0)(_Actor)
        self.actors: list[Any] = [None] * count
        self.processes: list[tuple[str, int]] = [("", 0)] * count  # (node, process)
        self.starting: dict[Any, int] = {}  # reference -> worker
        self.sent: tuple[Any, ...] = ()
        self.stillborn = 0  # in a row

    def __len__(self) -> int:
        return len(self.actors)

    def launch(self, worker: int) -> None:
        """Begin to start one; ``starting`` has a reference that is there when it is up."""
        if not self.sent:
            rest = {f.name: getattr(self.spec, f.name) for f in fields(self.spec) if f.name != "task"}
            self.sent = ray.put(self.spec.task), ray.put(rest)
        self.actors[worker] = self.remote.remote(*self.sent)
        self.starting[self.actors[worker].where.remote()] = worker

    def started(self, reference: Any) -> list[int]:
        """The worker that has just come up; none if it died and is being replaced.

        Raises:
            FedsimError: one after the other dies.
        """
        worker = self.starting.pop(reference)
        try:
            self.processes[worker] = ray.get(reference)
        except LOST as error:
            self.stillborn += 1
            if self.stillborn > self.retries:
                reason = first_line(error)
                raise FedsimError(f"{self.stillborn} workers in a row died as they started: {reason}") from None
            self.launch(worker)
            return []
        self.stillborn = 0
        if not self.starting:
            self.sent = ()
        return [worker]

    def up(self) -> list[int]:
        return [worker for worker in range(len(self)) if worker not in self.starting.values()]

    def on(self, node: str) -> int:
        """How many are on a node."""
        return sum(there == node for there, _ in self.processes)

    def call(self, worker: int, method: str, common: Any, call: tuple, *, apart: bool) -> tuple[Any, Any]:
        """(reference to the result, and to its sum if that is to be apart)"""
        if apart:
            return self.actors[worker].call_apart.remote(method, common, call)
        return self.actors[worker].call.remote(method, common, call), None

    def replace(self, worker: int) -> None:
        """End one, whatever it does, and launch its successor."""
        node, process = self.processes[worker]
        ray.kill(self.actors[worker])
        if node == ray.get_runtime_context().get_node_id():
            # Ray asks the process to end itself, and one that is stopped would keep its CPU from its successor.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.launch(worker)

    def close(self) -> None:
        for actor in filter(None, self.actors):
            ray.kill(actor)

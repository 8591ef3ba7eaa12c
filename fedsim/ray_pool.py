"""Persistent Ray actors. The only module that imports Ray.

The worker's specification and a round's order are put into the object store once; tensors cross as numpy arrays,
which Ray maps into the actors without a copy. An actor that dies is replaced and its call repeated: a block is a pure
function of its arguments, so the repetition has the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU workers keep CUDA_VISIBLE_DEVICES as it is
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedsim.errors import ConfigError
from fedsim.pool import WorkerLost
from fedsim.processes import ALLOCATOR
from fedsim.worker import Worker, WorkerSpec


def _from_numpy(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the store's memory is read-only, and nobody writes to it
        return torch.from_numpy(array)


def _register_tensors() -> None:
    ray.util.register_serializer(torch.Tensor, serializer=lambda t: t.detach().cpu().numpy(), deserializer=_from_numpy)


def _answers(address: str) -> None:
    """Raise OSError unless something listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _start(workers: int, address: str) -> None:
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        _answers(address)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, ValueError, RayError) as error:
        raise ConfigError(
            f"simulation.address = '{address}': no Ray cluster answers there ({error}); expected HOST:PORT of one"
            " ('ray start --head' says which), or no address to start one here"
        ) from None


@contextlib.contextmanager
def session(workers: int, address: str = "") -> Iterator[None]:
    """Keep one Ray for several pools.

    Raises:
        ConfigError: no cluster answers at ``address``.
    """
    _start(workers, address)
    try:
        yield
    finally:
        ray.shutdown()


class _Actor:
    def __init__(self, spec: WorkerSpec):
        _register_tensors()
        self.worker = Worker(spec)

    def call(self, method: str, common: Any, call: tuple) -> Any:
        return getattr(self.worker, method)(common, *call)


class RayPool:
    """``workers`` actors of one CPU thread each.

    Args:
        gpus: GPUs (or a fraction of one) for each actor.
        address: of a running cluster; empty starts one on this machine, which ``close`` ends again.
        retries: how often a call is repeated after its actor died.

    Raises:
        ConfigError: the cluster cannot be reached, or has not the CPUs or GPUs asked for.
    """

    def __init__(self, spec: WorkerSpec, workers: int, *, gpus: float = 0.0, address: str = "", retries: int = 2):
        self.retries = retries
        self.retried: list[int] = []
        self.owns = not ray.is_initialized()
        if self.owns:
            _start(workers, address)
        have = ray.cluster_resources()
        if gpus * workers > have.get("GPU", 0) or workers > have.get("CPU", 0):
            self.close()
            raise ConfigError(
                f"simulation: {workers} workers with {gpus} GPUs each need {workers} CPUs and {gpus * workers:g} GPUs;"
                f" Ray found {have.get('CPU', 0):g} and {have.get('GPU', 0):g}: lower workers or gpus-per-worker"
            )
        _register_tensors()
        self.spec = ray.put(spec)
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": ALLOCATOR})(_Actor)
        self.actors: list[Any] = [self.remote.remote(self.spec) for _ in range(workers)]

    def map(self, method: str, common: Any, calls: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        shared, self.retried = ray.put(common), []
        waiting = list(reversed([(number, 0) for number in range(len(calls))]))
        idle = list(range(len(self.actors)))
        running: dict[Any, tuple[int, int, int]] = {}  # reference -> (actor, call, tries)
        while waiting or running:
            while waiting and idle:
                number, tries = waiting.pop()
                actor = idle.pop(0)
                reference = self.actors[actor].call.remote(method, shared, calls[number])
                running[reference] = (actor, number, tries)
            done, _ = ray.wait(list(running), num_returns=1)
            actor, number, tries = running.pop(done[0])
            try:
                result = ray.get(done[0])
            except RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except RayActorError as error:
                self.actors[actor] = self.remote.remote(self.spec)
                if tries < self.retries:
                    self.retried.append(number)
                    waiting.append((number, tries + 1))
                    idle.append(actor)
                    continue
                result = WorkerLost(f"its worker died {tries + 1} times: {str(error).splitlines()[0]}")
            idle.append(actor)
            yield number, result

    def close(self) -> None:
        for actor in getattr(self, "actors", []):
            ray.kill(actor)
        if self.owns and ray.is_initialized():
            ray.shutdown()

"""Large sums of blocks, added in actors on the nodes where they are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.fold import Apart, Partial, gather
from fedsim.pool import SumLost
from fedsim.processes import keep_memory
from fedsim.ray_actors import Workers, first_line, register_tensors

MANY = 8  # workers whose large sums are not left to the driver to add, which two or four do not keep busy
PATIENCE = 300.0  # seconds for sums that are added already, or nearly


class _Adder:
    def __init__(self) -> None:
        keep_memory()
        register_tensors()
        torch.set_num_threads(1)

    def add(self, *sums: Partial) -> Partial:
        return gather(None, list(sums))


class Adders:
    """An actor for every ``MANY`` workers of a node, started when there is something to add. A sum: (reference, node).

    Workers do not add: that would wait for the end of a block, and be lost with its worker.

    Args:
        retries: how often Ray starts an adder that died again, and repeats its calls.
    """

    def __init__(self, workers: Workers, retries: int):
        self.workers, self.wanted = workers, len(workers) >= MANY
        self.remote = ray.remote(num_cpus=0, max_restarts=retries, max_task_retries=retries)(_Adder)
        self.actors: dict[tuple[str, int], Any] = {}  # by node and number there
        self.turn = itertools.count()

    def group(self) -> Apart:
        return Apart(self.add, self.take)

    def add(self, sums: list[tuple[Any, str]]) -> tuple[Any, str]:
        """On the node that holds the most of them."""
        references, nodes = zip(*sums)
        node = max(nodes, key=nodes.count)
        key = node, next(self.turn) % math.ceil(max(self.workers.on(node), 1) / MANY)
        if key not in self.actors:
            there = NodeAffinitySchedulingStrategy(node, soft=True)
            self.actors[key] = self.remote.options(scheduling_strategy=there).remote()
        return self.actors[key].add.remote(*references), node

    def take(self, partial: tuple[Any, str]) -> Partial:
        """
        Raises:
            SumLost: with a node, or with an adder that died as often as retries allow, or hangs.
        """
        try:
            return ray.get(partial[0], timeout=PATIENCE)
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise error.as_instanceof_cause() from None
            reason = first_line(error.cause)
        except RayError as error:
            reason = first_line(error)
        self.close()
        raise SumLost(f"the sum of some blocks is lost: {reason}")

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors = {}

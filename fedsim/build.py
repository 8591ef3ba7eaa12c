"""From a configuration to the objects of a run."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedsim.config import Config, Training
from fedsim.data import Dataset, Partition, from_config, hold_out, set_apart
from fedsim.data.augment import augmentation
from fedsim.engine import Federation, block_size
from fedsim.errors import ConfigError
from fedsim.evaluation import Mode, modes_of
from fedsim.examples import Examples
from fedsim.flops import forward_flops
from fedsim.guard import Policy
from fedsim.local import ClientTask
from fedsim.models import build_model
from fedsim.models.weights import load_weights
from fedsim.optim import SGD, Adam, Optimizer
from fedsim.pool import InProcess, Pool
from fedsim.pretrain import pretrain
from fedsim.processes import keep_memory
from fedsim.random import torch_generator
from fedsim.registry import Part, plugins_of, resolve, server_of
from fedsim.store import ClientStore
from fedsim.strategy import Strategy
from fedsim.worker import WorkerSpec


@dataclass(frozen=True)
class Plan:
    """A configuration made concrete: nothing trained, no worker started.

    Attributes:
        config: with every choice written out (axes, options, executor, block).
        validation: held-out examples of each client, or None.
        flops: of one example's forward pass, by module path; '' is the whole model.
    """

    config: Config
    parts: dict[str, Part]
    task: ClientTask
    dataset: Dataset
    shards: Partition
    validation: Partition | None
    strategy: Strategy
    cohort: int
    modes: dict[str, Mode]
    flops: dict[str, int]

    @property
    def spec(self) -> WorkerSpec:
        """What a worker holds that trains one client after the other on a CPU: all of a deployed client's."""
        config = self.config
        return WorkerSpec(
            self.task,
            self.dataset,
            self.shards,
            config.training,
            config.seed,
            config.rounds,
            evaluation_batch=config.evaluation.batch_size,
            modes=self.modes,
            threads=config.simulation.threads,
        )


def optimizer_of(config: Config) -> Optimizer:
    training = config.training
    if training.optimizer == "adam":
        return Adam(training.weight_decay)
    return SGD(training.momentum, training.weight_decay)


def task_of(config: Config, parts: dict[str, Part], classes: int, shape: tuple[int, ...]) -> ClientTask:
    """Model skeleton with its initial weights (a function of the seed, or from a file), plug-ins applied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(config.seed, purpose="model").initial_seed())
        model = build_model(config.model.name, classes=classes, shape=shape, norm=config.model.norm)
        if config.model.weights:
            load_weights(model, config.model.weights)
        task = ClientTask(
            model, plugins_of(parts), optimizer_of(config), config.training.precision, config.simulation.compile
        )
        task.model.to(getattr(torch, config.training.dtype))  # after the surgery, which makes layers of its own
        return task


STEP_FLOPS = 10_000_000  # of a batch's forward pass: beyond, a step is work and not overhead
PAIR_FLOPS = 1_000_000_000  # of the same: from there on two threads are worth their waiting for each other
TENSOR_SIZE = 100_000  # parameters of a tensor, in the mean: beyond, stacking them is memory traffic and nothing else


def choose_executor(task: ClientTask, flops: int, batch_size: int, device: str) -> str:
    """The executor of ``auto``: a function of model, batch and device alone, so that it is the same tomorrow.

    On a CPU vmap pays where a step of the loop is overhead, which grows with the number of tensors. The two bounds
    divide the table of ``experiments/bench/README.md`` where vmap takes half the loop's time: the loop keeps any number
    of workers busy, and vmap's few blocks may not. On a GPU it is taken to pay up to some millions of parameters; that
    has not been measured.

    Args:
        flops: of one example's forward pass.
    """
    sizes = [p.numel() for p in task.model.parameters()]
    if device != "cpu":
        return "vmap" if sum(sizes) <= 5_000_000 else "loop"
    if sum(sizes) > TENSOR_SIZE * len(sizes):
        return "loop"
    return "vmap" if flops * batch_size <= STEP_FLOPS else "loop"


def choose_odd_block_threads(executor: str, flops: int, batch_size: int, device: str) -> int:
    """Threads for the last of an odd number of blocks, if none are asked for: two where a step is long enough that they
    pay on an idle machine and cost little on a busy one, by ``experiments/bench/README.md`` ("Threads").

    Args:
        flops: of one example's forward pass.
    """
    return 2 if executor == "loop" and device == "cpu" and flops * batch_size >= PAIR_FLOPS else 1


def _flops_of(task: ClientTask, example: torch.Tensor, config: Config) -> dict[str, int]:
    try:
        return forward_flops(task.model, example)
    except (ValueError, RuntimeError) as error:  # InstanceNorm on a feature map of one pixel, say
        setting = f"model '{config.model.name}' with normalization '{config.algorithm.normalization}'"
        raise ConfigError(
            f"model.name: {setting} cannot take examples of {'x'.join(map(str, example.shape))}: {error}; expected"
            " larger images, or another model or normalization"
        ) from error


Data = tuple[Dataset, Partition, Partition | None]  # examples, training shards, held-out shards


def data_of(config: Config) -> tuple[Dataset, Partition, Partition | None, np.ndarray]:
    """(examples, training shards, held-out shards, examples of the server's own)."""
    dataset, shards = from_config(config)
    public = np.empty(0, np.int64)
    if config.federation.public_per_class:
        shards, public = set_apart(shards, dataset, config.federation.public_per_class, config.seed)
    if not config.federation.validation:
        return dataset, shards, None, public
    return dataset, *hold_out(shards, dataset, config.federation.validation, config.seed), public


def _deployed(config: Config, data: Data) -> tuple[Dataset, Partition, Partition | None, np.ndarray]:
    if config.federation.public_per_class:
        raise ConfigError(
            "federation.public-per-class: a deployed server holds no examples; set it to 0 and give the model"
            " pre-trained weights by model.weights"
        )
    return *data, np.empty(0, np.int64)


def plan(config: Config, data: Data | None = None) -> Plan:
    """Resolve names, load data, cut shards, build the model and both halves of the algorithm.

    Args:
        data: what a deployed server or client has in place of the whole federation's data.

    Raises:
        ConfigError, DataError: with what to mend.
    """
    config, parts = resolve(config)
    dataset, shards, validation, public = _deployed(config, data) if data else data_of(config)
    task = task_of(config, parts, len(dataset.classes), dataset.shape)
    if config.training.batch_size < task.smallest_batch:
        raise ConfigError(
            f"training.batch-size = {config.training.batch_size}: BatchNorm normalizes by statistics of the batch, and"
            f" one example has none; expected {task.smallest_batch} or more, or a normalization of each example alone"
        )
    augmentation(config.training.augment)  # a name the workers would not know is refused here, before they start
    modes = modes_of(config, task, deployed=data is not None)
    torch.set_num_threads(1)  # sums over threads would make the server's bits depend on their number
    examples = Examples(dataset, dtype=getattr(torch, config.training.dtype))
    if config.training.pretrain_epochs:
        pretrain(task, examples, public, config.training, config.seed)
    clients = len(shards)
    wanted = config.federation.clients_per_round
    if wanted > clients:
        raise ConfigError(f"federation.clients-per-round = {wanted}: the federation has {clients} clients")
    cohort = wanted or max(1, math.ceil(config.federation.participation * clients - 1e-9))
    device = "cuda" if config.simulation.gpus_per_worker else "cpu"
    asked = config.simulation.executor
    if reason := _imprecise(config.training, device):
        raise ConfigError(f"training.precision = '{config.training.precision}': {reason}")
    flops = _flops_of(task, examples.batch("train", np.array([0]))[0][0], config)
    executor = choose_executor(task, flops[""], config.training.batch_size, device) if asked == "auto" else asked
    if config.simulation.compile and (reason := _uncompiled(executor, device)):
        raise ConfigError(f"simulation.compile = true: {reason}")
    model_bytes = sum(v.nbytes for tree in task.initial() for v in tree.values())
    block = config.simulation.block or block_size(executor, cohort, model_bytes)
    batch = min(config.training.batch_size, int(shards.sizes.max()))
    odd = config.simulation.odd_block_threads or choose_odd_block_threads(executor, flops[""], batch, device)
    resolved = {"executor": executor, "block": block, "odd_block_threads": odd}
    simulation = config.simulation.model_copy(update=resolved)
    config = config.model_copy(update={"simulation": simulation})
    strategy = server_of(parts, task, config)
    strategy.public = examples.batch("train", public)
    strategy.policy = replace(policy_of(config), max_examples=int(shards.sizes.max()))
    if cohort < strategy.needs:
        raise ConfigError(
            f"algorithm: the aggregation rule needs the updates of {strategy.needs} clients, a round has {cohort};"
            " take more clients, a higher federation.participation, or a rule that needs fewer"
        )
    return Plan(config, parts, task, dataset, shards, validation, strategy, cohort, modes, flops)


def _imprecise(training: Training, device: str) -> str | None:
    """Why the precision asked for is not to be had, or None."""
    if training.precision == "tf32" and device == "cpu":
        return "of a GPU's tensor cores; set simulation.gpus-per-worker, or take 'full' or 'bf16'"
    if training.precision != "full" and training.dtype == "float64":
        return "training.dtype = 'float64' asks for the opposite; take one of them"
    return None


def _uncompiled(executor: str, device: str) -> str | None:
    """Why steps cannot be compiled, or None."""
    if executor != "vmap":
        return f"a step of many clients at once is; the executor here is '{executor}'; set simulation.executor = 'vmap'"
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        return f"torch's compiler writes C++, and '{compiler}' is not there; install one, or name yours in CXX"
    return None


def policy_of(config: Config) -> Policy:
    guard = config.guard
    return Policy(guard.max_update_norm, guard.quorum, guard.set_aside_after)


def pool_of(spec: WorkerSpec, config: Config) -> Pool:
    simulation = config.simulation
    if not simulation.workers:
        keep_memory()  # as every worker does for itself
        return InProcess(spec)
    from fedsim.ray_pool import RayPool  # starting Ray takes seconds: only runs that use it pay

    return RayPool(
        spec,
        simulation.workers,
        gpus=simulation.gpus_per_worker,
        address=simulation.address,
        retries=simulation.retries,
        limit=simulation.time_limit,
    )


def federation_of(plan: Plan, store: ClientStore, *, debug: bool = False) -> Federation:
    """Start the workers and put the federation on them."""
    config = plan.config
    spec = replace(
        plan.spec,
        executor=config.simulation.executor,
        device="cuda" if config.simulation.gpus_per_worker else "cpu",
        debug=debug,
        max_update_norm=config.guard.max_update_norm,
        time_limit=config.simulation.time_limit,
    )
    validation = None if plan.validation is None else [plan.validation[c] for c in range(len(plan.validation))]
    return Federation(
        spec,
        pool_of(spec, config),
        store,
        cohort=plan.cohort,
        block=config.simulation.block,
        odd_block_threads=config.simulation.odd_block_threads,
        validation=validation,
        unseen=config.federation.leave_out,
        policy=policy_of(config),
        needs=plan.strategy.needs,
        never_sampled=config.evaluation.never_sampled,
    )

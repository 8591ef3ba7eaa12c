"""The round loop: order, train, aggregate, evaluate, record, checkpoint. Knows no algorithm."""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedsim import __version__, interrupts
from fedsim.build import Plan, federation_of, plan, policy_of
from fedsim.checkpoint import Checkpoints, Snapshot, state_sha256
from fedsim.config import Config, load_config
from fedsim.engine import Federation
from fedsim.errors import ConfigError, DataError, FedsimError, StorageError
from fedsim.flops import masked_flops
from fedsim.guard import Offenders
from fedsim.models.weights import weights_sha256
from fedsim.results.progress import Progress
from fedsim.results.store import MetricStore
from fedsim.rundir import RunWriter
from fedsim.store import ClientStore
from fedsim.strategy import Replies
from fedsim.types import Order, Tensors
from fedsim.worker import Score

EMPTY_ROUNDS = 3  # rounds in a row without one usable update before a run gives up


class Interrupted(FedsimError):
    """The run was asked to stop; its checkpoint is written."""

    exit_code = 130


@dataclass
class Totals:
    """Figures that grow over the run and are carried through a resume."""

    examples_seen: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    train_flops: int = 0
    rejected_updates: int = 0
    void_rounds: int = 0
    retried_clients: int = 0
    dropped_examples: int = 0
    seconds: float = 0.0


# Keys that change no number of the rounds that are there: names, places, where and when it is computed.
FREE = ("name", "rounds", "federation.root", "model.weights", "evaluation", "checkpoint", "simulation")


def numerics(planned: Plan) -> dict[str, Any]:
    """What the bits of a run depend on: its configuration, its data, and this process."""
    config = planned.config
    tables = {k: v if isinstance(v, dict) else {"": v} for k, v in config.as_dict().items()}
    keys = {f"{t}.{k}".strip("."): v for t, values in tables.items() for k, v in values.items()}
    return {
        **{k: v for k, v in keys.items() if k not in FREE and k.partition(".")[0] not in FREE},
        "dataset_sha256": planned.dataset.digest,
        **weights_of(config),  # a frozen backbone is in no checkpoint: a resumed run reads it from the file again
        "executor": config.simulation.executor,
        "block": config.simulation.block,
        "threads": config.simulation.threads,
        "odd_block_threads": config.simulation.odd_block_threads,
        "compile": config.simulation.compile,
        "device": "cuda" if config.simulation.gpus_per_worker else "cpu",
        "fedsim": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # wider vectors sum in another order
    }


def weights_of(config: Config) -> dict[str, str]:
    """Checksum of the file of initial weights, if there is one."""
    path = config.model.weights
    return {"weights_sha256": weights_sha256(path)} if path else {}


def run(config: Config, out: Path, *, debug: bool = False) -> dict[str, Any]:
    """Simulate a federation into a new run directory; returns the summary.

    Raises:
        ConfigError, DataError: before anything is trained.
        Interrupted: on SIGINT or SIGTERM, after the checkpoint is written.
    """
    planned = plan(config)
    writer = RunWriter(out)
    try:
        writer.write_config(planned.config)
        running = _Run(planned, writer, debug=debug)
    except BaseException as error:
        writer.discard()
        if isinstance(error, StorageError):
            raise StorageError(error.path, error.reason, "make room there and run it again") from None
        raise
    return running.go(None)


def resume(path: Path, *, round: int | None = None, allow_other_numerics: bool = False, debug: bool = False):
    """Continue a run from its newest whole checkpoint (or the one of ``round``).

    Raises:
        DataError: no run there, or its checkpoint is damaged.
        ConfigError: this process would compute other bits than the run's, and that is not allowed.
    """
    if not (path / "config.toml").exists():
        raise DataError(f"{path}: no run directory (it has no config.toml); expected the --out of a 'fedsim run'")
    planned = plan(load_config(path / "config.toml"))
    writer = RunWriter(path, resume=True)
    checkpoints = Checkpoints(path / "checkpoints", planned.config.checkpoint.keep)
    snapshot = checkpoints.newest() if round is None else checkpoints.load(round)
    if snapshot is not None:
        was, now = snapshot.record["numerics"], numerics(planned)
        keys = [*now, *(k for k in was if k not in now)]
        differing = [f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in keys if was.get(k) != now.get(k)]
        if differing and not allow_other_numerics:
            raise ConfigError(
                f"{path}: the numbers would differ from an undisturbed run's: {'; '.join(differing)}"
                " (--allow-other-numerics continues all the same)"
            )
    return _Run(planned, writer, debug=debug).go(snapshot, resumed=True)


def drive(federation: Federation, planned: Plan, writer: RunWriter, *, debug: bool = False) -> dict[str, Any]:
    """Run or continue on a federation that is there already (real clients); the same run directory and summary."""
    resumed = (writer.path / "config.toml").exists()
    if not resumed:
        writer.write_config(planned.config)
    snapshot = Checkpoints(writer.path / "checkpoints", planned.config.checkpoint.keep).newest()
    return _Run(planned, writer, debug=debug, federation=federation).go(snapshot, resumed=resumed)


class _Run:
    def __init__(self, planned: Plan, writer: RunWriter, *, debug: bool, federation: Federation | None = None):
        self.plan, self.config, self.writer = planned, planned.config, writer
        self.strategy = planned.strategy
        self.store = ClientStore(writer.path / "clients.sqlite")
        self.metrics = MetricStore(writer.path / "metrics.sqlite")
        self.checkpoints = Checkpoints(writer.path / "checkpoints", self.config.checkpoint.keep)
        self.totals, self.stop, self.empty, self.debug = Totals(), False, 0, debug
        self.offenders = Offenders(policy_of(self.config))
        self.left_out: dict[str, int] = {}  # updates not used, by stage
        self.best: dict[str, Any] = {}
        self.latest: dict[str, Any] = {}
        self.started = time.perf_counter()
        self.progress = Progress(self.config.name, self.config.rounds)
        self.federation = federation or federation_of(planned, self.store, debug=debug)

    def go(self, snapshot: Snapshot | None, *, resumed: bool = False) -> dict[str, Any]:
        federation = self.federation
        try:
            with self.progress, _signals(self):
                self._note_idle_workers()
                first, state = self._begin(federation, snapshot, resumed)
                for round in range(first, self.config.rounds + 1):
                    state = self._round(federation, round, state)
                    done = round >= self.config.rounds
                    if round >= 1 and (done or round % self.config.evaluation.every == 0):
                        self._evaluate(federation, round, state)
                    stop = self.stop and not done  # looked at once: it may be asked for at any moment
                    if done or stop or (round >= 1 and round % self.config.checkpoint.every == 0):
                        self._checkpoint(federation, round, state)
                    if stop:
                        self.writer.event("interrupted", round=round)
                        where = self.writer.path
                        raise Interrupted(f"stopped after round {round}; continue with 'fedsim resume {where}'")
            return self._summarise(federation, state)
        finally:
            federation.close()
            self.store.close()
            self.metrics.close()
            self.writer.close()

    def _note_idle_workers(self) -> None:
        """What a block is must not depend on the workers, so the rule for it may leave some of many without one."""
        workers, blocks, cohort = self.config.simulation.workers, self.federation.blocks, self.federation.cohort
        if blocks < min(workers, cohort):
            self.progress.note(
                f"{workers} workers, but a round's clients are cut into blocks for {blocks}; set"
                f" simulation.block={max(1, cohort // workers)} for more blocks (sums in another order: other bits)"
            )

    def _begin(self, federation: Federation, snapshot: Snapshot | None, resumed: bool) -> tuple[int, Tensors]:
        first = 1 - self.strategy.setup_rounds
        if snapshot is None:
            # What an earlier process recorded before its first checkpoint is done again.
            self.store.rewind(first - 1)
            self.metrics.rewind(first - 1)
            if resumed:
                self.writer.event("resumed", round=first - 1)
            return first, self.strategy.init(federation.shared)
        self.totals = Totals(**snapshot.record["totals"])
        self.best, self.latest = snapshot.record["best"], snapshot.record["latest"]
        self.left_out, self.empty = snapshot.record["left_out"], snapshot.record["empty"]
        self.offenders.refused = {int(client): count for client, count in snapshot.record["refused"].items()}
        self.started -= self.totals.seconds
        self.store.rewind(snapshot.round)
        self.metrics.rewind(snapshot.round)
        self.writer.event("resumed", round=snapshot.round)
        self.progress.note(f"resumed after round {snapshot.round}")
        return snapshot.round + 1, snapshot.state

    def _round(self, federation: Federation, round: int, state: Tensors) -> Tensors:
        aside = set(self.offenders.aside)
        clients = [c for c in federation.sample(round) if c not in aside]
        before, refused = state, set[int]()
        for order in self.strategy.orders(round, state):
            replies = federation.train(order, clients)
            self._account(federation, order, clients, replies)
            refused |= {f.client for f in federation.failures if f.stage == "update"}
            if federation.void is not None:
                state = before
                self.totals.void_rounds += 1
                self.writer.event("void", round=round, reason=federation.void)
                self.progress.note(f"round {round}: {federation.void}; the model stays as it is")
                break
            state = self.strategy.aggregate(round, state, order, replies)
        self._judge(round, refused)
        self.empty = self.empty + 1 if federation.void is not None else 0
        if self.empty >= EMPTY_ROUNDS:
            causes = sorted({f.reason for f in federation.failures}) or [str(federation.void)]
            raise FedsimError(f"no usable update in {self.empty} rounds in a row: {'; '.join(causes[:3])}")
        rows = [(round, -1, "", "", name, value, 1.0) for name, value in self.strategy.metrics(state).items()]
        self.metrics.add(rows)
        return state

    def _judge(self, round: int, refused: set[int]) -> None:
        for client in sorted(refused):
            if self.offenders.record(client):
                times = self.offenders.refused[client]
                self.writer.event("set aside", round=round, client=client, refused=times)
                self.progress.note(f"round {round}: client {client} is set aside after {times} refused rounds")

    def _account(self, federation: Federation, order: Order, clients: list[int], replies: Replies) -> None:
        totals, round = self.totals, order.round
        down, up = federation.traffic(order, clients, replies)
        totals.bytes_down += down
        totals.bytes_up += up
        seen = int(sum(r.metrics["seen"] for r in replies.singles))
        if order.task == "train":
            last = min(seen, len(replies.singles) * self.config.training.batch_size)
            flops = self.strategy.training_flops(order, self.plan.flops, seen, last)
            totals.examples_seen += seen
        else:
            flops = masked_flops(self.plan.flops, order.masks) * seen
        totals.train_flops += int(flops)
        totals.retried_clients += federation.retried
        totals.dropped_examples += federation.dropped
        for what, details in federation.events:
            self.writer.event(what, round=round, **details)
            again = "again in halves" if what == "narrowed" else "again"
            self.progress.note(f"round {round}: clients {details['clients']} are trained {again}: {details['reason']}")
        for failure in federation.failures:
            totals.rejected_updates += 1
            self.left_out[failure.stage] = self.left_out.get(failure.stage, 0) + 1
            trace = {"trace": failure.trace} if failure.trace else {}
            self.writer.event(
                "rejected", round=round, client=failure.client, stage=failure.stage, reason=failure.reason, **trace
            )
            self.progress.note(f"round {round}: client {failure.client} left out: {failure.reason}")
        costs = {"bytes-down": down, "bytes-up": up, "flops": flops}
        rows = [(round, -1, "", order.task, name, float(value), 1.0) for name, value in costs.items()]
        for reply in replies.singles:
            domain = federation.domains(reply.client)[0]
            weight = reply.metrics["seen"]
            for name in ("loss", "accuracy"):
                rows.append((round, reply.client, domain, "train", name, reply.metrics[name] * weight, weight))
            rows += [
                (round, reply.client, domain, "train", name, float(v), 1.0)
                for name, v in reply.report.items()
                if v.dim() == 0
            ]
        for client, name, value in federation.client_metrics():
            rows.append((round, client, federation.domains(client)[0], "train", name, value, 1.0))
        self.metrics.add(rows)
        if order.task == "train":
            self.latest["loss"] = replies.metric("loss") if replies.singles else None

    def _evaluate(self, federation: Federation, round: int, state: Tensors) -> None:
        shared = self.strategy.model(state)
        scores = federation.evaluate(shared)
        self._record(round, scores)
        accuracy = by_domain(scores, self.plan.shards.domains)
        self.latest |= {"round": round, "accuracy": accuracy}
        if unseen := federation.evaluate(shared, "unseen"):
            self._record(round, unseen)
            self.latest["unseen_accuracy"] = {s.domain: s.correct / s.examples for s in unseen}
        often = self.config.evaluation.modes_every
        if round >= self.config.rounds or (often and round % often == 0):
            self._evaluate_modes(federation, round, shared)
        held_out = federation.evaluate(shared, "validation")
        if held_out:
            self._record(round, held_out)
            # The mean over clients, as in FedBN's selection rule.
            validation = sum(s.correct / s.examples for s in held_out) / len(held_out)
            self.latest["validation_accuracy"] = validation
            if validation > self.best.get("validation_accuracy", -1.0):
                self.best = {"round": round, "validation_accuracy": validation, "accuracy": accuracy}
        self.progress.update(round, accuracy=accuracy, loss=self.latest.get("loss"), examples=self.totals.examples_seen)

    def _evaluate_modes(self, federation: Federation, round: int, shared: Tensors) -> None:
        """Every mode on every split it is for; in the metrics as split ``test/MODE`` and ``unseen/MODE``."""
        domains = {"test": self.plan.shards.domains, "unseen": (self.config.federation.leave_out,)}
        found: dict[str, Any] = {}
        for name, split in itertools.product(self.plan.modes, domains):
            if not domains[split][0]:
                continue
            if scores := federation.evaluate_mode(shared, name, split):
                self._record(round, scores, f"{split}/{name}")
                worst = min(s.correct / s.examples for s in scores)
                entry = {"accuracy": by_domain(scores, domains[split]), "worst_client": worst}
                found.setdefault(split, {})[name] = entry
        if found:
            size = self.config.evaluation.batch_size
            self.latest["modes"] = {"round": round, "batch_size": size, "order": "shuffled by the seed", **found}

    def _record(self, round: int, scores: list[Score], split: str = "") -> None:
        rows = []
        for s in scores:
            rows.append((round, s.client, s.domain, split or s.split, "accuracy", s.correct, s.examples))
            rows.append((round, s.client, s.domain, split or s.split, "loss", s.loss, s.examples))
        self.metrics.add(rows)

    def _parameters(self) -> int:
        task = self.plan.task
        parameters = dict(task.model.named_parameters())
        return sum(parameters[n].numel() for n in task.trainable)

    def _checkpoint(self, federation: Federation, round: int, state: Tensors) -> None:
        self.totals.seconds = time.perf_counter() - self.started
        self.metrics.commit()
        self.store.flush()
        record = {
            "totals": asdict(self.totals),
            "best": self.best,
            "latest": self.latest,
            "left_out": self.left_out,
            "refused": self.offenders.refused,
            "empty": self.empty,
            "numerics": numerics(self.plan),
        }
        self.checkpoints.save(Snapshot(round, state, record))
        self.store.prune(self.checkpoints.rounds()[0])

    def _summarise(self, federation: Federation, state: Tensors) -> dict[str, Any]:
        config, accuracy = self.config, self.latest["accuracy"]
        values = list(accuracy.values())
        totals = asdict(self.totals)
        totals["seconds"] = round_to(time.perf_counter() - self.started, 3)
        summary = {
            "name": config.name,
            "strategy": config.algorithm.strategy,
            "model": config.model.name,
            **weights_of(config),
            "dataset": config.federation.dataset,
            "dataset_sha256": self.plan.dataset.digest,
            "seed": config.seed,
            "rounds": config.rounds,
            "clients": len(federation),
            "accuracy": accuracy,
            "mean_accuracy": sum(values) / len(values),
            "worst_accuracy": min(values),
            **totals,
            "left_out": self.left_out,
            "refused_rounds": self.offenders.refused,
            "set_aside": self.offenders.aside,
            "training_memory_bytes": self.strategy.training_memory(state, self._parameters()),
            "server": self.strategy.metrics(state),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "state_sha256": state_sha256(state),
            "executor": config.simulation.executor,
            "workers": config.simulation.workers,
            "block": config.simulation.block,
            "odd_block_threads": config.simulation.odd_block_threads,
        }
        if "unseen_accuracy" in self.latest:
            summary["unseen_accuracy"] = self.latest["unseen_accuracy"]
        if "modes" in self.latest:
            summary["modes"] = self.latest["modes"]
        if self.best:
            summary["validation_accuracy"] = self.latest["validation_accuracy"]
            summary["selected"] = self.best
        self.writer.write_summary(summary)
        self.writer.event("finished", round=config.rounds)
        return summary


def by_domain(scores: list[Score], domains: tuple[str, ...]) -> dict[str, float]:
    """Accuracy of each domain: the mean over the models scored on it (one, or one a client)."""
    found: dict[str, list[float]] = {d: [] for d in domains}
    for score in scores:
        found[score.domain].append(score.correct / score.examples)
    return {d: math.fsum(v) / len(v) for d, v in found.items() if v}


def round_to(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}")


@contextlib.contextmanager
def _signals(running: _Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops after the current round; a second one stops at once."""

    def ask(number: int, frame: object) -> None:
        if running.stop:
            raise KeyboardInterrupt
        running.stop = True
        running.progress.note("stopping after this round (once more to stop at once)")

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        interrupts.raise_if_asked()  # before this
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

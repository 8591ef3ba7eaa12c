"""``fedsim server``: the round loop of a simulation, on clients that are somewhere else."""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
import time
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from flwr.app import RecordDict

from fedsim.build import Data, Plan, plan
from fedsim.checkpoint import Checkpoints, write_atomically
from fedsim.config import Config, load_config, to_toml
from fedsim.data import Dataset, Partition
from fedsim.deployment.federation import Patience, RemoteFederation, exchange
from fedsim.deployment.jobs import DONE, JOB, Job
from fedsim.deployment.link import Link
from fedsim.deployment.members import Member
from fedsim.deployment.roster import Roster
from fedsim.deployment.site import domains_of
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.registry import resolve
from fedsim.run import drive
from fedsim.rundir import RunWriter

log = getLogger("fedsim")
FAREWELL = 40.0  # seconds; a client tries again after at most 30


def deployed(config: Config) -> Config:
    """The configuration as real clients carry it out: one client a process, a checkpoint every round.

    Raises:
        ConfigError: a federation that only a simulation can have.
    """
    federation = config.federation
    if not domains_of(config):
        raise ConfigError("federation.domains: name the domains of the real clients, separated by commas")
    if federation.across or federation.partition == "pooled":
        raise ConfigError("federation: clients that mix domains cannot be deployed; every real client has one domain")
    alone = {"executor": "loop", "workers": 0, "gpus_per_worker": 0.0}
    simulation = config.simulation.model_copy(update=alone)
    checkpoint = config.checkpoint.model_copy(update={"every": 1})
    config, _ = resolve(config.model_copy(update={"simulation": simulation, "checkpoint": checkpoint}))
    return config


def check_issuer(cert: Path, ca: Path) -> None:
    """Refuse to start with a certificate that no client would accept.

    Raises:
        DataError: it is not signed by this CA.
    """
    try:
        found = [x509.load_pem_x509_certificate(p.read_bytes()) for p in (cert, ca)]
        found[0].verify_directly_issued_by(found[1])
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise DataError(f"{cert}: not a certificate issued by {ca} ({type(error).__name__})") from None


def stand_in(roster: Roster, name: str, folder: Path) -> Data:
    """What the server has in place of data: one blank example a domain, of the clients' shape, and their counts."""
    about = roster.about[0]
    x, y = np.zeros((1, *about["shape"]), about["dtype"]), np.zeros(1, np.int64)
    blank = {domain: {"train": (x, y), "test": (x, y)} for domain in roster.domains}
    dataset = Dataset.from_arrays(name, folder, blank, tuple(about["classes"]))
    digests = "".join(str(roster.about[c]["digest"]) for c in sorted(roster.about))
    dataset.digest = hashlib.sha256(digests.encode()).hexdigest()
    offsets = np.cumsum([0] + [roster.sizes[c][0] for c in sorted(roster.sizes)]).astype(np.int64)
    owners = np.repeat(np.arange(len(roster.domains)), roster.each).astype(np.int16)
    return dataset, Partition(np.zeros(offsets[-1], np.int64), offsets, owners, tuple(roster.domains)), None


def _run_name(path: Path) -> str:
    """Made up once: clients keep their private state under it."""
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text().strip()


def _remote(planned: Plan, roster: Roster, checkpoints: Checkpoints) -> RemoteFederation:
    before = -planned.strategy.setup_rounds

    def oldest() -> int:
        return min(checkpoints.rounds(), default=before)

    return RemoteFederation(
        planned,
        roster.link,
        roster.members,
        roster.sizes,
        roster.job,
        roster.patience,
        oldest,
    )


def serve(
    config: Config,
    out: Path,
    *,
    listen: str,
    cert: Path,
    key: Path,
    ca: Path,
    clients: Path,
    patience: Patience,
    debug: bool = False,
) -> dict[str, Any]:
    """Run, or continue after the last finished round, a federation of real clients; returns the summary.

    Raises:
        ConfigError, DataError: before anything is trained.
        FedsimError: the clients did not come, or left for good.
    """
    config = deployed(config)
    check_issuer(cert, ca)
    resumed = (out / "config.toml").exists()
    writer = RunWriter(out, resume=resumed)
    if resumed and not _same(load_config(out / "config.toml"), config):
        raise ConfigError(f"{out}: holds a run of another configuration; choose another --out")
    job = Job(to_toml(config), _run_name(out / "run-name"))
    link = Link(listen, cert=cert, key=key, clients=clients)
    try:
        log.info("listening on port %d; run directory %s", link.port, out)
        federation = config.federation
        roster = Roster(link, out / "clients.json", job, domains_of(config), federation.clients_per_domain, patience)
        if (out / "summary.json").exists():
            return _finished(roster, out)
        roster.gather()
        with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
            # Its files are open, and need no names: a server that is killed while it trains leaves nothing behind.
            planned = plan(config, stand_in(roster, federation.dataset, Path(folder) / "data"))
        checkpoints = Checkpoints(out / "checkpoints", planned.config.checkpoint.keep)
        summary = drive(_remote(planned, roster, checkpoints), planned, writer, debug=debug)
        _dismiss(roster, list(roster.members.values()))
        return summary
    finally:
        link.close()
        writer.close()


def _same(kept: Config, config: Config) -> bool:
    """``kept`` has what was chosen where ``config`` may leave it open."""
    mine, theirs = config.simulation, kept.simulation
    chosen = {key: getattr(mine, key) or getattr(theirs, key) for key in ("block", "odd_block_threads")}
    return kept == config.model_copy(update={"simulation": mine.model_copy(update=chosen)})


def _dismiss(roster: Roster, members: list[Member]) -> list[Member]:
    """Tell clients that the run is finished; returns those that heard it."""
    here = {i: m for i, m in enumerate(members) if roster.link.members.present(m, roster.patience.silent)}
    content = RecordDict({JOB: roster.job.record()})
    try:
        errand = exchange(roster.link, here, lambda client: content, DONE, Patience(5.0, 5.0, 5.0))
    except FedsimError:  # they left meanwhile, as they were to
        return []
    return [here[i] for i in errand.answers]


def _finished(roster: Roster, out: Path) -> dict[str, Any]:
    """The summary of a run that was finished before. Its server may have been killed before all clients heard so: they
    try to come back at least every half minute, and those that do are told."""
    log.info("this run is finished already; telling the clients that come back within %g s", FAREWELL)
    until = time.monotonic() + min(FAREWELL, roster.patience.absent)
    waiting = roster.known()
    while waiting and time.monotonic() < until:
        for member in _dismiss(roster, waiting):
            waiting.remove(member)
        roster.link.wait(0.1)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary

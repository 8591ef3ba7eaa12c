"""What travels beside an order: which run, which client, and the place of the order in the run's sequence."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

JOB, ABOUT, SIZES, LOCAL = "job", "about", "sizes", "local"
HELLO, PLACE, DONE = "query.hello", "query.place", "query.done"
CLIENT_THREADS = 64  # that a client gives to a run: a system that has no more of them ends the process
PER_ROUND = 1000  # sequence numbers of a round: its orders, and at the end its evaluation


def sequence(round: int, order: int = 0) -> int:
    """Ascending over the orders of a run, the same again after a resume."""
    return round * PER_ROUND + order


def end_of(round: int) -> int:
    """The last sequence number of a round."""
    return sequence(round, PER_ROUND - 1)


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        config: the resolved configuration, TOML. Scalars only: names of parts the client has installed, never code.
        run: 16 hexadecimal digits, the same for all starts of a run.
        client: the client's number, -1 before it has one.
        sequence: of the order; the client forgets what it kept at this one or later.
        oldest: round of the oldest checkpoint; what was before can never be asked for again.
        threads: of torch for this client's training, if they are more than the configuration gives every client.
        split, mode: of an evaluation; no mode: the ordinary one.
    """

    config: str
    run: str
    client: int = -1
    sequence: int = 0
    oldest: int = 0
    threads: int = 1
    split: str = "test"
    mode: str = ""

    def record(self) -> ConfigRecord:
        return ConfigRecord(asdict(self))  # type: ignore[arg-type]


def read_job(content: RecordDict) -> Job:
    """The job of a message.

    Raises:
        KeyError, TypeError, ValueError: it carries none, or one that makes no sense.
    """
    values: Any = dict(content[JOB])  # type: ignore[arg-type]
    job = Job(**values)
    if not re.fullmatch(r"[0-9a-f]{16}", job.run):
        raise ValueError("the run's name is not 16 hexadecimal digits")
    if not all(type(v) is int for v in (job.client, job.sequence, job.oldest, job.threads)):
        raise ValueError("client, sequence, oldest and threads must be whole numbers")
    if not 1 <= job.threads <= CLIENT_THREADS:
        raise ValueError(f"{job.threads} threads, expected 1 to {CLIENT_THREADS}")
    if job.split not in ("test", "validation"):
        raise ValueError(f"split '{job.split}', expected test or validation")
    return job

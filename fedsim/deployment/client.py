"""``fedsim client``: a process that keeps its data and model in memory and does what the server orders, if it makes
sense. Nothing that the server sends is ever executed: an order is tensors, numbers and names of installed parts."""

from __future__ import annotations

import signal
import time
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedsim.deployment.connection import Connection, Lost, Rejected
from fedsim.deployment.jobs import ABOUT, DONE, HELLO, LOCAL, PLACE, SIZES, read_job
from fedsim.deployment.keys import Key
from fedsim.deployment.site import Refused, Site
from fedsim.deployment.wire import pack, unpack
from fedsim.errors import FedsimError
from fedsim.flower import CONFIG, METRICS, read_order, reply_content
from fedsim.wire import unfolded_bytes

log = getLogger("fedsim")
FAILED = 2  # Flower's error code for an exception in the ClientApp
BACKOFF = (0.2, 30.0)  # seconds between attempts to connect: first, most


class Stopped(BaseException):
    """SIGTERM or SIGINT: an order half done is dropped, the state on disk stays that of the last whole one."""


def carry_out(site: Site, kind: str, content: RecordDict) -> RecordDict:
    """The content of the reply.

    Raises:
        Refused, FedsimError: with what the server should know.
        Exception: whatever reading nonsense raises.
    """
    job = read_job(content)
    if kind == HELLO:
        return RecordDict({ABOUT: ConfigRecord(site.hello(job))})
    if kind == PLACE:
        return RecordDict({SIZES: MetricRecord(dict(site.place(job)))})
    if kind == DONE:
        return RecordDict()
    if kind in ("train", "evaluate"):
        site.refuse_size(job, sum(unfolded_bytes(record) for record in content.array_records.values()))
    if kind == "train":
        order = read_order(content)
        log.info("round %d: %s", order.round, order.task)
        reply, dropped = site.train(job, order)
        number: Any = content[CONFIG]["order"]  # type: ignore[index]
        return RecordDict({**reply_content(reply, int(number), order.masks), LOCAL: MetricRecord({"dropped": dropped})})
    if kind == "evaluate":
        order = read_order(content)
        score = site.evaluate(job, order)
        metrics: dict[str, Any] = {"correct": score.correct, "loss": score.loss, "num-examples": score.examples}
        return RecordDict({METRICS: MetricRecord(metrics)})
    raise Refused(f"no such order: '{kind}'")


def answer(site: Site, message: Message) -> Message:
    """The reply to any message, an error with one line of reason if need be."""
    try:
        content = carry_out(site, message.metadata.message_type, unpack(message.content))
        return Message(pack(content), reply_to=message)
    except (Refused, FedsimError) as error:
        reason = str(error)
    except Exception as error:  # the boundary at which nonsense from the wire ends
        reason = f"not an order: {type(error).__name__}: {str(error)[:200]}"
    log.warning("%s", reason)
    return Message(Error(FAILED, reason), reply_to=message)


def _stop(number: int, frame: object) -> None:
    raise Stopped


def work(server: str, ca: Path, key: Key, site: Site, *, give_up: float, stay: bool = False) -> None:
    """Serve until the run is finished, or until SIGTERM.

    Args:
        give_up: seconds without a server after which to end.
        stay: do not end with the run; wait for the next one.

    Raises:
        Rejected: certificate or key are refused, or the server stays away.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    connection: Connection | None = None
    heard, pause = time.monotonic(), BACKOFF[0]
    try:
        while True:
            try:
                if connection is None:
                    connection = Connection(server, ca, key)
                    log.info("connected to %s as domain '%s'", server, site.domain)
                    pause = BACKOFF[0]
                finished = _next(connection, site)
                heard = time.monotonic()
                if finished and not stay:
                    log.info("the run is finished")
                    return
            except Lost as error:
                if connection is not None:
                    connection.drop()
                    connection = None
                if time.monotonic() - heard > give_up:
                    raise Rejected(f"{server}: no server for {give_up:g} s ({error})") from None
                log.warning("%s; trying again in %.1f s", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, BACKOFF[1])
    except Stopped:
        log.info("stopped")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if connection is not None:
            connection.close()
        site.close()


def _next(connection: Connection, site: Site) -> bool:
    """Carry out one message, if there is one; True after the run's last."""
    try:
        message = connection.receive()
    except (Lost, FedsimError):
        raise
    except Exception as error:  # what cannot be read cannot be answered
        log.warning("a message that cannot be read: %s", type(error).__name__)
        return False
    if message is None:
        return False
    connection.reply(answer(site, message))
    return message.metadata.message_type == DONE

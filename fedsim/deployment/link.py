"""The server's end: Flower's link state, object store and gRPC fleet API in this process, messages in and out.

Nothing else listens: no control API, no HTTP, no installer. All of it is in memory; what must outlive the process is
in the run directory.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Collection
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from flwr.app import Message, RecordDict

from fedsim.deployment import fleet
from fedsim.deployment.keys import read_private
from fedsim.deployment.members import Member, Members
from fedsim.deployment.servicer import Authentication, GuardedServicer
from fedsim.errors import ConfigError, DataError

MESSAGE_LIMIT = 16 << 20  # bytes of one gRPC message; arrays travel in objects of at most about 5 MB
THREADS = 256
TASK_HEARTBEAT = 10.0  # seconds


class Incomplete(Exception):
    """A reply whose objects are still on their way."""


class Link:
    """Args: reply_limit: bytes that a client may send for one order, all its objects together.

    Raises:
        DataError, ConfigError: keys or certificates that cannot be used, an address that cannot be listened on.
    """

    def __init__(self, listen: str, *, cert: Path, key: Path, clients: Path, reply_limit: int = 1 << 30):
        objects = fleet.ObjectStoreFactory(fleet.IN_MEMORY)
        states = fleet.LinkStateFactory(fleet.IN_MEMORY, fleet.NoOpFederationManager(), objects)
        self.state, self.objects = states.state(), objects.store()
        self.closed = threading.Event()
        self.run = self._start_run()
        self.members = Members(clients, self.state)
        self.servicer = GuardedServicer(states, objects, self.members, reply_limit)
        options = [
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.max_send_message_length", MESSAGE_LIMIT),
            ("grpc.so_reuseport", 0),  # two servers on one port would each get half of the clients
        ]
        self.server = grpc.server(
            futures.ThreadPoolExecutor(THREADS),
            maximum_concurrent_rpcs=THREADS,
            options=options,
            interceptors=[Authentication(states)],
        )
        fleet.add_FleetServicer_to_server(self.servicer, self.server)
        credentials = grpc.ssl_server_credentials([(read_private(key), _certificate(cert))])
        try:
            self.port = self.server.add_secure_port(listen, credentials)
        except RuntimeError:
            raise ConfigError(
                f"--listen {listen}: cannot be listened on (in use, or no address of this machine), or {cert} does"
                f" not belong to {key}"
            ) from None
        self.server.start()

    def _start_run(self) -> int:
        run: int = self.state.create_run(
            fab_id="fedsim/app",
            fab_version="0.1.0",
            fab_hash=None,
            override_config={},
            federation_id=fleet.NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=fleet.NOOP_FLWR_AID,
            primary_task_type=fleet.TaskType.SERVER_APP,
        )
        (task,) = self.state.get_tasks(run_ids=[run])
        self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)
        threading.Thread(target=self._keep, args=(task.task_id,), name="task", daemon=True).start()
        identity = fleet.TaskIdentity
        identity.run_id, identity.node_id, identity.task_id = run, fleet.SUPERLINK_NODE_ID, 1
        return run

    def _keep(self, task: int) -> None:
        """Flower fails a run whose task is silent for a minute."""
        while not self.closed.wait(TASK_HEARTBEAT):
            self.state.acknowledge_task_heartbeat(task)

    def send(self, member: Member, content: RecordDict, kind: str) -> str:
        """Put a message where the client will pull it; returns the message's id.

        Raises:
            RuntimeError: the link state does not take it (the client was never there).
        """
        message = Message(content, dst_node_id=member.node, message_type=kind)
        message.metadata.__dict__["_message_id"] = message.object_id
        objects, tree = fleet.get_all_nested_objects(message), fleet.get_object_tree(message)
        envelope = Message(RecordDict(), dst_node_id=member.node, message_type=kind)
        envelope.metadata.__dict__.update(message.metadata.__dict__)
        member.pushed = 0
        with self.servicer.work:
            session = self.state.start_session(self.run)
            stored, missing = self.state.store_message_and_object_tree(envelope, tree, session)
            if not stored:
                raise RuntimeError(f"no message can be stored for client '{member.name}'")
            for name in missing:
                self.objects.put(name, objects[name].deflate())
            self.servicer.work.notify_all()
        return message.metadata.message_id

    def arrived(self, ids: Collection[str]) -> list[Message]:
        """Envelopes of the replies that arrived since the last call; ``content`` completes them."""
        found = self.state.get_message_res(message_ids=set(ids), run_id=self.run)
        # Flower answers for clients it believes gone; whether one is gone is decided elsewhere.
        return [m for m in found if m.metadata.src_node_id != fleet.SUPERLINK_NODE_ID]

    def content(self, envelope: Message) -> Message:
        """The whole reply.

        Raises:
            Incomplete: objects are missing still.
            Exception: whatever a parser raises on what is no message.
        """
        name = envelope.metadata.message_id
        tree = self.objects.get_object_tree(name)
        found: dict[str, Any] = {o.object_id: self.objects.get(o.object_id) for o in fleet.iterate_object_tree(tree)}
        if not all(found.values()):
            raise Incomplete
        whole: Any = fleet.inflate_object_from_contents(name, found)
        if not isinstance(whole, Message):
            raise TypeError(f"{type(whole).__name__} in place of a message")
        return whole

    def forget(self, ids: Collection[str]) -> None:
        """Drop messages with their replies; a later reply is refused."""
        self.state.delete_messages(set(ids))

    def wait(self, seconds: float) -> None:
        """Until something arrives, or so long."""
        with self.servicer.news:
            self.servicer.news.wait(seconds)

    def close(self) -> None:
        self.closed.set()
        self.server.stop(0.5).wait()


def _certificate(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(data)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a certificate in PEM ({type(error).__name__})") from None
    if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        raise DataError(
            f"{path}: this certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; make a new one with"
            " 'fedsim keys server'"
        )
    return data

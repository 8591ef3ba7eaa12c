"""The client's end of the wire: Flower's fleet calls over TLS, signed with the client's key."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from flwr.app import Message

from fedsim.deployment import fleet
from fedsim.deployment.keys import Key, public_bytes
from fedsim.deployment.link import MESSAGE_LIMIT
from fedsim.errors import DataError, FedsimError

HEARTBEAT = 2.0  # seconds
BELIEVED = 1800.0  # seconds: Flower's own judgement of who is gone is slower than ours and kept out of the way
TIMEOUT = 60.0  # seconds a call
ORDER_LIMIT = 4 << 30  # bytes of an order, all its objects together


class Rejected(FedsimError):
    """The server, or the way to it, is not what it should be; trying again would not help."""


class Lost(Exception):
    """The server cannot be reached, or does not know this session (any more): connect again."""


class Connection:
    """One session with the server, from activation to deactivation.

    Raises:
        Rejected: certificate or key are refused.
        Lost: nobody there.
    """

    def __init__(self, server: str, ca: Path, key: Key):
        public = public_bytes(key.public_key())
        options = [("grpc.max_receive_message_length", MESSAGE_LIMIT), ("grpc.max_send_message_length", MESSAGE_LIMIT)]
        options += [("grpc.max_reconnect_backoff_ms", 2000)]
        channel = grpc.secure_channel(server, grpc.ssl_channel_credentials(_trusted(ca)), options=options)
        self.channel = grpc.intercept_channel(channel, fleet.NodeAuthClientInterceptor(key, key.public_key()))
        self.stub = fleet.FleetStub(self.channel)
        self._over = threading.Event()
        try:
            request = fleet.ActivateNodeRequest(public_key=public, heartbeat_interval=BELIEVED)
            self.node = fleet.Node(node_id=self._call("ActivateNode", request, first=True).node_id)
        except BaseException:
            self.channel.close()
            raise
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _call(self, method: str, request: Any, *, first: bool = False) -> Any:
        try:
            return getattr(self.stub, method)(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            raise _explain(error, first) from None

    def _beat(self) -> None:
        """Training may take longer than the server's patience: this says that the process is alive."""
        while not self._over.wait(HEARTBEAT):
            # The main thread finds out for itself, or has closed the line just now (ValueError).
            with contextlib.suppress(Lost, Rejected, ValueError):
                request = fleet.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=BELIEVED)
                self._call("SendNodeHeartbeat", request)

    def receive(self) -> Message | None:
        """The next message, whole; None if there is none (the server holds the call open for a while).

        Raises:
            Exception: whatever a parser raises on what is no message.
        """
        response = self._call("PullMessages", fleet.PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        envelope = fleet.message_from_proto(response.messages_list[0])
        run, name = envelope.metadata.run_id, envelope.metadata.message_id
        objects: dict[str, bytes] = {}
        size = 0
        for part in fleet.iterate_object_tree(response.message_object_trees[0]):
            if part.object_id in objects:
                continue
            request = fleet.PullObjectRequest(node=self.node, run_id=run, object_id=part.object_id)
            answer = self._call("PullObject", request)
            if not answer.object_available:
                raise Lost("the server withdrew a message")
            objects[part.object_id] = answer.object_content
            size += len(answer.object_content)
            if size > ORDER_LIMIT:
                raise ValueError(f"an order of more than {ORDER_LIMIT} bytes")
        confirm = fleet.ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
        self._call("ConfirmMessageReceived", confirm)
        identity = fleet.TaskIdentity
        identity.run_id, identity.node_id, identity.task_id = run, self.node.node_id, 1
        message: Any = fleet.inflate_object_from_contents(name, objects)
        message.metadata.__dict__["_message_id"] = name
        return message

    def reply(self, message: Message) -> None:
        """Send a reply with all its objects."""
        with fleet.no_object_id_recompute():  # an id is a hash of all the bytes, and is asked for several times
            message.metadata.__dict__["_message_id"] = message.object_id
            objects, tree = fleet.get_all_nested_objects(message), fleet.get_object_tree(message)
        envelope = fleet.message_to_proto(
            fleet.remove_content_from_message(message) if message.has_content() else message
        )
        response = self._call(
            "PushMessages",
            fleet.PushMessagesRequest(node=self.node, messages_list=[envelope], message_object_trees=[tree]),
        )
        for name in response.objects_to_push:
            request = fleet.PushObjectRequest(
                node=self.node,
                run_id=message.metadata.run_id,
                session_id=response.session_id,
                object_id=name,
                object_content=objects[name].deflate(),
            )
            self._call("PushObject", request)

    def drop(self) -> None:
        """Give up the line, not the session: the server waits for this client to connect again."""
        self._over.set()
        self.channel.close()

    def close(self) -> None:
        """Say goodbye, if anybody is there to hear it."""
        self._over.set()
        with contextlib.suppress(grpc.RpcError):
            self.stub.DeactivateNode(fleet.DeactivateNodeRequest(node_id=self.node.node_id), timeout=2.0)
        self.channel.close()


def _trusted(ca: Path) -> bytes:
    try:
        data = ca.read_bytes()
        x509.load_pem_x509_certificate(data)
    except (OSError, ValueError) as error:
        raise DataError(f"{ca}: not a CA certificate in PEM ({type(error).__name__})") from None
    return data


def _explain(error: Any, first: bool) -> Exception:
    """What a failed call means for the client."""
    code, details = error.code(), (error.details() or "").strip()
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return Rejected(f"the server refuses this client: {details} (register its .pub file there)")
    if code == grpc.StatusCode.UNAUTHENTICATED and first:
        return Rejected(f"the server refuses this client: {details} (the clocks may differ)")
    lower = details.lower()
    if "hostname verification" in lower or "peer name" in lower:
        return Rejected("the server's certificate is not accepted: it is not for the name or address in --server")
    if "certificate" in lower:
        return Rejected(f"the server's certificate is not accepted: {_certificate_problem(details)}")
    return Lost(f"{code.name.lower().replace('_', ' ')}: {details[:200]}")


def _certificate_problem(details: str) -> str:
    start = details.upper().find("CERTIFICATE")
    return details[start if start >= 0 else 0 :][:200]

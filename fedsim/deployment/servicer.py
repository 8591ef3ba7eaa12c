"""Flower's fleet servicer behind a guard: who calls is known from the signed header, what it sends is bounded, and
whatever it sends ends in a status code, never in a stack trace."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from logging import getLogger
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedsim.deployment.fleet import PUBLIC_KEY_HEADER, FleetServicer, NodeAuthServerInterceptor
from fedsim.deployment.members import Member, Members

log = getLogger("fedsim")
UNREADABLE = object()  # in place of a request
LONG_POLL = 0.5  # seconds a client's question for work is held open


class Call(threading.local):
    """Of the call that this thread serves. A message's size is known where it is read or written; asking the message
    for it would serialize it once more, megabytes at a time.

    Attributes:
        size: bytes of the request.
        receiver: whose traffic the response counts as; None: nobody's (an empty answer, a heartbeat).
    """

    size = 0
    receiver: Member | None = None


CALL = Call()


class Authentication(NodeAuthServerInterceptor):
    """Flower's check of signature and time; a header that cannot even be read is refused the same way."""

    def intercept_service(self, continuation: Callable, handler_call_details: Any) -> Any:
        try:
            return super().intercept_service(continuation, handler_call_details)
        except Exception:  # junk in place of a key, a signature or a time raises whatever the parser raises
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "unreadable authentication")
            )

    def _wrap_method_handler(self, method_handler: Any, received_public_key: bytes) -> Any:
        """Bytes that are no message are the caller's mistake; gRPC would log a stack trace for each."""

        def read(data: bytes) -> Any:
            try:
                return method_handler.request_deserializer(data), len(data)
            except DecodeError:
                return UNREADABLE

        checked = super()._wrap_method_handler(method_handler, received_public_key).unary_unary

        def call(request: Any, context: Any) -> Any:
            if request is UNREADABLE:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a valid request (no message of this method)")
            message, CALL.size = request
            CALL.receiver = None
            return checked(message, context)

        def write(response: Any) -> bytes:
            data: bytes = method_handler.response_serializer(response)
            if CALL.receiver is not None:
                CALL.receiver.sent += len(data)
            return data

        return grpc.unary_unary_rpc_method_handler(call, read, write)


class GuardedServicer(FleetServicer):
    """Args: limit: bytes of objects that a client may push between two orders."""

    def __init__(self, state_factory: Any, objectstore_factory: Any, members: Members, limit: int):
        super().__init__(state_factory, objectstore_factory, enable_supernode_auth=True)
        self.members, self.limit = members, limit
        self.work = threading.Condition()  # there are new orders
        self.news = threading.Condition()  # there are new replies, or a client came or went

    def _caller(self, context: Any) -> Member:
        header = dict(context.invocation_metadata()).get(PUBLIC_KEY_HEADER, b"")
        member = self.members.by_key(header)
        if member is None:
            log.warning("%s: refused, its key is not registered", context.peer())
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this key is not registered with the server")
        assert member is not None, "abort raises"
        member.seen = time.monotonic()
        return member

    def _guarded(self, method: Callable, request: Any, context: Any) -> Any:
        try:
            return method(request, context)
        except Exception as error:  # hostile input may raise anything; the caller learns only the kind
            log.warning("%s: request refused: %s", context.peer(), type(error).__name__)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a valid request ({type(error).__name__})")

    def _told(self) -> None:
        with self.news:
            self.news.notify_all()

    def ActivateNode(self, request: Any, context: Any) -> Any:
        member = self._caller(context)
        if request.public_key != member.key:
            log.warning("client '%s' asked to be somebody else: refused", member.name)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the key is not the caller's")
        self.state_factory.state().deactivate_node(member.node)  # a killed client never said goodbye
        response = self._guarded(super().ActivateNode, request, context)
        member.activations += 1
        self._told()
        return response

    def DeactivateNode(self, request: Any, context: Any) -> Any:
        member = self._caller(context)
        response = self._guarded(super().DeactivateNode, request, context)
        member.seen = -math.inf
        self._told()
        return response

    def SendNodeHeartbeat(self, request: Any, context: Any) -> Any:
        self._caller(context)
        return self._guarded(super().SendNodeHeartbeat, request, context)

    def PullMessages(self, request: Any, context: Any) -> Any:
        """Held open for a while until there is work, so that neither side has to poll fast."""
        member, until = self._caller(context), time.monotonic() + LONG_POLL
        with self.work:
            while True:
                response = self._guarded(super().PullMessages, request, context)
                left = until - time.monotonic()
                if response.messages_list or left <= 0 or not context.is_active():
                    break
                self.work.wait(left)
        if response.messages_list:
            CALL.receiver = member
        return response

    def PushMessages(self, request: Any, context: Any) -> Any:
        member = self._caller(context)
        if any(m.metadata.src_node_id != member.node for m in request.messages_list):
            log.warning("client '%s' sent a message in another's name: refused", member.name)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the message is not the caller's")
        self._count(member, context)
        response = self._guarded(super().PushMessages, request, context)
        self._told()
        return response

    def PushObject(self, request: Any, context: Any) -> Any:
        self._count(self._caller(context), context)
        response = self._guarded(super().PushObject, request, context)
        self._told()
        return response

    def _count(self, member: Member, context: Any) -> None:
        member.received += CALL.size
        member.pushed += CALL.size
        if member.pushed > self.limit:
            log.warning("client '%s' sent more than %d bytes for one order: refused", member.name, self.limit)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {self.limit} bytes for one order")

    def PullObject(self, request: Any, context: Any) -> Any:
        member = self._caller(context)
        CALL.receiver = member
        return self._guarded(super().PullObject, request, context)

    def ConfirmMessageReceived(self, request: Any, context: Any) -> Any:
        self._caller(context)
        return self._guarded(super().ConfirmMessageReceived, request, context)

    def _not_offered(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "not offered by this server")

    RegisterNode = UnregisterNode = GetRun = GetFab = _not_offered

"""Every private name of flwr 1.39 that the deployment uses, in one place: what to look at when flwr moves.

They are the parts of a SuperLink (link state, object store, fleet servicer, node authentication) and of a SuperNode
(fleet stub, signing interceptor), and how a message becomes content-addressed objects of a few MB.
"""

from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, PUBLIC_KEY_HEADER, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub, add_FleetServicer_to_server
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

IN_MEMORY = ":flwr-in-memory:"

__all__ = [
    "IN_MEMORY",
    "NOOP_ACCOUNT_NAME",
    "NOOP_FEDERATION_ID",
    "NOOP_FLWR_AID",
    "PUBLIC_KEY_HEADER",
    "SUPERLINK_NODE_ID",
    "ActivateNodeRequest",
    "ConfirmMessageReceivedRequest",
    "DeactivateNodeRequest",
    "FleetServicer",
    "FleetStub",
    "LinkStateFactory",
    "NoOpFederationManager",
    "Node",
    "NodeAuthClientInterceptor",
    "NodeAuthServerInterceptor",
    "ObjectStoreFactory",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "PullObjectRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "SendNodeHeartbeatRequest",
    "TaskIdentity",
    "TaskType",
    "add_FleetServicer_to_server",
    "get_all_nested_objects",
    "get_object_tree",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "message_from_proto",
    "message_to_proto",
    "no_object_id_recompute",
    "remove_content_from_message",
]

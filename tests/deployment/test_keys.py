"""Keys, and who is let in: every stranger is refused with one clear line, and the server keeps serving."""

import contextlib
import socket
import ssl
from concurrent import futures

import grpc
import pytest
from flwr.app import Message, RecordDict

from fedsim.deployment import fleet, keys
from fedsim.deployment.connection import Connection
from fedsim.errors import ConfigError, DataError


def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path):
    keys.make_node(tmp_path, "a")
    key = tmp_path / "a.key"
    assert keys.read_key(key).curve.name == "secp256r1"
    key.chmod(0o640)
    with pytest.raises(DataError, match=f"chmod 600 {key}"):
        keys.read_key(key)


def test_keys_are_registered_once_and_revoked(tmp_path):
    public = keys.make_node(tmp_path, "a")
    keys.register(public, tmp_path / "known")
    with pytest.raises(DataError, match="registered already"):
        keys.register(public, tmp_path / "known", "b")
    with pytest.raises(ConfigError, match="client name"):
        keys.register(public, tmp_path / "known", "../b")
    with pytest.raises(DataError, match="no client 'b'"):
        keys.revoke("b", tmp_path / "known")
    keys.revoke("a", tmp_path / "known")
    assert keys.registered(tmp_path / "known") == {}


def test_a_key_is_never_overwritten(tmp_path):
    keys.make_ca(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        keys.make_ca(tmp_path)


def test_a_server_does_not_start_with_an_expired_or_foreign_certificate(deploy):
    deployment = deploy()
    (deployment.pki / "server.key").unlink()
    keys.make_server(deployment.pki, ["127.0.0.1"], days=-1)
    server = deployment.server()
    assert server.wait() == 2
    assert "expired" in server.text()
    keys.make_ca(deployment.folder / "other")
    server = deployment.server(ca=deployment.folder / "other" / "ca.crt")
    assert server.wait() == 2
    assert "not a certificate issued by" in server.text()


def test_a_client_refuses_an_expired_certificate(deploy):
    """Against a TLS port that shows one, since our server would not start with it."""
    deployment = deploy()
    (deployment.pki / "server.key").unlink()
    keys.make_server(deployment.pki, ["127.0.0.1"], days=-1)

    def expired() -> None:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        pair = ((deployment.pki / "server.key").read_bytes(), (deployment.pki / "server.crt").read_bytes())
        server.add_secure_port(f"127.0.0.1:{deployment.port}", grpc.ssl_server_credentials([pair]))
        server.start()
        print("ready", flush=True)
        server.wait_for_termination(60)

    deployment._start("server", expired).until("ready")
    client = deployment.client("photo")
    assert client.wait() == 1
    assert "certificate" in client.text()


def test_a_client_refuses_a_server_of_another_address(deploy):
    deployment = deploy()
    deployment.server(listen=f"127.0.0.2:{deployment.port}").until("listening")
    client = deployment.client("photo", server=f"127.0.0.2:{deployment.port}")
    assert client.wait() == 1
    assert "certificate" in client.text()


def strangers(deployment) -> None:
    """Probes that must fail, in a process of their own; prints how each ended."""
    address, ca = f"127.0.0.1:{deployment.port}", (deployment.pki / "ca.crt").read_bytes()
    request = fleet.PullMessagesRequest(node=fleet.Node(node_id=1))

    def attempt(name, channel, method, request):
        try:
            getattr(fleet.FleetStub(channel), method)(request, timeout=20)
            print(f"{name}: let in", flush=True)
        except grpc.RpcError as error:
            print(f"{name}: {error.code().name}", flush=True)

    attempt("plain text", grpc.insecure_channel(address), "PullMessages", request)
    unlimited = [("grpc.max_send_message_length", -1)]
    bare = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), options=unlimited)
    attempt("no key", bare, "PullMessages", request)
    mine = Connection(address, deployment.pki / "ca.crt", keys.read_key(deployment.pki / "photo.key"))
    other = fleet.Node(node_id=mine.node.node_id ^ 1)
    attempt("another's id", mine.channel, "PullMessages", fleet.PullMessagesRequest(node=other))
    fleet.TaskIdentity.run_id, fleet.TaskIdentity.node_id, fleet.TaskIdentity.task_id = 1, mine.node.node_id, 1
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__.update(_message_id="0" * 64, _src_node_id=other.node_id)
    forged = fleet.message_to_proto(message)
    push = fleet.PushMessagesRequest(node=mine.node, messages_list=[forged])
    attempt("another's message", mine.channel, "PushMessages", push)
    attempt("nothing in it", mine.channel, "PushMessages", fleet.PushMessagesRequest(node=mine.node))
    key = keys.read_key(deployment.pki / "photo.key")
    signed = grpc.intercept_channel(bare, fleet.NodeAuthClientInterceptor(key, key.public_key()))
    big = fleet.PushObjectRequest(node=mine.node, object_content=b"0" * (17 << 20))
    attempt("too big", signed, "PushObject", big)
    attempt("not offered", mine.channel, "GetFab", fleet.PullMessagesRequest(node=mine.node))
    idle: list[socket.socket] = [socket.create_connection(("127.0.0.1", deployment.port)) for _ in range(900)]
    trusting = ssl.create_default_context(cafile=deployment.pki / "ca.crt")
    trusting.set_alpn_protocols(["h2"])
    idle += [trusting.wrap_socket(connection, server_hostname="127.0.0.1") for connection in idle[:100]]
    idle[:100] = [socket.create_connection(("127.0.0.1", deployment.port)) for _ in range(100)]
    attempt("beside idle connections", mine.channel, "PullMessages", fleet.PullMessagesRequest(node=mine.node))
    for connection in idle:
        with contextlib.suppress(OSError):
            connection.close()
    mine.close()
    print("done", flush=True)


@pytest.mark.slow
def test_strangers_are_refused_and_the_server_keeps_serving(deploy):
    deployment = deploy()
    server = deployment.server()
    server.until("listening")
    probe = deployment._start("strangers", lambda: strangers(deployment))
    assert probe.wait() == 0, probe.text()
    ended = dict(line.split(": ", 1) for line in probe.text().splitlines() if ": " in line)
    assert ended == {
        "plain text": "UNAVAILABLE",
        "no key": "UNAUTHENTICATED",
        "another's id": "UNAUTHENTICATED",
        "another's message": "UNAUTHENTICATED",
        "nothing in it": "INVALID_ARGUMENT",
        "too big": "RESOURCE_EXHAUSTED",
        "not offered": "UNIMPLEMENTED",
        "beside idle connections": "let in",
    }
    assert server.code is None
    keys.make_node(deployment.pki, "stranger")
    unknown = deployment.client("photo", name="unknown", key="stranger")
    assert unknown.wait() == 1
    assert "not registered" in unknown.text()
    keys.make_ca(deployment.folder / "other")
    wrong_ca = deployment.client("photo", name="wrong-ca", ca=deployment.folder / "other" / "ca.crt")
    assert wrong_ca.wait() == 1
    assert "certificate" in wrong_ca.text()
    photo = deployment.client("photo")
    server.until("1 of 3 clients")
    keys.revoke("photo", deployment.known)
    assert photo.wait() == 1
    assert "refuses this client" in photo.text()
    assert "PRIVATE KEY" not in server.text()

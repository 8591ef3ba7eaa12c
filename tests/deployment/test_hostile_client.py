"""The server's port under mutated messages, from strangers and from a registered client: every call ends in a status
code that says why, memory stays bounded, and the federation beside it ends with the undisturbed bits."""

import ast
import os
import random
import re
import socket
import ssl
import time
from collections import Counter
from typing import Any

import grpc
import pytest
from flwr.app import Message, RecordDict

from fedsim.deployment import fleet, keys
from fedsim.deployment.client import work
from fedsim.deployment.connection import Connection
from fedsim.deployment.link import Link
from fedsim.deployment.site import Site
from fedsim.deployment.wire import pack
from tests.conftest import DOMAINS
from tests.deployment.test_hostile_server import resident
from tests.deployment.test_same_bits import simulated

MUTANTS = {"a registered client": 3000, "a stranger": 1500}
CODES = {
    "OK",
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
}
SERVICE = "/flwr.proto.Fleet/"


def requests(node: int, run: int) -> dict[str, Any]:
    """One good request of every kind."""
    me = fleet.Node(node_id=node)
    fleet.TaskIdentity.run_id, fleet.TaskIdentity.node_id, fleet.TaskIdentity.task_id = run, node, 1
    message = Message(pack(RecordDict()), dst_node_id=1, message_type="train")
    message.metadata.__dict__.update(_message_id=message.object_id, _reply_to_message_id="0" * 64, _src_node_id=node)
    tree = fleet.get_object_tree(message)
    content = message.deflate()
    push = {"node": me, "messages_list": [fleet.message_to_proto(message)], "message_object_trees": [tree]}
    name = {"node": me, "run_id": run, "object_id": message.object_id}
    return {
        "ActivateNode": fleet.ActivateNodeRequest(public_key=b"", heartbeat_interval=1800.0),
        "SendNodeHeartbeat": fleet.SendNodeHeartbeatRequest(node=me, heartbeat_interval=1800.0),
        "PullMessages": fleet.PullMessagesRequest(node=me),
        "PushMessages": fleet.PushMessagesRequest(**push),
        "PushObject": fleet.PushObjectRequest(**name, object_content=content),
        "PullObject": fleet.PullObjectRequest(**name),
        "ConfirmMessageReceived": fleet.ConfirmMessageReceivedRequest(
            node=me, run_id=run, message_object_id=message.object_id
        ),
        "GetRun": fleet.PullMessagesRequest(node=me),
        "GetFab": fleet.PullMessagesRequest(node=me),
        "RegisterNode": fleet.ActivateNodeRequest(public_key=b"x"),
        "UnregisterNode": fleet.DeactivateNodeRequest(node_id=node),
        "DeactivateNode": fleet.DeactivateNodeRequest(node_id=node),
    }


def altered(draw: random.Random, request: Any) -> bytes:
    """A message of the right form with one to three of its fields, at any depth, set to something else."""
    out = type(request)()
    out.CopyFrom(request)
    for _ in range(draw.randint(1, 3)):
        part = out
        while True:
            field = draw.choice(part.DESCRIPTOR.fields)
            inner = getattr(part, field.name)
            nested = field.cpp_type == field.CPPTYPE_MESSAGE
            many = field.label == field.LABEL_REPEATED
            if nested and not many:
                part = inner
            elif nested and len(inner) and hasattr(inner[0], "DESCRIPTOR") and draw.random() < 0.8:
                part = draw.choice(inner)
            else:
                break
        if nested or many or draw.random() < 0.1:
            part.ClearField(field.name)
        elif field.cpp_type == field.CPPTYPE_STRING:
            junk = draw.choice(["", "x", "0" * 64, "f" * 64, "x" * 10**5, "train"])
            setattr(part, field.name, junk.encode() if field.type == field.TYPE_BYTES else junk)
        elif field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            setattr(part, field.name, draw.choice([0.0, -1.0, float("nan"), float("inf"), 1e300]))
        else:
            setattr(part, field.name, draw.choice([0, 1]))
    return out.SerializeToString()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Bytes flipped, inserted, removed, repeated."""
    out = bytearray(data)
    for _ in range(draw.choice([0, 1, 1, 2, 4, 16])):
        at = draw.randrange(len(out) + 1)
        match draw.randrange(4):
            case 0 if out:
                out[at % len(out)] = draw.randrange(256)
            case 1:
                out[at:at] = draw.randbytes(draw.choice([1, 4, 100]))
            case 2:
                del out[at : at + draw.choice([1, 4, 100])]
            case _:
                out += out[: draw.randrange(len(out) + 1)]
    return bytes(out)


def attack(deployment, who: str, seed: int) -> None:
    address, ca = f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt"
    draw, codes = random.Random(seed), Counter()
    bare = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()))
    mine = Connection(address, ca, read(deployment, "intruder")) if "registered" in who else None
    good = requests(mine.node.node_id if mine else 1, 1)
    for number in range(MUTANTS[who]):
        method, request = draw.choice(list(good.items()))
        data = altered(draw, request) if number % 2 else mutated(draw, request.SerializeToString())
        junk = [(draw.choice(["public-key-bin", "signature-bin", "x-bin"]), draw.randbytes(40)), ("timestamp", "now")]
        channel, metadata = (mine.channel, None) if mine else (bare, draw.choice([None, junk]))
        try:
            channel.unary_unary(SERVICE + method)(data, timeout=20, metadata=metadata)
            codes["OK"] += 1
        except grpc.RpcError as error:
            codes[error.code().name] += 1
        if not mine and number % 20 == 0:
            try:
                _not_even_http(draw, deployment)
            except OSError:
                codes["UNAVAILABLE"] += 1
    print(f"{who}: {dict(codes)}", flush=True)
    print(f"unexpected: {sorted(set(codes) - CODES)}", flush=True)


def _not_even_http(draw: random.Random, deployment) -> None:
    """Junk on the bare port and junk inside TLS."""
    with socket.create_connection(("127.0.0.1", deployment.port)) as line:
        line.sendall(draw.randbytes(300))
    trusting = ssl.create_default_context(cafile=deployment.pki / "ca.crt")
    trusting.set_alpn_protocols(["h2"])
    line = socket.create_connection(("127.0.0.1", deployment.port))
    with trusting.wrap_socket(line, server_hostname="127.0.0.1") as inside:
        inside.sendall(draw.choice([b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]) + draw.randbytes(300))


@pytest.mark.slow
def test_mutated_messages_harm_nobody(deploy, dataset):
    deployment = deploy(rounds=6, algorithm={"strategy": "fedbn"})
    keys.register(keys.make_node(deployment.pki, "intruder"), deployment.known)
    server = deployment.server()
    server.until("listening")
    photo = deployment.client(DOMAINS[0])
    server.until("1 of 3 clients")
    before = resident(server.process.pid)

    def attackers(wave: int):
        return [
            deployment._start(f"attacker{wave}-{i}", lambda who=who, i=i: attack(deployment, who, 2 * wave + i))
            for i, who in enumerate(MUTANTS)
        ]

    for attacker in attackers(0):
        assert attacker.wait(300) == 0, attacker.text()
        assert "unexpected: []" in attacker.text(), attacker.text()
    assert resident(server.process.pid) < before + (64 << 20)
    again = attackers(1)
    others = [deployment.client(domain) for domain in DOMAINS[1:]]
    server.until("round 5/6")
    assert resident(server.process.pid) < before + (256 << 20)
    assert server.wait() == 0, server.text()[-3000:]
    assert [c.wait() for c in (photo, *others)] == [0, 0, 0]
    found, expected = deployment.summary(), simulated(dataset, deployment.config, deployment.folder / "simulated")
    assert found["state_sha256"] == expected["state_sha256"]
    assert found["rejected_updates"] == 0
    for attacker in again:
        attacker.wait(300)
        # The server may end before they do: it cancels calls under way, and later ones find no server.
        unexpected = re.findall(r"unexpected: (\[.*\])", attacker.text())
        assert len(unexpected) == 1, attacker.text()
        assert set(ast.literal_eval(unexpected[0])) <= {"CANCELLED", "UNAVAILABLE"}, attacker.text()
    assert "Traceback" not in server.text()
    assert "PRIVATE KEY" not in server.text()
    assert os.path.getsize(server.log) < 4 << 20


def test_nonsense_about_its_data_leaves_a_client_out_and_stops_nobody(deploy, dataset):
    nonsense = {
        "dtype": ("object", "dtype 'object'"),
        "shape": ([2**20, 2**20, 2**20], "examples of shape"),
        "classes": ([], "0 classes"),
        "digest": (1, "'digest' is '1'"),
        "domain": ("elsewhere", "its domain is 'elsewhere'"),
    }
    deployment = deploy(rounds=1)
    for name in ("mute", *(f"bad-{key}" for key in nonsense)):
        keys.register(keys.make_node(deployment.pki, name), deployment.known)
    server = deployment.server()
    server.until("listening")
    for key, (value, _) in nonsense.items():

        def lie(key=key, value=value) -> None:
            class Liar(Site):
                def hello(self, job):
                    return {**super().hello(job), key: value}

            secret = read(deployment, f"bad-{key}")
            site = Liar("photo", str(deployment.dataset.folder), None)
            work(f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt", secret, site, give_up=60)

        deployment._start(f"bad-{key}", lie)

    class Mute(Site):
        def hello(self, job):
            time.sleep(1000)

    secret = read(deployment, "mute")
    site = Mute("photo", str(deployment.dataset.folder), None)
    address, ca = f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt"
    deployment._start("mute", lambda: work(address, ca, secret, site, give_up=60)).until("connected")
    for key, (_, reason) in nonsense.items():
        server.until(reason)
        assert f"client 'bad-{key}' is left out: " in server.text()
    clients = deployment.clients()
    assert server.wait() == 0, server.text()
    assert [c.wait() for c in clients] == [0, 0, 0]


def test_a_client_that_never_stops_sending_is_stopped(deploy):
    deployment = deploy()
    files = {"cert": deployment.pki / "server.crt", "key": deployment.pki / "server.key", "clients": deployment.known}

    def small() -> None:
        Link(f"127.0.0.1:{deployment.port}", **files, reply_limit=200_000)
        print("listening", flush=True)
        time.sleep(60)

    def flood() -> None:
        mine = Connection(f"127.0.0.1:{deployment.port}", deployment.pki / "ca.crt", read(deployment, "photo"))
        for number in range(5):
            name = f"{number:064d}"
            push = fleet.PushObjectRequest(node=mine.node, run_id=1, object_id=name, object_content=bytes(60_000))
            try:
                mine.stub.PushObject(push, timeout=20)
            except grpc.RpcError as error:
                print(error.code().name, flush=True)

    server = deployment._start("small", small)
    server.until("listening")
    flooding = deployment._start("flood", flood)
    assert flooding.wait() == 0
    assert flooding.text().split() == ["INVALID_ARGUMENT"] * 3 + ["RESOURCE_EXHAUSTED"] * 2
    assert server.text().count("client 'photo' sent more than 200000 bytes for one order: refused") == 2


def test_a_client_that_is_about_to_connect_is_not_there_yet(deploy, monkeypatch):
    deployment = deploy(rounds=1)
    activate = fleet.FleetServicer.ActivateNode

    def slow(self, request, context):
        time.sleep(0.5)
        return activate(self, request, context)

    monkeypatch.setattr(fleet.FleetServicer, "ActivateNode", slow)  # processes are forked: the server's too
    server = deployment.server()
    clients = deployment.clients()
    assert server.wait() == 0, server.text()
    assert [c.wait() for c in clients] == [0, 0, 0]


def read(deployment, name: str):
    return keys.read_key(deployment.pki / f"{name}.key")

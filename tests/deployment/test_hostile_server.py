"""A client obeys nothing that makes no sense: each such order ends in an error with its reason, the private state stays
as it was, and the next good order is carried out."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsim.build import plan
from fedsim.config import to_toml
from fedsim.data import partition
from fedsim.deployment.federation import Patience, exchange
from fedsim.deployment.jobs import HELLO, JOB, PLACE, Job, end_of, sequence
from fedsim.deployment.link import Link
from fedsim.deployment.server import deployed
from fedsim.deployment.wire import pack, unpack
from fedsim.flower import CONFIG, EXTRA, SHARED, order_content
from fedsim.types import Order
from tests.conftest import DOMAINS

PATIENCE = Patience(silent=10.0, order=30.0, absent=30.0)
MUTANTS = 2000


class Tyrant:
    """A server that sends one client whatever it likes; lives in a process of its own."""

    def __init__(self, deployment):
        deployment.config = deployed(deployment.config)
        shards = partition(deployment.dataset, DOMAINS, "iid", 1, deployment.config.seed)
        self.planned = plan(deployment.config, (deployment.dataset, shards, None))
        self.model, _ = self.planned.task.initial()
        files = {"cert": deployment.pki / "server.crt", "key": deployment.pki / "server.key"}
        self.link = Link(f"127.0.0.1:{deployment.port}", **files, clients=deployment.known)
        (self.member,) = (m for m in self.link.members.all() if m.name == "photo")
        print("listening", flush=True)
        while not self.link.members.present(self.member, 5.0):
            self.link.wait(0.1)
        self.job = Job(to_toml(self.planned.config), "0123456789abcdef", 0, sequence(2), 1)
        for kind in (HELLO, PLACE):
            content, reason = self.ask(RecordDict({JOB: self.job.record()}), kind)
            assert content is not None, reason

    def ask(self, content: RecordDict, kind: str = "train") -> tuple[RecordDict | None, str]:
        """(content of the reply, or why there is none)."""
        errand = exchange(self.link, {0: self.member}, lambda client: content, kind, PATIENCE)
        return (errand.answers[0].content, "") if not errand.failed else (None, errand.failed[0])

    def content(self, order: Order, **job) -> RecordDict:
        return RecordDict({**order_content(order), JOB: replace(self.job, **job).record()})

    def good(self) -> list[tuple[str, bytes]]:
        """Tensors of the reply to an order that makes sense; they depend on the private state of the round before."""
        content, reason = self.ask(pack(self.content(Order(2, self.model))))
        assert content is not None, reason
        return sorted((name, array.data) for name, array in unpack(content)[SHARED].items())


def spoiled(model, value):
    name = next(n for n, v in model.items() if v.is_floating_point())
    return {**model, name: value(model[name])}


def senseless(tyrant: Tyrant) -> dict[str, tuple[RecordDict, str, str]]:
    """What makes no sense: content of the message, its kind, and what the client's reason says."""
    model, content = tyrant.model, tyrant.content
    name = next(iter(model))
    masks = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in model.items()}
    nothing = {n: torch.zeros_like(v) for n, v in model.items()}
    bomb = content(Order(2, model))
    bomb[EXTRA] = ArrayRecord({"bomb": Array("float64", (2**31,), "fedsim.zero.index", b"")})
    code = content(Order(2, model))
    code[EXTRA] = ArrayRecord({"code": Array("object", (1,), "numpy.ndarray", b"cos\nsystem\n(S'touch x'\ntR.")})
    many = tyrant.job.config.replace("\nthreads = 1\n", "\nthreads = 1000\n")
    bare = RecordDict({CONFIG: ConfigRecord({}), JOB: tyrant.job.record()})
    orders = {
        "NaN weights": (Order(2, spoiled(model, lambda v: v * float("nan"))), "not finite"),
        "infinite weights": (Order(2, spoiled(model, lambda v: v + float("inf"))), "not finite"),
        "wrong shape": (Order(2, spoiled(model, torch.flatten)), "has shape"),
        "wrong dtype": (Order(2, spoiled(model, torch.Tensor.double)), "torch.float64"),
        "missing name": (Order(2, {n: v for n, v in model.items() if n != name}), "is missing"),
        "unknown name": (Order(2, {**model, "more": torch.ones(1)}), "not part of the model"),
        "infinite rate": (Order(2, model, scalars={"lr": float("inf")}), "'lr' is inf"),
        "negative rate": (Order(2, model, scalars={"lr": -1.0}), "'lr' is -1.0"),
        "NaN scalar": (Order(2, model, scalars={"x": float("nan")}), "'x' is nan"),
        "NaN extra": (Order(2, model, extra={"x": torch.tensor(float("nan"))}), "not finite"),
        "all-zero masks": (Order(2, nothing, masks=masks), "leave no weight"),
        "unknown task": (Order(2, model, task="upload"), "task 'upload'"),
        "unknown return": (Order(2, model, returns=("secret",)), "not part of the model"),
        "a round after the last": (Order(99, model), "round 99 of 3"),
    }
    rows = {kind: (content(order), "train", reason) for kind, (order, reason) in orders.items()}
    evaluation = Order(2, model, task="evaluate")
    broken = replace(evaluation, shared=spoiled(model, lambda v: v * float("nan")))
    return rows | {
        "another round's number": (content(Order(2, model), sequence=sequence(1)), "train", "does not belong"),
        "a number that forgets all": (content(evaluation, sequence=-(10**6)), "evaluate", "does not belong"),
        "a checkpoint to come": (content(Order(2, model), oldest=3), "train", "does not belong"),
        "NaN model": (content(broken, sequence=end_of(2)), "evaluate", "not finite"),
        "gigabytes from nothing": (bomb, "train", "at most are expected"),
        "pickled code": (code, "train", "not an order: ValueError"),
        "no order": (bare, "train", "not an order: KeyError"),
        "no job": (order_content(Order(2, model)), "train", "not an order: KeyError"),
        "no such kind": (content(Order(2, model)), "train.shell", "no such order"),
        "a configuration that is none": (content(Order(2, model), config="rounds = ["), "train", "not TOML"),
        "a run outside the folder": (content(Order(2, model), run="../../etc/passwd"), "train", "16 hexadecimal"),
        "many threads": (content(Order(2, model), threads=65), "train", "65 threads, expected 1 to 64"),
        "many threads for all": (content(Order(2, model), config=many), "train", "threads = 1000: expected 64 at most"),
        "no whole number of threads": (content(Order(2, model), threads=1.5), "train", "whole numbers"),
        "another domain's number": (content(Order(2, model), client=1), "train", "not of domain"),
    }


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    pages = int(open(f"/proc/{pid}/statm").read().split()[1])  # noqa: SIM115
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_turn(deployment, work) -> None:
    """The log of a hostile server that does ``work``, and of the client that outlives it."""
    tyrant = deployment._start("tyrant", lambda: work(Tyrant(deployment)))
    tyrant.until("listening")
    client = deployment.client("photo")
    assert tyrant.wait(300) == 0, tyrant.text()[-3000:]
    assert client.code is None, client.text()
    assert "Traceback" not in client.text()
    return client


def test_orders_that_make_no_sense_are_refused_and_good_ones_still_done(deploy):
    deployment = deploy(algorithm={"strategy": "fedbn"})

    def work(tyrant: Tyrant) -> None:
        first, reason = tyrant.ask(pack(tyrant.content(Order(1, tyrant.model), sequence=sequence(1))))
        assert first is not None, reason
        before = tyrant.good()
        for kind, (content, message, expected) in senseless(tyrant).items():
            reply, reason = tyrant.ask(pack(content), message)
            assert reply is None, kind
            assert expected in reason, (kind, reason)
            print(json.dumps([kind, reason]), flush=True)
            assert tyrant.good() == before, kind

    client = in_turn(deployment, work)
    log = (deployment.folder / "tyrant.log").read_text().splitlines()
    for kind, reason in (json.loads(line) for line in log if line.startswith("[")):
        assert reason[:60] in client.text(), kind


@pytest.mark.slow
def test_mutated_orders_end_in_refusals_within_bounded_memory(deploy):
    """Seeded mutations of the objects of good orders, with their hashes made right again, so that they arrive."""
    deployment = deploy(algorithm={"strategy": "fedbn"})
    memory = deployment.folder / "memory"

    def work(tyrant: Tyrant) -> None:
        draw = random.Random(0)
        before, refused = tyrant.good(), 0
        orders = [content for content, _, _ in senseless(tyrant).values()]
        orders += [tyrant.content(Order(2, tyrant.model))]
        for number in range(MUTANTS):
            content = mutated(draw, draw.choice(orders) if number % 2 else orders[-1])
            reply, _ = tyrant.ask(content, draw.choice(["train", "train", "evaluate", HELLO, PLACE]))
            refused += reply is None
            if number == MUTANTS // 10:
                memory.with_name("early").touch()
        print(f"{refused} of {MUTANTS} refused", flush=True)
        assert tyrant.good() == before

    tyrant = deployment._start("tyrant", lambda: work(Tyrant(deployment)))
    tyrant.until("listening")
    client = deployment.client("photo")
    while not memory.with_name("early").exists() and tyrant.code is None:
        tyrant.process.join(0.2)
    early = resident(client.process.pid)
    assert tyrant.wait(400) == 0, tyrant.text()[-3000:]
    assert client.code is None, client.text()[-3000:]
    assert "Traceback" not in client.text()
    assert resident(client.process.pid) < early + (256 << 20)
    refused = int(next(line for line in tyrant.text().splitlines() if "refused" in line).split()[0])
    assert refused > MUTANTS // 2


def mutated(draw: random.Random, content: RecordDict) -> RecordDict:
    """A packed order with bytes, values, names or whole records changed."""
    out = RecordDict(dict(pack(content)))
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(list(out))
        record = out[name]
        match draw.randrange(4):
            case 0:
                del out[name]
                if not out:
                    return out
            case 1 if isinstance(record, ConfigRecord) and record:
                key = draw.choice(list(record))
                junk = [-1, 0, 10**18, float("nan"), float("inf"), "", "x" * 1000, b"\xff", [1, 2], ["a"], True]
                out[name] = ConfigRecord({**record, draw.choice([key, "more"]): draw.choice(junk)})
            case 2 if isinstance(record, ArrayRecord) and record:
                (key, array), *_ = record.items()
                data = bytearray(array.data)
                for _ in range(draw.randint(1, 8)):
                    data[draw.randrange(min(len(data), 400))] = draw.randrange(256)
                data = data[: draw.randrange(len(data))] if draw.random() < 0.3 else data
                out[name] = ArrayRecord({key: Array(array.dtype, array.shape, array.stype, bytes(data))})
            case _:
                out[draw.choice([name, "shared", "extra", "job", "fedsim", "more"])] = record
    return out

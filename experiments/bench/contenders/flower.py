"""Flower's own simulation engine: FedAvg over the message API, its Ray backend, a SuperNode a client."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.bench.reporting import Result, arguments, result
from experiments.bench.torch_side import bare_model, build_model, final_loss, shard, train
from experiments.bench.workloads import Workload, cohort, load, workload


def client_of(workload: Workload) -> ClientApp:
    """The client of Flower's quickstart: build a model, load the arrays, train, reply. No buffers travel."""
    app = ClientApp()
    cache: dict[str, tuple] = {}  # an actor maps the data once, not once a message

    @app.train()
    def local_training(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        x, y = cache.get("data") or cache.setdefault("data", load(workload))
        model = bare_model(workload)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict(), strict=False)
        model.train()
        client = cast(int, message.content.config_records["config"]["client"])
        train(model, *shard(x, y, client), workload.lr, workload.batch)
        arrays = ArrayRecord({n: p.detach() for n, p in model.named_parameters()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": workload.examples})})
        return Message(content=content, reply_to=message)

    return app


class Fixed(FedAvg):
    """FedAvg on the workload's cohorts; notes the time at which a round starts."""

    def __init__(self, workload: Workload, stamps: list[float]):
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=2)
        self.workload, self.stamps = workload, stamps

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.stamps.append(time.perf_counter())
        nodes = sorted(grid.get_node_ids())
        for client in cohort(self.workload, server_round):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client})})
            yield Message(content=content, message_type="train", dst_node_id=nodes[client])


def run(workload: Workload, rounds: int, actors: int = 2) -> Result:
    stamps: list[float] = []
    ends: list[ArrayRecord] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < workload.clients:
            time.sleep(0.05)
        start = ArrayRecord({n: p.detach() for n, p in build_model(workload).named_parameters()})
        found = Fixed(workload, stamps).start(grid=grid, initial_arrays=start, num_rounds=rounds)
        stamps.append(time.perf_counter())
        ends.append(found.arrays)

    resources: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": actors},
    }
    run_simulation(server, client_of(workload), num_supernodes=workload.clients, backend_config=resources)
    loss = final_loss(workload, ends[0].to_torch_state_dict(), {})
    return result("flower", workload.name, stamps, loss, "flwr", "ray", "torch", "numpy")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--actors", type=int, default=2, help="Ray actors of one CPU (default: 2)")
    chosen = parser.parse_args()
    print(run(workload(chosen.workload), chosen.rounds, chosen.actors).line())

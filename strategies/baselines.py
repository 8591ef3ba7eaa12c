"""The two baselines every multi-domain table shows: each client alone, and one model on the pooled data."""

from __future__ import annotations

from torch import nn

from fedsim.config import Config
from fedsim.plugin import Plugin
from fedsim.registry import Part, preset, register
from strategies.fedavg import FedAvg, averaging


class KeepEverything(Plugin):
    """No tensor leaves the client."""

    def private(self, model: nn.Module) -> set[str]:
        return set(model.state_dict())


class LocalOnly(FedAvg):
    """ "SingleSet" or "standalone": every client trains its own model; the server's state is empty."""

    plugins = (KeepEverything(),)


class Centralised(FedAvg):
    """FedAvg of a single client that holds the data of all domains."""


@register("rule", "local-only")
def local_only(config: Config) -> Part:
    return Part((KeepEverything(),), server=averaging)


preset("local-only", "every client alone (SingleSet, standalone)", rule="local-only")
preset("centralised", "one model on the pooled data", implies={"federation": {"partition": "pooled"}})

"""Methods that share the body and keep the head (the last linear layer) on the client; the server half is FedAvg's.

    FedPer   (Arivazhagan et al., 2019)                body and head train together
    FedRep   (Collins et al., ICML 2021)               head first, then body, in every round
    FedBABU  (Oh, Kim, Yun, ICLR 2022)                 body alone; the heads at the end

A client that was never sampled has the initial head. Deviations: FedRep's phases are shares of a round's steps, not
epochs, and SGD has no momentum (the authors' 0.5 would carry one phase's motion into the next); FedBABU fits the heads
in the last ``head-rounds`` rounds of the run, in which the body rests (the paper's variant that tunes the head alone).
"""

from __future__ import annotations

from clients.personal import HeadThenBody, LateHead, LocalHead, head_names
from fedsim.config import Config
from fedsim.local import ClientTask
from fedsim.registry import Part, preset, register
from strategies.fedavg import FedAvg, averaging


class FedPer(FedAvg):
    def __init__(self, **options):
        super().__init__(**options)
        self.plugins = (LocalHead(),)


class FedRep(FedAvg):
    """Args: share: part of the steps that trains the head."""

    def __init__(self, share: float = 0.5, **options):
        super().__init__(**options)
        self.plugins = (HeadThenBody(share),)


class FedBABU(FedAvg):
    """Args: last: the last round that trains the body."""

    def __init__(self, last: int, **options):
        super().__init__(**options)
        self.plugins = (LateHead(last),)


def has_body(task: ClientTask, config: Config) -> str | None:
    names = head_names(task.model)
    if names and set(task.trainable) - names:
        return None
    return f"model '{config.model.name}' has no body and head to treat apart"


def two_phases(task: ClientTask, config: Config) -> str | None:
    training = config.training
    if training.optimizer != "sgd" or training.momentum or training.weight_decay:
        return "a part at rest moves by momentum or weight decay; set optimizer = 'sgd', momentum = 0, weight-decay = 0"
    return has_body(task, config)


@register("rule", "fedper")
def fedper(config: Config) -> Part:
    return Part((LocalHead(),), averaging, has_body)


@register("rule", "fedrep")
def fedrep(config: Config, *, head_share: float = 0.5) -> Part:
    return Part((HeadThenBody(head_share),), averaging, two_phases)


@register("rule", "fedbabu")
def fedbabu(config: Config, *, head_rounds: int = 1) -> Part:
    return Part((LateHead(config.rounds - head_rounds),), averaging, two_phases)


preset("fedper", "shared body, local head", rule="fedper")
preset("fedrep", "shared body, local head; head first, then body", rule="fedrep")
preset("fedbabu", "shared body under a fixed head; local heads in the last rounds", rule="fedbabu")

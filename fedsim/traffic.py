"""What orders and replies weigh on the wire, measured on serialized messages (the one module that knows how Flower
serializes them)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto

from fedsim.flower import order_content, reply_content
from fedsim.types import Order, Reply, Tensors


def message_bytes(content: RecordDict) -> int:
    """Size of a message's content as it goes over the wire."""
    return int(recorddict_to_proto(content).ByteSize())


def order_bytes(order: Order) -> int:
    return message_bytes(order_content(order))


def replies_bytes(order: Order, replies: Sequence[Reply], folded: Tensors | None = None) -> int:
    """Size of the replies' messages.

    Where a worker has folded a block the single models are gone, but not their size: it is a function of names, shapes
    and masks, and measured once for every shape of reply. ``folded``: the reports that went the same way, if any.
    """
    filled = {n: torch.ones_like(v) for n, v in order.returned.items()}
    filled = {n: torch.where(order.masks[n], v, 0) if n in order.masks else v for n, v in filled.items()}
    sizes: dict[tuple[tuple[str, int], ...], int] = {}
    total = 0
    for reply in replies:
        shape = tuple((n, v.nbytes) for n, v in reply.report.items())
        if shape not in sizes:
            whole = replace(reply, shared=filled, report={**reply.report, **(folded or {})})
            sizes[shape] = message_bytes(reply_content(whole, 0, order.masks))
        total += sizes[shape]
    return total

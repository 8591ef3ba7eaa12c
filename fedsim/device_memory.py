"""What fits on a device that counts its memory: a GPU. On a CPU the system does, and nothing is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.local import ClientTask


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still have, its allocator's own reserve included; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def kept_bytes(task: ClientTask, x: Tensor) -> int:
    """What autograd keeps of a forward pass of a batch ``x`` [B, ...]. Measured on the model as it is."""
    own = {v.untyped_storage().data_ptr() for v in task.model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    was = task.model.training
    task.model.eval()  # the same shapes, and no running statistics are touched
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = task.model(x)  # alive: what is kept stays where it is
    task.model.train(was)
    del output
    return sum(kept.values())


def training_bytes(task: ClientTask, x: Tensor) -> int:
    """About what one client's local step on a batch ``x`` [B, ...] takes under vmap: its parameters and buffers, a
    gradient, what the optimizer moves and one copy in passing; and twice what autograd keeps of the forward pass,
    since gradients of activations come and go beside it."""
    return 5 * sum(v.nbytes for v in task.model.state_dict().values()) + 2 * kept_bytes(task, x)

"""From example numbers to model inputs: pixels stay uint8 in the shared memory map until a batch is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.data import Dataset
from fedsim.data.augment import augmentation
from fedsim.device_memory import free_bytes
from fedsim.local import Fetch
from fedsim.random import torch_generator


class Examples:
    """Batches of a data set on a device, normalised on the fly.

    Args:
        layout: of images in memory; their shape is [B, C, H, W] in any case.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.layout = layout if len(dataset.shape) == 3 else torch.contiguous_format
        shape = (-1, *(1,) * (len(dataset.shape) - 1))
        # x / 255 - mean, over std, as one multiplication and one addition a pixel
        std = torch.tensor(dataset.std, dtype=dtype, device=self.device).view(shape)
        mean = torch.tensor(dataset.mean, dtype=dtype, device=self.device).view(shape)
        self.scale, self.offset = 1.0 / (255.0 * std), -mean / std
        # Plain arrays over the mapped memory: np.memmap's own bookkeeping costs more than a small batch.
        plain = np.asarray
        self.arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {
            "train": (plain(dataset.x_train), plain(dataset.y_train)),
            "test": (plain(dataset.x_test), plain(dataset.y_test)),
        }
        # On a device whose memory has the room they lie there, so that a batch is gathered where it is used.
        size = sum(a.nbytes for pair in self.arrays.values() for a in pair)
        self.resident: dict[str, tuple[Tensor, Tensor]] = {}
        free = free_bytes(self.device)
        if free is not None and size <= free // 2:  # the models of a block need the other half
            put = lambda a: torch.from_numpy(np.array(a)).to(self.device)  # noqa: E731
            self.resident = {split: (put(x), put(y)) for split, (x, y) in self.arrays.items()}

    def batch(self, split: str, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in ``dtype`` (tokens: int64), y [B] int64; for indices [k, B] both have k in front."""
        if split in self.resident:
            rows = torch.from_numpy(indices).to(self.device)
            x, y = (values[rows] for values in self.resident[split])
        else:
            # take: half the time of values[indices]
            x, y = (torch.from_numpy(values.take(indices, axis=0)).to(self.device) for values in self.arrays[split])
        if x.dtype == torch.uint8 or x.is_floating_point():
            pixels = x.dtype == torch.uint8
            if self.layout is torch.contiguous_format:
                x = x.to(self.dtype)
            else:
                x = x.flatten(0, -4).to(self.dtype, memory_format=self.layout).view(x.shape)
            if pixels:
                x = x.mul_(self.scale).add_(self.offset)
        return x, y

    def fetcher(self, seed: int, round: int, augment: str) -> Fetch:
        """Training batches of clients in one round, augmented with random numbers of each client's own."""
        if augment == "none":
            return lambda clients, indices, step: self.batch("train", indices)
        transform = augmentation(augment)
        draw = lambda client: torch_generator(seed, round=round, client=client, purpose="augment")  # noqa: E731
        generators: dict[int, torch.Generator] = {}

        def fetch(clients: Sequence[int], indices: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
            x, y = self.batch("train", indices)
            for row, client in enumerate(clients):
                if step == 0 or client not in generators:  # an order that is repeated begins anew
                    generators[client] = draw(client)
                x[row] = transform(x[row], generators[client])
            return x, y

        return fetch

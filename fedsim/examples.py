"""From example numbers to model inputs: pixels stay uint8 in the shared memory map until a batch is made of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.data import Dataset
from fedsim.data.augment import augmentation
from fedsim.random import torch_generator


class Examples:
    """Batches of a data set on a device, normalised on the fly."""

    def __init__(self, dataset: Dataset, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.dataset, self.device, self.dtype = dataset, torch.device(device), dtype
        shape = (-1, *(1,) * (len(dataset.shape) - 1))
        # x / 255 - mean, over std, as one multiplication and one addition a pixel
        std = torch.tensor(dataset.std, dtype=dtype, device=self.device).view(shape)
        mean = torch.tensor(dataset.mean, dtype=dtype, device=self.device).view(shape)
        self.scale, self.offset = 1.0 / (255.0 * std), -mean / std

    def batch(self, split: str, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in ``dtype`` (tokens: int64), y [B] int64."""
        data = self.dataset
        images, labels = (data.x_train, data.y_train) if split == "train" else (data.x_test, data.y_test)
        x = torch.from_numpy(images[indices]).to(self.device)
        y = torch.from_numpy(labels[indices]).to(self.device)
        if x.dtype == torch.uint8:
            x = x.to(self.dtype).mul_(self.scale).add_(self.offset)
        elif x.is_floating_point():
            x = x.to(self.dtype)
        return x, y

    def fetcher(self, seed: int, round: int, client: int, augment: str):
        """A function (indices, step) -> training batch of one client in one round, augmented."""
        if augment == "none":
            return lambda indices, step: self.batch("train", indices)
        transform = augmentation(augment)
        generator = torch_generator(seed, round=round, client=client, purpose="augment")

        def fetch(indices: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
            x, y = self.batch("train", indices)
            return transform(x, generator), y

        return fetch

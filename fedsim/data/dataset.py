"""A data set is a folder of arrays: uint8 images mapped into memory, shared by all workers without a copy.

<folder>/meta.json                      names, normalization, checksum
<folder>/{train,test}_{x,y,domain}.npy  all domains concatenated, in the order of meta.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import DataError

SPLITS = ("train", "test")
Arrays = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]  # domain -> split -> (examples, labels)


def cache_folder() -> Path:
    """Where built data sets are kept: $FEDSIM_CACHE, else $XDG_CACHE_HOME/fedsim, else ~/.cache/fedsim."""
    if "FEDSIM_CACHE" in os.environ:
        return Path(os.environ["FEDSIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedsim"


class Dataset:
    """A data set opened from its folder. Pickling carries the folder; the other process maps the arrays anew.

    Attributes:
        name, domains, classes: names; ``classes`` in the order of the labels.
        mean, std: normalization of x / 255, one value a channel.
        digest: SHA-256 of the arrays.
        x_train, x_test: [N, C, H, W] uint8 images, [N, F] float32 features or [N, T] int64 tokens; read-only.
        y_train, y_test: int64 [N] (or [N, T]).
        domain_train, domain_test: int16 [N], index into ``domains``.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    domain_train: np.ndarray
    domain_test: np.ndarray

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            for split in SPLITS:
                for part in ("x", "y", "domain"):
                    array = np.load(self.folder / f"{split}_{part}.npy", mmap_mode="r", allow_pickle=False)
                    setattr(self, f"{part}_{split}", array)
            self.name: str = meta["name"]
            self.domains, self.classes = tuple(meta["domains"]), tuple(meta["classes"])
            self.mean, self.std = tuple(meta["mean"]), tuple(meta["std"])
            self.digest: str = meta["digest"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.folder}: not a built data set ({error}); remove the folder and it is built anew"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x_train.shape[1:])

    @cached_property
    def _ranges(self) -> dict[tuple[str, str], np.ndarray]:
        return {
            (domain, split): np.flatnonzero(getattr(self, f"domain_{split}") == number)
            for number, domain in enumerate(self.domains)
            for split in SPLITS
        }

    def slice(self, domain: str, split: str) -> np.ndarray:
        """Positions (int64) of a domain's examples in a split."""
        return self._ranges[domain, split]

    @classmethod
    def from_arrays(
        cls,
        name: str,
        folder: Path,
        arrays: Arrays,
        classes: tuple[str, ...],
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> Dataset:
        """Write arrays as a data set and open it. The folder appears whole or not at all.

        Raises:
            DataError: a label outside the classes, or unequal numbers of examples and labels, named by domain.
        """
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        temporary.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for split in SPLITS:
            for domain, splits in arrays.items():
                x, y = splits[split]
                if len(x) != len(y):
                    raise DataError(f"{name}, domain '{domain}', {split}: {len(x)} examples but {len(y)} labels")
                if len(y) and not (y.min() >= 0 and y.max() < len(classes)):
                    raise DataError(
                        f"{name}, domain '{domain}', {split}: labels from {y.min()} to {y.max()},"
                        f" expected 0 to {len(classes) - 1}"
                    )
            parts = {
                "x": np.concatenate([s[split][0] for s in arrays.values()]),
                "y": np.concatenate([s[split][1] for s in arrays.values()]).astype(np.int64),
                "domain": np.repeat(np.arange(len(arrays)), [len(s[split][1]) for s in arrays.values()]).astype(
                    np.int16
                ),
            }
            for part, array in parts.items():
                array = np.ascontiguousarray(array)
                digest.update(f"{split} {part} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
                np.save(temporary / f"{split}_{part}.npy", array, allow_pickle=False)
        meta = {
            "name": name,
            "domains": list(arrays),
            "classes": list(classes),
            "mean": list(mean),
            "std": list(std),
            "digest": digest.hexdigest(),
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        return cls(folder)

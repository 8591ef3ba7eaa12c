"""A data set is a folder of arrays: uint8 images mapped into memory, shared by all workers without a copy.

<folder>/meta.json                      names, normalization, checksum
<folder>/{train,test}_{x,y,domain}.npy  all domains concatenated, in the order of meta.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.images import ImageFiles
from fedsim.errors import DataError, StorageError

SPLITS = ("train", "test")
DTYPES = ("uint8", "float32", "int64")  # images, features, tokens
BLOCK = 256  # examples copied at a time
# domain -> split -> (examples, labels)
Arrays = Mapping[str, Mapping[str, tuple[np.ndarray | ImageFiles, np.ndarray]]]


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
            self.groups: dict[str, list[int]] = meta.get("groups", {})
            self.digest: str = meta["digest"]
            self._check_whole()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.folder}: not a built data set ({error}); remove the folder and it is built anew"
            ) from None

    def _check_whole(self) -> None:
        for split in SPLITS:
            x, y, domain = (getattr(self, f"{part}_{split}") for part in ("x", "y", "domain"))
            if not len(x) == len(y) == len(domain) > 0:
                raise ValueError(f"{split}: {len(x)} examples, {len(y)} labels, {len(domain)} domains")
            for what, array, count in (("labels", y, len(self.classes)), ("domains", domain, len(self.domains))):
                if array.dtype.kind != "i" or array.min() < 0 or array.max() >= count:
                    raise ValueError(f"{split}: {what} are {array.dtype} from {array.min()} to {array.max()}")

    def verify(self) -> None:
        """Read everything and compare its checksum: what ``__init__`` is too quick for.

        Raises:
            DataError: the arrays are not those that were written.
        """
        digest = hashlib.sha256()
        for split in SPLITS:
            for part in ("x", "y", "domain"):
                array = getattr(self, f"{part}_{split}")
                digest.update(f"{split} {part} {array.dtype} {array.shape}".encode())
                for start in range(0, len(array), BLOCK):
                    digest.update(np.ascontiguousarray(array[start : start + BLOCK]).data)
        if digest.hexdigest() != self.digest:
            raise DataError(f"{self.folder}: damaged, its checksum differs; remove the folder and it is built anew")

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
        """Positions (int64) of a domain's examples in a split.

        Raises:
            DataError: no such domain or split.
        """
        if (domain, split) not in self._ranges:
            known = f"domains {', '.join(self.domains)}; splits {', '.join(SPLITS)}"
            raise DataError(f"{self.name}: no domain '{domain}' with a split '{split}'; it has {known}")
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
        *,
        groups: Mapping[str, Sequence[int]] | None = None,
        tick: Callable[[int], None] = lambda count: None,
    ) -> Dataset:
        """Write arrays as a data set and open it. The folder appears whole or not at all.

        Examples are copied a block at a time, so that ``ImageFiles`` larger than the memory will do.

        Args:
            folder: new, empty, or an older data set, which is replaced.
            groups: of domains whose training examples belong to someone (a speaker, a writer): how many belong to
                the first, to the second, ..., in the order of the examples.
            tick: called with the number of examples written.

        Raises:
            DataError: arrays that make no data set (named by domain and split), or a folder with other things in it.
            StorageError: the disk is full or read-only; nothing is left there.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "meta.json").exists():
            raise DataError(f"{folder}: holds something that is no data set; name a new or an empty folder")
        _check(name, arrays, len(classes))
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            meta = {
                "name": name,
                "domains": list(arrays),
                "classes": list(classes),
                "mean": list(mean),
                "std": list(std),
                "groups": {domain: list(map(int, sizes)) for domain, sizes in (groups or {}).items()},
                "digest": _write(temporary, arrays, tick),
            }
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
            _publish(temporary, folder)
        except OSError as error:
            raise StorageError(folder, error.strerror, "set FEDSIM_CACHE to a folder with room") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(folder)


def _check(name: str, arrays: Arrays, classes: int) -> None:
    if not arrays:
        raise DataError(f"{name}: no domains")
    first = next(iter(next(iter(arrays.values())).values()))[0]
    for domain, splits in arrays.items():
        for split in SPLITS:
            where = f"{name}, domain '{domain}', {split}"
            if split not in splits or not len(splits[split][1]):
                raise DataError(f"{where}: no examples; every domain needs some for training and some for testing")
            x, y = splits[split]
            if len(x) != len(y):
                raise DataError(f"{where}: {len(x)} examples but {len(y)} labels")
            if str(x.dtype) not in DTYPES or (x.dtype, x.shape[1:]) != (first.dtype, first.shape[1:]):
                expected = (
                    f"{first.dtype} {tuple(first.shape[1:])}, as the first domain, and one of {', '.join(DTYPES)}"
                )
                raise DataError(f"{where}: examples are {x.dtype} {tuple(x.shape[1:])}, expected {expected}")
            if y.dtype.kind not in "iu" or not (y.min() >= 0 and y.max() < classes):
                raise DataError(
                    f"{where}: labels are {y.dtype} from {y.min()} to {y.max()}, expected integers 0 to {classes - 1}"
                )


def _write(folder: Path, arrays: Arrays, tick: Callable[[int], None]) -> str:
    """The .npy files; returns the SHA-256 of what is in them."""
    digest = hashlib.sha256()
    for split in SPLITS:
        pairs = [splits[split] for splits in arrays.values()]
        sizes = [len(y) for _, y in pairs]
        first = pairs[0][0]
        shape = (sum(sizes), *first.shape[1:])
        head = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
        digest.update(f"{split} x {first.dtype} {shape}".encode())
        # Written, not mapped: a full disk is an error of write, but a deadly signal in a mapping.
        with open(folder / f"{split}_x.npy", "wb") as out:
            np.lib.format.write_array_header_1_0(out, head)
            for x, _ in pairs:
                for start in range(0, len(x), BLOCK):
                    block = np.ascontiguousarray(x[start : start + BLOCK])
                    out.write(block.data)
                    digest.update(block.data)
                    tick(len(block))
        labels = np.concatenate([y for _, y in pairs]).astype(np.int64)
        numbers = np.repeat(np.arange(len(pairs), dtype=np.int16), sizes)
        for part, array in (("y", labels), ("domain", numbers)):
            digest.update(f"{split} {part} {array.dtype} {array.shape}".encode())
            digest.update(array.data)
            np.save(folder / f"{split}_{part}.npy", array, allow_pickle=False)
    return digest.hexdigest()


def _publish(temporary: Path, folder: Path) -> None:
    """Move a finished data set to its place, unless another process has just put the same one there."""
    if (folder / "meta.json").exists():
        if (folder / "meta.json").read_bytes() == (temporary / "meta.json").read_bytes():
            return
        shutil.rmtree(folder)
    os.replace(temporary, folder)

"""Checkpoints: the server's state as safetensors beside a JSON file with its checksum; written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fedsim.errors import DataError, StorageError
from fedsim.types import Tensors


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside ``path``, sync, rename: a reader sees the old file or the new one.

    Raises:
        StorageError: the disk is full or read-only, or a folder lies there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(path, error.strerror) from None


def state_sha256(state: Tensors) -> str:
    """Checksum of a state: names sorted; name, dtype, shape and raw bytes of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds beside the clients' private state: ``record`` is whatever else resumes the run."""

    round: int
    state: Tensors
    record: dict[str, Any]


def _header_sha256(header: dict[str, Any]) -> str:
    """Of everything in it but the checksum itself, as it reads back from the file."""
    as_read = json.loads(json.dumps(header))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoint folder of a run; keeps the newest ``keep``."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def save(self, snapshot: Snapshot) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save({n: v.contiguous() for n, v in snapshot.state.items()})
        name = f"round-{snapshot.round:06d}"
        header = {
            "round": snapshot.round,
            "names": list(snapshot.state),  # in order: the file has another one, and sums over tensors depend on it
            "sha256": hashlib.sha256(data).hexdigest(),
            "state_sha256": state_sha256(snapshot.state),
            "record": snapshot.record,
        }
        header["header_sha256"] = _header_sha256(header)
        write_atomically(self.folder / f"{name}.safetensors", data)
        # The header comes last: a checkpoint without one was cut short and is never read.
        write_atomically(self.folder / f"{name}.json", json.dumps(header, indent=1).encode())
        for old in self.rounds()[: -self.keep]:
            for suffix in ("json", "safetensors"):
                (self.folder / f"round-{old:06d}.{suffix}").unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, ascending."""
        names = (re.fullmatch(r"round-(-?\d+)\.json", p.name) for p in self.folder.glob("round-*.json"))
        return sorted(int(name[1]) for name in names if name)

    def load(self, round: int) -> Snapshot:
        """Read one checkpoint.

        Raises:
            DataError: it is damaged; the message names the file and the checkpoint before it, if there is one.
        """
        path = self.folder / f"round-{round:06d}.json"
        earlier = [r for r in self.rounds() if r < round]
        offer = (
            f"; the one before is round {earlier[-1]} (resume --round {earlier[-1]})"
            if earlier
            else self._others(round)
        )
        try:
            header = json.loads(path.read_text())
            data = path.with_suffix(".safetensors").read_bytes()
            claimed = header.pop("header_sha256")
            wanted, number, record = header["sha256"], int(header["round"]), header["record"]
            names = header["names"]
        except OSError as error:
            raise DataError(f"{path}: the checkpoint cannot be read ({error.strerror}){offer}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged, no header of a checkpoint ({error}){offer}") from None
        if claimed != _header_sha256(header):
            raise DataError(f"{path}: damaged, its checksum differs{offer}")
        if hashlib.sha256(data).hexdigest() != wanted:
            raise DataError(f"{path.with_suffix('.safetensors')}: damaged, its checksum differs{offer}")
        tensors = load(data)
        return Snapshot(number, {n: tensors[n] for n in names}, record)

    def _others(self, round: int) -> str:
        others = ", ".join(str(r) for r in self.rounds() if r != round)
        return f"; there are checkpoints of round {others}" if others else "; there is no other: start the run anew"

    def newest(self) -> Snapshot | None:
        rounds = self.rounds()
        return self.load(rounds[-1]) if rounds else None

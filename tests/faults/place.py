"""Where a case plays: a folder with a good configuration, good data and a good run, for the case to spoil."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.forked import fedsim_command

CONFIG = """name = "bars"
rounds = 3
[federation]
dataset = "folder"
root = "{root}"
image-size = 12
[training]
batch-size = 8
lr = 0.05
[algorithm]
strategy = "{strategy}"
[simulation]
workers = 0
[checkpoint]
every = 1
"""
DOMAINS, CLASSES = ("photo", "sketch"), ("ant", "bee", "cow")


def write_tree(root: Path, per_class: int = 8) -> None:
    """<root>/<domain>/<class>/*.png of bars whose place is the class, and the lists of the splits."""
    draw = np.random.default_rng(0)
    for number, domain in enumerate(DOMAINS):
        lists: dict[str, list[str]] = {"train": [], "test": []}
        for label, name in enumerate(CLASSES):
            (root / domain / name).mkdir(parents=True)
            for i in range(per_class):
                image = draw.normal(80 + 60 * number, 15, (12, 12, 3))
                image[:, label * 4 : label * 4 + 4] += 60
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / domain / name / f"{i}.png")
                lists["test" if i < 2 else "train"].append(f"{domain}/{name}/{i}.png {label}")
        for split, lines in lists.items():
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")


class Place:
    """A folder of its own for a case.

    Attributes:
        config: a configuration that runs.
        tree: the data it names.
        run: a finished run of it, with checkpoints of rounds 2 and 3.
        out: where a case's own run would go; not there yet.
    """

    def __init__(self, root: Path):
        self.root = root
        self.config, self.tree, self.run, self.out = (root / n for n in ("c.toml", "tree", "run", "out"))

    @classmethod
    def build(cls, root: Path, strategy: str = "fedbn") -> Place:
        place = cls(root)
        write_tree(place.tree)
        place.config.write_text(CONFIG.format(root=place.tree, strategy=strategy))
        done = fedsim_command("run", place.config, "--out", place.run, environment=place.environment)
        assert done.code == 0, done.err
        return place

    def copy(self, root: Path) -> Place:
        """The same in another folder; the configurations name the data there."""
        shutil.copytree(self.root, root, symlinks=True, dirs_exist_ok=True)
        place = Place(root)
        for file in (place.config, place.run / "config.toml"):
            file.write_text(file.read_text().replace(str(self.root), str(root)))
        return place

    @property
    def environment(self) -> dict[str, str]:
        return {"FEDSIM_CACHE": str(self.root / "cache")}

    def set(self, text: str) -> None:
        """Write the configuration anew: keys of the top level, before those that are there."""
        self.config.write_text(text)

    @property
    def checkpoint(self) -> Path:
        """The newest one, without its suffix."""
        return self.run / "checkpoints" / "round-000003"


def flip(path: Path, where: float = 0.5) -> None:
    """Turn one bit over, at this share of the file."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def folder_for(path: Path) -> None:
    """Put a folder where the file was."""
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    (path / "kept").write_text("")


CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind} on {target}")


def own_mounts() -> None:
    """Give this process mounts that nobody else sees; as root, or in a user namespace where the system allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) and libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount("none", "/", "none", MS_REC | MS_PRIVATE)


def full_disk(path: str, kilobytes: int) -> None:
    """Mount a disk of so many kB at a folder: it fills for real."""
    own_mounts()
    os.makedirs(path, exist_ok=True)
    _mount("tmpfs", path, "tmpfs", 0, f"size={kilobytes}k")


def read_only(path: str) -> None:
    """Mount a folder onto itself, read-only: it binds root too."""
    own_mounts()
    _mount(path, path, "none", MS_BIND)
    _mount("none", path, "none", MS_REMOUNT | MS_BIND | MS_RDONLY)


def make_room(path: str) -> None:
    """Enlarge the disk that is there."""
    _mount("none", path, "tmpfs", MS_REMOUNT, "size=64m")

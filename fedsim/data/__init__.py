"""Data sets by name, partitions, and both from a configuration."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedsim.config import Config
from fedsim.data import fedbn
from fedsim.data.dataset import Arrays, Dataset, cache_folder
from fedsim.data.digits import load_digits
from fedsim.data.idx import load_idx
from fedsim.data.partition import Partition, hold_out, partition, set_apart
from fedsim.data.progress import bar
from fedsim.data.roles import load_roles
from fedsim.data.tree import load_tree
from fedsim.errors import ConfigError

NAMES = ("digits", "digits-five", "office-caltech-10", "domainnet-10", "folder", "idx", "roles")
IMAGE_SIZE = {"office-caltech-10": 256, "domainnet-10": 256, "folder": 64}
# FedBN scales digits to -1..1 and gives Office-Caltech-10 and DomainNet-10 to the network as 0..1.
Channels = tuple[float, ...]
CENTRED: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PLAIN: tuple[Channels, Channels] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def load_dataset(
    name: str,
    root: str | Path | None = None,
    seed: int = 0,
    *,
    image_size: int = 0,
    train_per_domain: int | None = None,
    domains: Sequence[str] = (),
    progress: bool = True,
) -> Dataset:
    """A data set by name; the user's own are read from ``root`` once and cached by the names, sizes and times of its
    files.

    Args:
        seed: draws the digits suite, and the split of a folder tree without split lists.
        image_size: pixels a side of the user's own images; 0: that of the papers (28 for digits, 256 for Office and
            DomainNet), 64 for folders.
        train_per_domain, domains: of the digits suite, see ``load_digits``.

    Raises:
        ConfigError: an unknown name, an option of another data set, or no root where one is needed.
        DataError: what is in the root is not what was expected.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(NAMES)}"
        raise ConfigError(f"federation.dataset = '{name}': no such data set; {hint}")
    if name == "digits":
        return load_digits(seed, train_per_domain, domains, progress=progress)
    if train_per_domain is not None or domains:
        raise ConfigError(f"'{name}': train_per_domain and domains are options of 'digits' alone")
    if not root:
        raise ConfigError(f"federation.dataset = '{name}': set federation.root to the folder of your copy")
    folder, size = Path(root).expanduser(), image_size or IMAGE_SIZE.get(name, 28)
    cached = cache_folder() / f"{name}-{_fingerprint(folder, f'{name} {size} {seed}')}"
    if (cached / "meta.json").exists():
        return Dataset(cached)
    if name == "roles":
        text, characters, groups = load_roles(folder)
        return Dataset.from_arrays(name, cached, text, characters, groups=groups)
    arrays, classes, (mean, std) = _read(name, folder, size, seed)
    total = sum(len(y) for splits in arrays.values() for _, y in splits.values())
    with bar(f"reading {name}, once", total, show=progress) as tick:
        return Dataset.from_arrays(name, cached, arrays, classes, mean, std, tick=tick)


def _read(name: str, root: Path, size: int, seed: int) -> tuple[Arrays, tuple[str, ...], tuple[Channels, Channels]]:
    """(arrays, classes, (mean, std))."""
    if name == "digits-five":
        return *fedbn.load_digits_five(root), CENTRED
    if name == "office-caltech-10":
        return *fedbn.load_office(root, size, seed), PLAIN
    if name == "domainnet-10":
        return *fedbn.load_domainnet(root, size), PLAIN
    if name == "idx":
        return *load_idx(root), (CENTRED[0][:1], CENTRED[1][:1])
    return *load_tree(root, size, seed), CENTRED


def _fingerprint(root: Path, what: str) -> str:
    """Hash of the files under a root by name, size and time of change."""
    digest = hashlib.sha256(f"{what} {root.resolve()}".encode())
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        status = file.stat()
        digest.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def from_config(config: Config) -> tuple[Dataset, Partition]:
    """The data set and the shards that a configuration asks for.

    Raises:
        ConfigError, DataError: see ``load_dataset`` and ``partition``.
    """
    federation = config.federation
    dataset = load_dataset(federation.dataset, federation.root, image_size=federation.image_size)
    names = [d.strip() for d in federation.domains.split(",") if d.strip()] or list(dataset.domains)
    if federation.leave_out:
        if federation.leave_out not in names or len(names) == 1:
            found = f"federation.leave-out = '{federation.leave_out}'"
            raise ConfigError(f"{found}: expected one of two or more domains: {', '.join(names)}")
        names.remove(federation.leave_out)
    shards = partition(
        dataset,
        names,
        federation.partition,
        federation.clients_per_domain,
        config.seed,
        across=federation.across,
        alpha=federation.alpha,
        classes_per_client=federation.classes_per_client,
        power=federation.power,
        min_examples=federation.min_examples,
        examples_per_client=federation.examples_per_client,
    )
    return dataset, shards


__all__ = [
    "NAMES",
    "Dataset",
    "Partition",
    "cache_folder",
    "from_config",
    "hold_out",
    "load_dataset",
    "partition",
    "set_apart",
]

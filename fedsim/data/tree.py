"""A folder tree <root>/<domain>/<class>/*.png|jpg: PACS, Office-Home, Office-Caltech-10, a user's own.

A domain's split is read from <root>/<domain>_train.txt and <domain>_test.txt where these exist (a line is
"relative/path label"); otherwise a fifth of each class, chosen by the seed, is the test split, and the program says so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedsim.data.dataset import SPLITS, Arrays
from fedsim.data.images import SUFFIXES, ImageFiles, inside, need_folder
from fedsim.errors import DataError
from fedsim.random import generator

TEST_SHARE = 0.2
Listing = list[tuple[Path, int]]


def _folders(path: Path, what: str) -> list[str]:
    found = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{path}: no {what}")
    return found


def list_images(root: Path, domain: str, classes: Sequence[str], aliases: Mapping[str, str]) -> Listing:
    """Every image of a domain with its label, in the order of class and file name.

    Raises:
        DataError: an unknown class, or no image at all.
    """
    listing: Listing = []
    for folder in _folders(root / domain, f"class folders; expected {domain}/<class>/*.png or *.jpg"):
        files = sorted(f for f in (root / domain / folder).iterdir() if f.suffix.lower() in SUFFIXES)
        label = _label(root / domain / folder, classes, aliases)
        listing += [(inside(root, str(f.relative_to(root))), label) for f in files]
    if not listing:
        raise DataError(f"{root / domain}: no images; expected <class>/*{'|*'.join(SUFFIXES)}")
    return listing


def _label(folder: Path, classes: Sequence[str], aliases: Mapping[str, str]) -> int:
    name = aliases.get(folder.name, folder.name)
    if name not in classes:
        raise DataError(f"{folder}: unknown class '{folder.name}'; expected one of {', '.join(classes)}")
    return classes.index(name)


def read_list(root: Path, file: Path, classes: Sequence[str], aliases: Mapping[str, str]) -> Listing:
    """A split list: "relative/path label" a line.

    An image's class is the folder it lies in. Lists count their labels from 0 or from 1 (PACS), in the order of the
    folders or another; all that is asked of the numbers is that each stands for one folder.

    Raises:
        DataError: a line that is not that, an unknown class, a number that stands for two, a path out of the root.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a list ({error})") from None
    listing: Listing = []
    folder_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(f"{file}, line {number}: expected 'relative/path label', found {line.strip()!r}")
        image, folder = inside(root, path.strip()), Path(path).parent
        if folder_of.setdefault(label, folder.name) != folder.name:
            raise DataError(
                f"{file}, line {number}: label {label} is '{folder.name}' here and '{folder_of[label]}' above; expected"
                " one class folder a label"
            )
        listing.append((image, _label(root / folder, classes, aliases)))
    return listing


def split_listing(listing: Listing, seed: int, domain: int) -> dict[str, Listing]:
    """Stratified: of every class a fifth, rounded, for testing."""
    draw = generator(seed, client=domain, purpose="partition")
    labels = np.array([label for _, label in listing])
    out: dict[str, Listing] = {split: [] for split in SPLITS}
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        count = round(TEST_SHARE * len(rows))
        out["test"] += [listing[i] for i in sorted(rows[:count])]
        out["train"] += [listing[i] for i in sorted(rows[count:])]
    return out


def load_tree(
    root: Path,
    size: int,
    seed: int,
    domains: Sequence[str] = (),
    classes: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> tuple[Arrays, tuple[str, ...]]:
    """(examples by domain and split, classes).

    Args:
        domains, classes: those expected, in this order; empty: the folders found, sorted.
        aliases: other spellings of class folders.

    Raises:
        DataError: see the functions above.
    """
    need_folder(root, "domain folders inside: <domain>/<class>/*.png or *.jpg")
    domains = domains or _folders(root, "domain folders; expected <domain>/<class>/*.png or *.jpg inside")
    for domain in domains:
        need_folder(root / domain, "class folders inside: <class>/*.png or *.jpg")
    if not classes:
        wanted = "class folders; expected {0}/<class>/*.png or *.jpg"
        classes = sorted({name for d in domains for name in _folders(root / d, wanted.format(d))})
    arrays = {}
    for number, domain in enumerate(domains):
        splits = _splits(root, domain, number, tuple(classes), aliases or {}, seed)
        arrays[domain] = {
            split: (ImageFiles([path for path, _ in listing], size), np.array([y for _, y in listing], np.int64))
            for split, listing in splits.items()
        }
    return arrays, tuple(classes)


def _splits(
    root: Path, domain: str, number: int, classes: Sequence[str], aliases: Mapping[str, str], seed: int
) -> dict[str, Listing]:
    lists = {split: root / f"{domain}_{split}.txt" for split in SPLITS}
    missing = [file for file in lists.values() if not file.exists()]
    if len(missing) == 1:
        raise DataError(f"{missing[0]}: does not exist, while its companion does; expected both lists or neither")
    if not missing:
        return {split: read_list(root, file, classes, aliases) for split, file in lists.items()}
    note = f"{root / domain}: no split lists; a fifth of each class, drawn with seed {seed}, is the test split"
    print(note, file=sys.stderr)
    return split_listing(list_images(root, domain, classes, aliases), seed, number)

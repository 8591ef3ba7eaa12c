"""A folder tree <root>/<domain>/<class>/*.png|jpg: PACS, Office-Home, DomainNet, Office-Caltech-10, a user's own.

A domain's split is read from <root>/<domain>_train.txt and <domain>_test.txt where these exist (a line is
"relative/path label"); otherwise a fifth of each class, chosen by the seed, is the test split, and the program says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.data.images import SUFFIXES, inside, need_folder, read_images
from fedsim.errors import DataError
from fedsim.random import generator

TEST_SHARE = 0.2
Listing = list[tuple[Path, int]]


def find_classes(root: Path, domains: tuple[str, ...]) -> tuple[str, ...]:
    """Class folders of all domains together, sorted.

    Raises:
        DataError: a domain has no class folder.
    """
    names: set[str] = set()
    for domain in domains:
        here = {p.name for p in (root / domain).iterdir() if p.is_dir() and not p.name.startswith(".")}
        if not here:
            raise DataError(f"{root / domain}: no class folders; expected {domain}/<class>/*.png or *.jpg")
        names |= here
    return tuple(sorted(names))


def find_domains(root: Path) -> tuple[str, ...]:
    found = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not found:
        raise DataError(f"{root}: no domain folders; expected <domain>/<class>/*.png or *.jpg inside")
    return found


def list_images(root: Path, domain: str, classes: tuple[str, ...]) -> Listing:
    """Every image of a domain with its label, in the order of class and file name.

    Raises:
        DataError: an unknown class, or no image at all.
    """
    listing: Listing = []
    for folder in sorted(p for p in (root / domain).iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in classes:
            raise DataError(f"{folder}: unknown class '{folder.name}'; expected one of {', '.join(classes)}")
        label = classes.index(folder.name)
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        listing += [(inside(root, str(f.relative_to(root))), label) for f in files]
    if not listing:
        raise DataError(f"{root / domain}: no images; expected <class>/*{'|*'.join(SUFFIXES)}")
    return listing


def read_list(root: Path, file: Path, count: int) -> Listing:
    """A split list: "relative/path label" a line, labels from 0.

    Raises:
        DataError: a line that is not that, a label outside the classes (lists of PACS count from 1), a path out of
            the root.
    """
    listing: Listing = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.lstrip("-").isdigit():
            raise DataError(f"{file}, line {number}: expected 'relative/path label', found {line.strip()!r}")
        if not 0 <= int(label) < count:
            raise DataError(
                f"{file}, line {number}: label {label}, expected 0 to {count - 1} (PACS's lists count from 1)"
            )
        listing.append((inside(root, path), int(label)))
    return listing


def split_listing(listing: Listing, seed: int, domain: int) -> dict[str, Listing]:
    """Stratified: of every class a fifth, rounded, for testing."""
    draw = generator(seed, client=domain, purpose="partition")
    labels = np.array([label for _, label in listing])
    out: dict[str, Listing] = {"train": [], "test": []}
    for label in np.unique(labels):
        rows = draw.permutation(np.flatnonzero(labels == label))
        count = round(TEST_SHARE * len(rows))
        out["test"] += [listing[i] for i in sorted(rows[:count])]
        out["train"] += [listing[i] for i in sorted(rows[count:])]
    return out


def load_tree(
    root: Path, size: int, seed: int, domains: tuple[str, ...] = (), classes: tuple[str, ...] = ()
) -> tuple[dict[str, dict[str, tuple[np.ndarray, np.ndarray]]], tuple[str, ...]]:
    """(arrays by domain and split, classes).

    Raises:
        DataError: see the functions above.
    """
    need_folder(root, "domain folders inside: <domain>/<class>/*.png or *.jpg")
    domains = domains or find_domains(root)
    for domain in domains:
        need_folder(root / domain, "class folders inside: <class>/*.png or *.jpg")
    classes = classes or find_classes(root, domains)
    arrays = {}
    for number, domain in enumerate(domains):
        lists = {s: root / f"{domain}_{s}.txt" for s in ("train", "test")}
        if all(f.exists() for f in lists.values()):
            splits = {s: read_list(root, f, len(classes)) for s, f in lists.items()}
        else:
            print(f"{root / domain}: no split lists; a fifth of each class, drawn with seed {seed}, is the test split")
            splits = split_listing(list_images(root, domain, classes), seed, number)
        arrays[domain] = {
            split: (read_images([p for p, _ in listing], size), np.array([y for _, y in listing], np.int64))
            for split, listing in splits.items()
        }
    return arrays, classes

"""Plays by role: one speaker, one client; the next character is to be predicted (LEAF's Shakespeare).

Two formats: ``.jsonl`` (or ``.jsonl.gz``) with one object {"play", "role", "text"} a line, or plain text in which a
speech is a line "Name:" followed by its lines and an empty line. A role's first four fifths train, its last tests.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedsim.data.dataset import Arrays
from fedsim.errors import DataError

LENGTH = 80  # characters of an example
LEAST = 1000  # of a role; smaller ones are left out
DOMAIN = "plays"


def read_roles(path: Path) -> dict[str, str]:
    """{"play / role": everything the role says}.

    Raises:
        DataError: the file cannot be read, or is neither format; line and reason.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    roles: dict[str, list[str]] = {}
    for name, speech in _json_lines(path, text) if ".jsonl" in path.suffixes else _speeches(text):
        roles.setdefault(name, []).append(speech)
    return {name: "\n".join(speeches) for name, speeches in roles.items()}


def _json_lines(path: Path, text: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            entry = json.loads(line)
            yield f"{entry['play']} / {entry['role']}", str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: expected an object {{"play", "role", "text"}}, found {line[:40]!r} ({error})'
            ) from None


def _speeches(text: str) -> Iterable[tuple[str, str]]:
    for block in text.replace("\r\n", "\n").split("\n\n"):
        name, _, speech = block.strip().partition("\n")
        if name.endswith(":") and speech:
            yield name[:-1], speech


def load_roles(path: Path) -> tuple[Arrays, tuple[str, ...], dict[str, list[int]]]:
    """(arrays of the one domain, characters, how many training examples each role has).

    Examples are int64 [N, 80] and labels int64 [N, 80], the same text one character on; a role's examples lie together.

    Raises:
        DataError: see ``read_roles``; or no role is long enough.
    """
    roles = {n: t for n, t in read_roles(path).items() if len(t) >= LEAST}
    if not roles:
        raise DataError(f"{path}: no role of at least {LEAST} characters (speeches as 'Name:' and lines, or .jsonl)")
    characters = sorted(set("".join(roles.values())))
    number = {c: i for i, c in enumerate(characters)}
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for text in roles.values():
        codes = np.array([number[c] for c in text], np.int64)
        cut = len(codes) * 4 // 5
        for split, piece in (("train", codes[:cut]), ("test", codes[cut:])):
            count = (len(piece) - 1) // LENGTH
            rows = np.arange(count)[:, None] * LENGTH + np.arange(LENGTH + 1)
            parts[split].append(piece[rows])  # [count, 81]
    splits = {s: np.concatenate(p) for s, p in parts.items()}
    arrays = {DOMAIN: {s: (p[:, :-1], p[:, 1:]) for s, p in splits.items()}}
    return arrays, tuple(characters), {DOMAIN: [len(p) for p in parts["train"]]}

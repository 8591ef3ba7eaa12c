"""Reading a user's images: every path stays inside its root, every failure names the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, symbolic links resolved.

    Raises:
        DataError: it leads out of the root.
    """
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{root}: '{relative}' leads out of this folder; only files inside it are read")
    return path


def read_image(path: Path, size: int) -> np.ndarray:
    """uint8 [3, size, size], bilinear, grey images repeated over the channels.

    Raises:
        DataError: missing, or no image.
    """
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(resized, np.uint8).transpose(2, 0, 1)
    except FileNotFoundError:
        raise DataError(f"{path}: this image is listed but does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a broken PNG is a SyntaxError
        raise DataError(f"{path}: cannot be read as an image ({error}); mend the file or take it out") from None


class ImageFiles:
    """Images on disk in the shape of an array, uint8 [N, 3, size, size]; files are read when a slice is taken."""

    dtype = np.dtype(np.uint8)

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.paths), 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack([read_image(path, self.size) for path in self.paths[rows]])


def need_folder(path: Path, what: str) -> Path:
    """``path`` if it is a folder.

    Raises:
        DataError: it is not; ``what`` says what was expected there.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise DataError(f"{path}: {found}; expected a folder with {what}")
    return path

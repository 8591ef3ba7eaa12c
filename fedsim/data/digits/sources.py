"""What lies in the pack: fonts, photographs, textures, real digits (``pack/README.md`` has origins and licences)."""

from __future__ import annotations

import functools
import io
import math
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

PACK = Path(__file__).parents[1] / "pack"
# Thin, hand-drawn and script faces that nobody screws to a house.
NOT_ON_HOUSES = (
    "AmaticSC",
    "Intuitive",
    "permanent-marker",
    "Manrope-Light",
    "oswald-300",
    "roboto-slab-300",
    "cmtt10",
    "SpaceMono",
    "CascadiaMono",
)
# Train crops come from the left of every photograph and texture, test crops from the right, with a gap between.
REGIONS = {"train": (0.0, 0.62), "test": (0.66, 1.0)}


class Fonts:
    """83 faces cut to the ten digits."""

    def __init__(self) -> None:
        archive = zipfile.ZipFile(PACK / "digit_fonts.zip")
        self.names = sorted(n for n in archive.namelist() if n.endswith(".ttf"))
        self._data = [archive.read(n) for n in self.names]
        manifest = archive.read("MANIFEST.tsv").decode().splitlines()
        faces = dict(line.split("\t")[:2] for line in manifest if "\t" in line)
        label = lambda n: n + " " + faces.get(Path(n).stem, "")  # noqa: E731
        self.on_houses = [i for i, n in enumerate(self.names) if not any(bad in label(n) for bad in NOT_ON_HOUSES)]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (one instance a process)
    def face(self, font: int, pixels: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(io.BytesIO(self._data[font]), pixels)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def ink_box(self, font: int, digit: str) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a digit's ink at 200 pixels."""
        return self.face(font, 200).getbbox(digit)


@functools.cache
def fonts() -> Fonts:
    return Fonts()


@functools.cache
def pictures(kind: str) -> tuple[np.ndarray, ...]:
    """``photo``: seven colour photographs [H, W, 3]; ``texture``: three grey textures [H, W]; uint8."""
    texture = kind == "texture"
    files = [f for f in sorted((PACK / "photos").iterdir()) if f.name.startswith("tex_") == texture]
    return tuple(np.asarray(Image.open(f).convert("L" if texture else "RGB")) for f in files)


def crop(
    draw: np.random.Generator, kind: str, split: str, size: int, zoom: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """A random square crop, sometimes mirrored or transposed, enlarged by a factor log-uniform in ``zoom``."""
    choices = pictures(kind)
    picture = choices[draw.integers(len(choices))]
    height, width = picture.shape[:2]
    left, right = (int(width * share) for share in REGIONS[split])
    side = size
    if zoom != (1.0, 1.0):
        side = round(size / math.exp(draw.uniform(math.log(zoom[0]), math.log(zoom[1]))))
    side = max(4, min(side, right - left, height))
    x, y = draw.integers(left, right - side + 1), draw.integers(0, height - side + 1)
    patch = picture[y : y + side, x : x + side]
    if draw.random() < 0.5:
        patch = patch[:, ::-1]
    if draw.random() < 0.25:
        patch = patch.swapaxes(0, 1)
    patch = np.ascontiguousarray(patch)
    if side == size:
        return patch
    how = Image.Resampling.BICUBIC if side < size else Image.Resampling.BOX
    return np.asarray(Image.fromarray(patch).resize((size, size), how))


def real_digits(file: str, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey digits of the pack scaled to 0..255 uint8 [N, h, w], and labels int64 [N]."""
    with np.load(PACK / file, allow_pickle=False) as data:
        x, y = data["x"], data["y"].astype(np.int64)
    return np.rint(x * (255 / levels)).astype(np.uint8), y

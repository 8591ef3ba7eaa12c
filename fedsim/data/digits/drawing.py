"""Drawing with numpy and Pillow: digit masks, warps, colours, light. Images are float32 in 0..1, [W, W, 3]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fedsim.data.digits.sources import fonts

CANVAS = 96  # images are drawn at this size and reduced at the end


@dataclass(frozen=True)
class Number:
    """A number whose digit at ``position`` is the label and stands in the centre."""

    font: int
    text: str
    position: int
    height: float
    dx: float
    dy: float
    spacing: float


@dataclass(frozen=True)
class Pose:
    """Rotation (degrees), shear, horizontal scale, and the four corners' offsets [4, 2] of a perspective."""

    rotation: float
    shear: float
    corners: np.ndarray
    stretch: float = 1.0


def number_mask(number: Number, stroke: int = 0) -> Image.Image:
    """The number's ink (255) on a canvas twice the size, so that a warp finds something beyond the border."""
    faces, canvas = fonts(), 2 * CANVAS
    digit = number.text[number.position]
    left, top, right, bottom = faces.ink_box(number.font, digit)
    pixels = max(6, round(200 * number.height / max(1.0, bottom - top)))
    face, scale = faces.face(number.font, pixels), pixels / 200
    widths = [faces.face(number.font, 200).getlength(c) * scale for c in number.text]
    steps = [w * (1 + number.spacing) for w in widths]
    at = CANVAS + number.dx - (left + right) / 2 * scale
    y = CANVAS + number.dy - (top + bottom) / 2 * scale
    starts = [
        at + sum(steps[number.position : i]) - (sum(steps[i + 1 : number.position + 1]) if i < number.position else 0)
        for i in range(len(number.text))
    ]
    mask = Image.new("L", (canvas, canvas), 0)
    pen = ImageDraw.Draw(mask)
    for character, x in zip(number.text, starts):
        pen.text((x, y), character, font=face, fill=255, stroke_width=stroke)
    return mask


def warped(image: Image.Image, pose: Pose) -> np.ndarray:
    """Rotate, shear and tilt about the centre; the middle of the canvas as float32 [W, W] in 0..1."""
    n, angle = image.width, math.radians(pose.rotation)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[pose.stretch, pose.shear], [0, 1]])
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float) * n / 4
    target = square @ matrix.T + pose.corners * n / 2
    coefficients = _perspective(square + n / 2, target + CANVAS / 2)  # straight into the middle of the canvas
    size, perspective = (CANVAS, CANVAS), Image.Transform.PERSPECTIVE
    return np.asarray(image.transform(size, perspective, coefficients, Image.Resampling.BICUBIC), np.float32) / 255


def _perspective(source: np.ndarray, target: np.ndarray) -> list[float]:
    """Pillow's eight coefficients of the map target -> source."""
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, float), np.array(values, float)).tolist()


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour [3] in 0..1."""
    sector = int(hue * 6) % 6
    rest = hue * 6 - int(hue * 6)
    p, q, t = value * (1 - saturation), value * (1 - rest * saturation), value * (1 - (1 - rest) * saturation)
    table = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)]
    return np.array(table[sector])


def luminance(colour: np.ndarray) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def ramp(draw: np.random.Generator) -> np.ndarray:
    """A linear gradient [W, W] in a random direction, about -1 to 1."""
    angle, line = draw.uniform(0, 2 * math.pi), np.linspace(-1, 1, CANVAS, dtype=np.float32)
    return line[None, :] * math.cos(angle) + line[:, None] * math.sin(angle)


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))

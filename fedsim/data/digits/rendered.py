"""The three domains that are made: real digits on real photographs, rendered numbers, rendered house numbers.

Each function draws one image from its own generator; the figures in them are the recipe.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fedsim.data.digits.drawing import CANVAS, Number, Pose, hsv, luminance, number_mask, ramp, to_image, warped
from fedsim.data.digits.sources import crop, fonts

Drawn = tuple[np.ndarray, int]  # image uint8 [H, W, 3], label
# Label frequencies of house numbers (those of SVHN's training set), digit 0 to 9.
HOUSE_DIGITS = np.array([4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659], float)
HOUSE_DIGITS /= HOUSE_DIGITS.sum()


def blended(draw: np.random.Generator, split: str, digit: np.ndarray) -> np.ndarray:
    """MNIST-M's recipe (Ganin and Lempitsky 2015): |photograph - digit| per channel; the busier of two crops, often."""
    size = digit.shape[0]
    background = crop(draw, "photo", split, size, (0.4, 1.0))
    if draw.random() < 0.6:
        other = crop(draw, "photo", split, size, (0.4, 1.0))
        if other.std((0, 1)).mean() > background.std((0, 1)).mean():
            background = other
    return np.abs(background.astype(np.int16) - digit[..., None].astype(np.int16)).astype(np.uint8)


def _text(draw: np.random.Generator, lengths: list[float], digits: np.ndarray | None) -> tuple[str, int, int]:
    """(text, position of the label, label): a number of 1 to len(lengths) digits."""
    label = int(draw.choice(10, p=digits))
    count = int(draw.choice(len(lengths), p=lengths)) + 1
    position = int(draw.integers(count))
    text = [str(d) for d in draw.choice(10, count, p=digits)]
    text[position] = str(label)
    return "".join(text), position, label


def synth(draw: np.random.Generator, split: str, size: int) -> Drawn:
    """Rendered numbers after SYN Numbers (Ganin and Lempitsky 2015): fonts, colours, outlines, pose and blur vary."""
    text, position, label = _text(draw, [0.35, 0.4, 0.25], None)
    number = Number(
        font=int(draw.integers(len(fonts().names))),
        text=text,
        position=position,
        height=CANVAS * draw.uniform(0.5, 0.85),
        dx=CANVAS * draw.normal(0, 0.04),
        dy=CANVAS * draw.normal(0, 0.04),
        spacing=draw.uniform(-0.02, 0.15),
    )
    wall, ink = draw.uniform(0, 1, 3), draw.uniform(0, 1, 3)
    while np.abs(ink - wall).sum() <= 0.6 or abs(luminance(ink) - luminance(wall)) <= 0.2:
        wall, ink = draw.uniform(0, 1, 3), draw.uniform(0, 1, 3)
    pose = Pose(draw.normal(0, 7), draw.uniform(-0.1, 0.1), draw.uniform(-0.03, 0.03, (4, 2)))
    pixels = np.broadcast_to(wall.astype(np.float32), (CANVAS, CANVAS, 3)).copy()
    if draw.random() < 0.35:
        pixels += (ramp(draw) * draw.uniform(0.03, 0.18))[..., None]
    if draw.random() < 0.4:
        outline = draw.uniform(0, 1, 3).astype(np.float32)
        cover = warped(number_mask(number, int(draw.integers(2, 6))), pose)[..., None]
        pixels = pixels * (1 - cover) + outline * cover
        if abs(luminance(outline) - luminance(ink)) < 0.12:
            ink = np.clip(ink + (0.3 if luminance(outline) < 0.5 else -0.3), 0, 1)
    cover = warped(number_mask(number), pose)[..., None]
    pixels = pixels * (1 - cover) + ink.astype(np.float32) * cover
    blur = ImageFilter.GaussianBlur(float(min(5, draw.gamma(1.2, 1.3))))
    image = to_image(pixels).filter(blur).resize((size, size), Image.Resampling.LANCZOS)
    out: np.ndarray = np.asarray(image, np.float32)
    if draw.random() < 0.5:
        out = out + draw.normal(0, draw.uniform(0, 6), out.shape)
    return np.clip(out, 0, 255).astype(np.uint8), label


def street(draw: np.random.Generator, split: str, size: int) -> Drawn:
    """Rendered house numbers. An illegible draw is drawn again; 2 % of them are let through, as life does."""
    for _ in range(8):
        image, label, cover = _draw_street(draw, split, size)
        if draw.random() < 0.02 or _legible(image, cover):
            break
    return image, label


def _legible(image: np.ndarray, cover: np.ndarray) -> bool:
    """The ink stands out from the wall around it: 22 grey levels and 1.8 times the spread along the difference."""
    size = len(image)
    ink, near = cover > 128, np.zeros(cover.shape, bool)
    near[size // 10 : -(size // 10), size // 6 : -(size // 6)] = True
    wall = near & (cover < 60)
    if ink.sum() < 12 or wall.sum() < 12:
        return False
    pixels = image.astype(np.float32)
    difference = pixels[ink].mean(0) - pixels[wall].mean(0)
    contrast = float(np.sqrt((difference**2).sum()))
    along = difference / max(contrast, 1e-6)
    spread = math.sqrt(0.5 * ((pixels[wall] @ along).var() + (pixels[ink] @ along).var()))
    return contrast > 22 and contrast > 1.8 * spread


def _draw_street(draw: np.random.Generator, split: str, size: int) -> tuple[np.ndarray, int, np.ndarray]:
    text, position, label = _text(draw, [0.07, 0.33, 0.38, 0.18, 0.04], HOUSE_DIGITS)
    wall, ink = _street_colours(draw)
    cover = _street_number(draw, text, position, label)
    pixels = _wall(draw, split, wall)
    pixels = _paint(draw, pixels, cover, ink)
    image = _camera(draw, _light(draw, pixels), size)
    small = Image.fromarray((cover * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)
    return image, label, np.asarray(small)


def _street_colours(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(wall, ink): mostly muted, often low in contrast, both polarities; walls are often warm."""
    hue = draw.random() if draw.random() < 0.45 else draw.normal(0.09, 0.05) % 1
    value = draw.uniform(0.12, 0.92)
    wall = hsv(hue, float(draw.beta(1.3, 4) * 0.9), value)
    lighter = draw.random() < (0.75 if value < 0.45 else 0.3 if value < 0.65 else 0.12)
    step = draw.uniform(0.12, 0.62)
    ink_value = float(np.clip(value + step if lighter else value - step, 0.03, 0.98))
    ink_hue = draw.random() if draw.random() < 0.5 else hue
    saturation = float(draw.beta(1, 5) if draw.random() < 0.8 else draw.uniform(0.3, 0.9))
    ink = hsv(ink_hue, saturation, ink_value)
    if abs(luminance(ink) - luminance(wall)) < 0.1:
        ink = np.clip(ink + (0.2 if lighter else -0.2), 0, 1)
    return wall.astype(np.float32), ink.astype(np.float32)


def _street_number(draw: np.random.Generator, text: str, position: int, label: int) -> np.ndarray:
    """Cover of the ink [W, W]: bold, worn, hollow or plain, seen at an angle."""
    font = int(draw.choice(fonts().on_houses))
    stretch = float(np.clip(math.exp(draw.normal(0, 0.17)), 0.65, 1.45))
    left, top, right, bottom = fonts().ink_box(font, str(label))
    aspect = stretch * (right - left) / max(1.0, bottom - top)
    height = min(CANVAS * draw.uniform(0.55, 1.0), CANVAS * 0.95 / max(aspect, 0.3))
    dx, dy = CANVAS * draw.normal(0, 0.045), CANVAS * draw.normal(0, 0.05)
    number = Number(font, text, position, height, dx, dy, draw.uniform(-0.06, 0.3))
    bold = int(draw.integers(1, 5)) if draw.random() < 0.35 else 0
    mask = number_mask(number, bold)
    if bold > 1 and draw.random() < 0.25:
        mask = ImageChops.subtract(mask, number_mask(number))
    elif not bold and draw.random() < 0.25:
        mask = mask.filter(ImageFilter.MinFilter(3))
    rotation = draw.normal(0, 5) if draw.random() < 0.8 else draw.normal(0, 14)
    tilt = draw.uniform(0, 0.1)
    pose = Pose(rotation, draw.normal(0, 0.12), draw.uniform(-tilt, tilt, (4, 2)), stretch)
    return warped(mask, pose)


def _wall(draw: np.random.Generator, split: str, colour: np.ndarray) -> np.ndarray:
    """Wall with a plaque, boards or nothing, and a texture of stone or of a photograph."""
    pixels = np.broadcast_to(colour, (CANVAS, CANVAS, 3)).copy()
    kind = draw.random()
    if kind < 0.28:
        plaque = Image.new("L", (CANVAS, CANVAS), 0)
        x = (0.5 - draw.uniform(0.35, 1.1)) * CANVAS, (0.5 + draw.uniform(0.35, 1.1)) * CANVAS
        y = (0.5 - draw.uniform(0.4, 0.62)) * CANVAS, (0.5 + draw.uniform(0.4, 0.62)) * CANVAS
        pen = ImageDraw.Draw(plaque)
        (pen.rectangle if draw.random() < 0.75 else pen.ellipse)((x[0], y[0], x[1], y[1]), fill=255)
        inside = np.asarray(plaque, np.float32)[..., None] / 255
        around = np.clip(colour + draw.uniform(-0.45, 0.45) + draw.normal(0, 0.05, 3), 0, 1).astype(np.float32)
        pixels = pixels * inside + around * (1 - inside)
    elif kind < 0.45:
        line = np.repeat(np.linspace(-1, 1, CANVAS, dtype=np.float32)[:, None], CANVAS, 1)
        line = ramp(draw) if draw.random() < 0.5 else line
        line = line.T if draw.random() < 0.4 else line
        boards = ((line / draw.uniform(0.5, 1.6) + draw.uniform(0, 1)) % 1) < draw.uniform(0.06, 0.4)
        pixels += boards[..., None] * np.float32(draw.uniform(-0.3, 0.2))
    surface = draw.random()
    if surface < 0.35:
        stone = crop(draw, "texture", split, CANVAS, (0.5, 3.0)).astype(np.float32) / 255
        pixels += ((stone - stone.mean()) * draw.uniform(0.05, 0.6))[..., None]
    elif surface < 0.65:
        photo = crop(draw, "photo", split, CANVAS, (0.4, 4.0)).astype(np.float32) / 255
        pixels += (photo - photo.mean((0, 1))) * draw.uniform(0.1, 0.7)
    return pixels.astype(np.float32)


def _paint(draw: np.random.Generator, pixels: np.ndarray, cover: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The number's shadow or relief, then its paint, sometimes shaded."""
    if draw.random() < 0.45:
        reach = draw.uniform(1, 5)
        shift = (1, 0, -draw.uniform(-reach, reach), 0, 1, -draw.uniform(0, reach))
        mask = Image.fromarray((cover * 255).astype(np.uint8))
        mask = mask.transform((CANVAS, CANVAS), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
        mask = mask.filter(ImageFilter.GaussianBlur(float(draw.uniform(0.3, 3))))
        strength = np.asarray(mask, np.float32)[..., None] / 255 * draw.uniform(0.25, 0.8)
        pixels = pixels * (1 - strength) + (0.05 if draw.random() < 0.8 else 0.95) * strength
    paint = np.broadcast_to(ink, (CANVAS, CANVAS, 3)).copy()
    if draw.random() < 0.5:
        paint += (ramp(draw) * draw.uniform(-0.2, 0.2))[..., None]
    opacity = cover[..., None] * draw.uniform(0.75, 1.0)
    return pixels * (1 - opacity) + paint * opacity


def _light(draw: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Uneven light, a cast shadow with a soft edge, white balance, exposure."""
    pixels = pixels * (1 + ramp(draw) * draw.uniform(0, 0.35))[..., None]
    if draw.random() < 0.15:
        edge = ramp(draw) + draw.uniform(-0.8, 0.8)
        shade = draw.uniform(0.2, 0.55) / (1 + np.exp(-edge * draw.uniform(6, 40)))
        pixels = pixels * (1 - shade)[..., None]
    pixels = pixels * (1 + draw.normal(0, 0.04, 3))
    return (pixels - 0.5) * draw.uniform(0.55, 1.05) + 0.5 + draw.uniform(-0.08, 0.08)


def _camera(draw: np.random.Generator, pixels: np.ndarray, size: int) -> np.ndarray:
    """Defocus, low resolution, sensor noise, JPEG; uint8 [size, size, 3]."""
    resolution = int(np.clip(math.exp(draw.normal(math.log(26), 0.42)), 10, 64))
    blur = ImageFilter.GaussianBlur(float(draw.uniform(0.2, 0.8) * CANVAS / max(resolution, 24)))
    image = to_image(pixels).filter(blur).resize((resolution, resolution), Image.Resampling.BOX)
    values: np.ndarray = np.asarray(image, np.float32)
    values = values + draw.normal(0, draw.uniform(0.5, 5), (resolution, resolution, 1))
    values = values + draw.normal(0, draw.uniform(0, 2.5), (resolution, resolution, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(draw.integers(45, 96)))
    image = Image.open(buffer).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))

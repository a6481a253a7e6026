"""Three simple pictures of an arm, as stand-ins for cameras."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

LINKS = (0.34, 0.30, 0.22, 0.12)  # share of the picture's half height
COLOURS = ((70, 90, 110), (90, 120, 150), (120, 150, 180), (200, 120, 60))


def render(camera: int, positions: np.ndarray, width: int = 320, height: int = 240) -> np.ndarray:
    """uint8 [height, width, 3]: camera 0 looks from the side, 1 from above, 2 from the front."""
    image = Image.new("RGB", (width, height), (225, 225, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(height * 0.8), width, height), fill=(160, 130, 100))
    block = (60 + 60 * camera, height * 0.8 - 18)
    draw.rectangle((*block, block[0] + 18, block[1] + 18), fill=(200, 40, 40))
    angle = positions[0] if camera == 1 else 0.5 * np.pi
    point = np.array([width / 2, height * 0.8])
    for index, (length, colour) in enumerate(zip(LINKS, COLOURS, strict=True), start=1):
        bend = positions[min(index, len(positions) - 1)]
        angle += bend * (np.cos(positions[0]) if camera == 2 else 1.0)
        tip = point + length * height / 2 * np.array([np.cos(angle), -np.sin(angle)]) * 1.5
        draw.line((*point, *tip), fill=colour, width=9)
        point = tip
    draw.ellipse((*(point - 6), *(point + 6)), fill=(30, 30, 30))
    return np.asarray(image)

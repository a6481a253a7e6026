"""Pictures of episodes: a sheet with one row each, moments from left to right; a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pi05_ros.errors import ConfigError

CAPTION = 14  # pixels above a row


def save_contact_sheet(file: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int = 6,
                       size: int = 112) -> None:
    """PNG of (caption, frames uint8 [h, w, 3]) rows; of more frames than `columns`, some spread evenly, both ends in.

    Raises:
        ConfigError: no rows, or a row without frames.
    """
    if not rows or not all(len(frames) for _, frames in rows):
        raise ConfigError("contact sheet", expected="episodes with frames", received=f"{len(rows)} episodes",
                          way_out="Film at least one observation of each.")
    sheet = Image.new("RGB", (columns * size, len(rows) * (size + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, frames) in enumerate(rows):
        top = row * (size + CAPTION)
        draw.text((2, top + 1), caption, fill="black")
        count = min(columns, len(frames))
        for column, index in enumerate(np.linspace(0, len(frames) - 1, count).round().astype(int)):
            picture = Image.fromarray(frames[index]).resize((size, size), Image.Resampling.BILINEAR)
            sheet.paste(picture, (column * size, top + CAPTION))
    sheet.save(file)


def save_film(file: Path, frames: Sequence[tuple[str, np.ndarray]], frame_s: float) -> None:
    """GIF of (caption, frame uint8 [h, w, 3]), each shown for `frame_s`.

    Raises:
        ConfigError: no frames.
    """
    if not frames:
        raise ConfigError("film", expected="frames", received="none", way_out="Let the cameras run.")
    pictures = []
    for caption, frame in frames:
        picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + CAPTION), "white")
        ImageDraw.Draw(picture).text((2, 1), caption, fill="black")
        picture.paste(Image.fromarray(frame), (0, CAPTION))
        pictures.append(picture)
    palette = pictures[0].quantize(dither=Image.Dither.NONE)  # one for all: with its own each frame has other colours
    shown = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    shown[0].save(file, format="GIF", save_all=True, append_images=shown[1:], duration=round(frame_s * 1e3), loop=0)

"""A picture of episodes: one row each, moments from left to right."""

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

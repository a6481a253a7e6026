"""Memory, threads and descriptors of a process over time: measured, judged, drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

PIECES = 20  # of a run
WARM_UP = 5  # pieces until threads, descriptors and memory have settled
MEMORY_A_CYCLE = 100  # bytes that may be gained: a leak of one small object does more
PANELS = {"memory": ("resident memory, MiB", 2**20), "threads": ("threads", 1), "descriptors": ("open descriptors", 1)}
WIDTH, PANEL, LEFT, TOP, COLOURS = 1000, 150, 60, 30, ("#0b57d0", "#e8710a")

Standing = dict[str, int]


def standing(process: int | str = "self") -> Standing:
    """Threads, descriptors and resident bytes, as Linux counts them."""
    proc = Path(f"/proc/{process}")
    pages = int((proc / "statm").read_text().split()[1])
    return {"threads": len(os.listdir(proc / "task")), "descriptors": len(os.listdir(proc / "fd")),
            "memory": pages * os.sysconf("SC_PAGE_SIZE")}


def in_pieces(samples: Sequence[Standing]) -> list[Standing]:
    """The most of each of PIECES parts of a run, one sample at least in each."""
    parts = [samples[len(samples) * n // PIECES:len(samples) * (n + 1) // PIECES] for n in range(PIECES)]
    return [{what: max(sample[what] for sample in part) for what in PANELS} for part in parts]


def grown(pieces: Sequence[Standing], cycles: int) -> list[str]:
    """What became more between the end of the warm-up and the end."""
    first, last = pieces[WARM_UP], pieces[-1]
    allowed = {"threads": 0, "descriptors": 0, "memory": MEMORY_A_CYCLE * cycles + 2**20}
    return [f"{what} grew from {first[what]} to {last[what]}" for what, more in allowed.items()
            if last[what] - first[what] > more]


def draw(samples: Sequence[tuple[float, Standing]], starts: Mapping[float, str], path: Path, title: str) -> None:
    """PNG: a panel a quantity, from zero on, over simulated minutes; an upright line where a process began.

    Args:
        samples: seconds and what stood then.
        starts: seconds and why a new process was needed.
    """
    end_s = max(s for s, _ in samples) or 1.0
    picture = Image.new("RGB", (WIDTH, TOP + PANEL * len(PANELS) + 30), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((LEFT, 8), title, fill="black")
    scale = (WIDTH - LEFT - 20) / end_s
    for row, (what, (name, unit)) in enumerate(PANELS.items()):
        top, bottom = TOP + PANEL * row + 18, TOP + PANEL * (row + 1) - 8
        most = max(sample[what] for _, sample in samples)
        pen.text((LEFT, top - 14), f"{name}: {min(s[what] for _, s in samples) / unit:.0f} to {most / unit:.0f}",
                 fill="black")
        pen.line((LEFT, bottom, WIDTH - 20, bottom), fill="#999999")
        for at, why in starts.items():
            x = LEFT + at * scale
            pen.line((x, top, x, bottom), fill=COLOURS[1] if why == "kill" else "#9aa0a6")
        for at, sample in samples:
            x, y = LEFT + at * scale, bottom - (bottom - top) * sample[what] / (1.1 * most)
            pen.rectangle((x, y - 1, x + 1, y), fill=COLOURS[0])
    step = next(step for step in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if end_s / 60 / step <= 14)
    for tick in range(int(end_s / 60 / step) + 1):
        pen.text((LEFT + tick * step * 60 * scale - 4, picture.height - 26), f"{tick * step:g}", fill="black")
    pen.text((LEFT, picture.height - 13), "simulated minutes; upright lines: a new process, after kill -9 (orange) or "
             "SIGTERM (grey)", fill="black")
    picture.save(path, optimize=True)

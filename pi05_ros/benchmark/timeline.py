"""A few cycles of the pipeline as a picture: a Chrome trace (ui.perfetto.dev opens it) and a PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from pi05_ros.runtime.pipelined import PendingChunk
from pi05_ros.runtime.streams import HostMark, mark_here

TRACKS = ("host", "front stream", "back stream")
COLOURS = {"transform": "#9aa0a6", "inverse": "#9aa0a6", "images": "#8ab4f8", "vision": "#4285f4", "prefix": "#0b57d0",
           "expert": "#e8710a"}
WIDTH, ROW, LEFT, TOP = 1600, 56, 110, 40  # pixels


@dataclass(frozen=True)
class Span:
    """One stage of one chunk; microseconds since the recording began."""

    stage: str
    track: str
    begin_us: float
    end_us: float
    chunk: int


class Recorder:
    """What `Pipeline` may be given as `observe`. Made on the thread that makes the CUDA calls."""

    def __init__(self, device: torch.device) -> None:
        self._device_zero = mark_here(device)
        self._device_zero.wait()
        self._host_zero = HostMark()  # the two clocks meet here
        self.spans: list[Span] = []

    def __call__(self, pending: PendingChunk) -> None:
        for stage, (begin, end) in pending.timer.spans.items():
            if stage not in COLOURS:
                continue
            host = stage in ("transform", "inverse")
            track = TRACKS[0] if host else TRACKS[1 + (stage in pending.back)]
            zero = self._host_zero if host else self._device_zero
            self.spans.append(Span(stage, track, 1e3 * zero.ms_until(begin), 1e3 * zero.ms_until(end),
                                   pending.request.chunk_index))


def last_chunks(spans: Sequence[Span], count: int) -> list[Span]:
    """Those of the last `count` chunks, from zero on."""
    newest = max((span.chunk for span in spans), default=0)
    kept = [span for span in spans if span.chunk > newest - count]
    zero = min((span.begin_us for span in kept), default=0.0)
    return [Span(s.stage, s.track, s.begin_us - zero, s.end_us - zero, s.chunk) for s in kept]


def write_trace(spans: Sequence[Span], path: Path) -> None:
    """Chrome's trace event format."""
    events: list[dict[str, object]] = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": track}}
                                       for tid, track in enumerate(TRACKS)]
    events += [{"name": span.stage, "ph": "X", "pid": 1, "tid": TRACKS.index(span.track), "ts": span.begin_us,
                "dur": span.end_us - span.begin_us, "args": {"chunk": span.chunk}} for span in spans]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def write_picture(spans: Sequence[Span], path: Path, title: str) -> None:
    """One row a track; the number in a bar is its chunk."""
    end_us = max((span.end_us for span in spans), default=1.0)
    scale = (WIDTH - LEFT - 20) / end_us
    height = TOP + ROW * len(TRACKS) + 50
    picture = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((LEFT, 12), title, fill="black")
    for row, track in enumerate(TRACKS):
        draw.text((8, TOP + ROW * row + 20), track, fill="black")
    axis = TOP + ROW * len(TRACKS) + 8
    step_us = next(step for step in (1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7, 1e8) if end_us / step < 25)
    for tick in range(int(end_us / step_us) + 1):
        x = LEFT + scale * tick * step_us
        draw.line((x, TOP, x, axis), fill="#dddddd")
        draw.text((x - 4, axis), f"{tick * step_us * 1e-3:g}", fill="black")
    for span in spans:
        top = TOP + ROW * TRACKS.index(span.track) + 8
        left, right = LEFT + scale * span.begin_us, LEFT + scale * span.end_us
        draw.rectangle((left, top, max(right - 1, left + 1), top + ROW - 16), fill=COLOURS[span.stage])
        text = f"{span.stage} {span.chunk}"
        if right - left > draw.textlength(text) + 6:
            draw.text((left + 4, top + 14), text, fill="white")
    draw.text((8, axis), "ms", fill="black")
    picture.save(path)

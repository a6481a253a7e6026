"""A comparison as one HTML file: plots in SVG, nothing to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from pi05_ros.bag.compare import Comparison, percentiles

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 240, 64, 34
COLOURS = ("#1f5fa8", "#c2571a")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:44em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:left;border-bottom:1px solid #ddd}
svg{max-width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#444}h2{margin-top:2em}"""


def page(found: Comparison, bag: str, model: str, changed: Mapping[str, Any], against: str = "chunks") -> str:
    """The whole page. against: what the chunks were compared with, `chunks` or `joints`."""
    chunks, same = len(found.identical), int(found.identical.sum())
    verdict = (f"{chunks} chunks beside what the joints did next; the largest difference is {found.largest:.3g}."
               if against == "joints" else
               "All chunks came out bit for bit as recorded." if same == chunks else
               f"{same} of {chunks} chunks came out bit for bit as recorded; the largest error of an action is "
               f"{found.largest:.3g}.")
    rows = [("bag", bag), ("replayed with", model), ("changed", ", ".join(f"{k} = {v}" for k, v in changed.items())
                                                     or "nothing"),
            ("chunks replayed", chunks), ("not replayable", len(found.missing))]
    for name, values in (("recorded", found.recorded_ms), ("replayed", found.replayed_ms)):
        said = ", ".join(f"{q} {ms:.2f} ms" for q, ms in percentiles(values).items())
        rows.append((f"latency {name}", said or "not recorded"))
    missing = "".join(f"<li>{escape(why)}</li>" for why in found.missing)
    steps = np.arange(found.errors.shape[1], dtype=float)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Replay</title>", f"<style>{STYLE}</style>",
        f"<h1>Replay</h1><p>{escape(verdict)}</p><table>",
        *(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows), "</table>",
        f"<h2>Not replayed</h2><ul>{missing}</ul>" if missing else "",
        "<h2>Error by joint</h2><p>Root mean square over all chunks and actions, in the robot's units.</p>",
        bars(found.names, found.by_joint()),
        "<h2>Error by action</h2><p>Root mean square at each place in the chunk.</p>",
        lines([("", steps, found.by_action())], "action", "error"),
        "<h2>Error over time</h2><p>Root mean square of each chunk.</p>",
        lines([("", found.times_s, found.by_chunk())], "s since the first observation", "error"),
        "<h2>Latency</h2><p>Share of chunks whose stages took at most so long.</p>",
        lines([(name, np.sort(ms), np.arange(1, chunks + 1) / chunks)
               for name, ms in (("recorded", found.recorded_ms), ("replayed", found.replayed_ms))], "ms", "share"),
        "</html>"]
    return "\n".join(parts)


def lines(series: Sequence[tuple[str, np.ndarray, np.ndarray]], x_label: str, y_label: str) -> str:
    """SVG of (name, x, y) drawn in one frame; y from 0 on."""
    every_x = np.concatenate([x[np.isfinite(x)] for _, x, _ in series])
    low, high = float(every_x.min(initial=np.inf)), float(every_x.max(initial=-np.inf))
    if not len(every_x):
        return "<p>Nothing was recorded of it.</p>"
    top = max(float(y.max(initial=0.0)) for _, _, y in series)
    out = [frame(f"{low:.3g}", f"{high:.3g}", f"{top:.3g}", x_label, y_label)]
    for index, (name, x, y) in enumerate(series):
        across = LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - LEFT - 10)
        down = HEIGHT - BOTTOM - y / (top or 1.0) * (HEIGHT - BOTTOM - 20)
        points = " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True) if np.isfinite(a))
        out.append(f"<polyline points='{points}' fill='none' stroke='{COLOURS[index % 2]}' stroke-width='2'/>")
        out.append(f"<text x='{LEFT + 10 + 90 * index}' y='14' style='fill:{COLOURS[index % 2]}'>{escape(name)}</text>")
    return "".join([*out, "</svg>"])


def bars(names: Sequence[str], values: np.ndarray) -> str:
    """SVG of one horizontal bar a name."""
    top, height = float(values.max(initial=0.0)), 22 * len(names)
    out = [f"<svg viewBox='0 0 {WIDTH} {height}' role='img'>"]
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        length = value / (top or 1.0) * (WIDTH - 260)
        out.append(f"<text x='0' y='{22 * row + 15}'>{escape(name)}</text>"
                   f"<rect x='150' y='{22 * row + 3}' width='{length:.1f}' height='16' fill='{COLOURS[0]}'/>"
                   f"<text x='{156 + length:.1f}' y='{22 * row + 15}'>{value:.3g}</text>")
    return "".join([*out, "</svg>"])


def frame(low: str, high: str, top: str, x_label: str, y_label: str) -> str:
    floor = HEIGHT - BOTTOM
    return (f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>"
            f"<path d='M{LEFT} 20V{floor}H{WIDTH - 10}' fill='none' stroke='#999'/>"
            f"<text x='{LEFT - 6}' y='26' text-anchor='end'>{top}</text>"
            f"<text x='{LEFT - 6}' y='{floor}' text-anchor='end'>0</text>"
            f"<text x='{LEFT}' y='{floor + 16}'>{low}</text>"
            f"<text x='{WIDTH - 10}' y='{floor + 16}' text-anchor='end'>{high}</text>"
            f"<text x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 4}' text-anchor='middle'>{escape(x_label)}</text>"
            f"<text x='{LEFT - 6}' y='{HEIGHT / 2}' text-anchor='end'>{escape(y_label)}</text>")

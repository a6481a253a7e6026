"""What a verb gives back, and how it speaks to a person: tables and progress on standard error."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)  # a file has room for every column


@dataclass(frozen=True)
class Report:
    """ok: every gate held. data: JSON-able. exit_code: overrides 0 / 1."""

    ok: bool
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; numbers are formatted by the caller."""
    out = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*(escape(str(cell)) for cell in row))
    console.print(out)


@contextmanager
def progress(label: str) -> Iterator:
    """A bar for anything longer than two seconds; yields `update(done, total)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def peak_memory_gb() -> float:
    """The most memory that this process has had resident, mapped files included."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * 1024 / 1e9

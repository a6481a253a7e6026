"""What a measurement gives back: tables for a person, gates for the exit status, data for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns and rows, already formatted."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Gate:
    """A value that must not be above its limit."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # false for NaN

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {'within' if self.ok else 'above'} {self.limit:.4g}"


@dataclass(frozen=True)
class Findings:
    """`data` is JSON-able; `as_data` adds the gates to it."""

    tables: list[Table]
    data: dict[str, Any]
    gates: list[Gate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(gate.ok for gate in self.gates)

    def as_data(self) -> dict[str, Any]:
        return {**self.data, "gates": [{**asdict(gate), "ok": gate.ok} for gate in self.gates]}


def gap(median_ms: float, floor_ms: float) -> str:
    """Measured over floor, for a table."""
    return f"{median_ms / floor_ms:.1f} x"

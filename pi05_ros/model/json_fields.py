"""A JSON object of a checkpoint, read field by field: a wrong type or range raises and names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pi05_ros.errors import CheckpointError

T = TypeVar("T")
WAY_OUT = "Correct the file, or take it again from where the checkpoint came from."


@dataclass(frozen=True)
class JsonFields:
    """The object at `trail` inside the file `path`. A key that is absent or null reads as None."""

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    trail: str = ""

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """Raises CheckpointError if the file cannot be read or does not hold one JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8 alike
            raise CheckpointError(str(path), expected="a readable JSON file", received=str(error),
                                  way_out=WAY_OUT) from error
        if not isinstance(values, dict):
            raise CheckpointError(str(path), expected="one JSON object", received=_shown(values), way_out=WAY_OUT)
        return cls(path, values)

    def error(self, name: str, expected: str, received: str = "", way_out: str = WAY_OUT) -> CheckpointError:
        """The error for a bad value, which is shown if `received` does not say it better; the caller raises it."""
        received = received or (_shown(self.values[name]) if name in self.values else "nothing")
        return CheckpointError(f"'{self.trail}{name}' in {self.path}", expected=expected, received=received,
                               way_out=way_out)

    def integer(self, name: str, low: int, high: int) -> int | None:
        expected = f"a whole number from {low} to {high}"
        value = self._typed(name, int, expected)
        if value is not None and not low <= value <= high:
            raise self.error(name, expected)
        return value

    def number(self, name: str) -> float | None:
        value = self.numbers(name, ndim=0)
        return None if value is None else float(value)

    def text(self, name: str) -> str | None:
        return self._typed(name, str, "a string")

    def flag(self, name: str) -> bool | None:
        return self._typed(name, bool, "true or false")

    def texts(self, name: str) -> tuple[str, ...] | None:
        values = self._typed(name, list, "a list of strings")
        if values is not None and not all(isinstance(value, str) for value in values):
            raise self.error(name, "a list of strings", "a list with other things in it")
        return None if values is None else tuple(values)

    def numbers(self, name: str, ndim: int = 1) -> np.ndarray | None:
        """Finite numbers, float64; `ndim` 1 is a list, 0 a single number."""
        value = self.values.get(name)
        if value is None:
            return None
        expected = "a list of finite numbers" if ndim else "a finite number"
        flat = value if isinstance(value, list) else [value]
        if isinstance(value, list) != bool(ndim) or not all(_is_number(item) for item in flat):
            raise self.error(name, expected)
        try:
            array = np.array(value, np.float64)
        except OverflowError:  # a whole number too large for a float
            array = np.array(np.inf)
        if not np.isfinite(array).all():
            raise self.error(name, expected, "NaN or infinite values")
        return array

    def fields(self, name: str) -> JsonFields | None:
        value = self._typed(name, dict, "an object")
        return None if value is None else JsonFields(self.path, value, f"{self.trail}{name}.")

    def each(self) -> Iterator[tuple[str, JsonFields]]:
        """All entries, in the file's order, each of which must be an object."""
        for name in self.values:
            entry = self.fields(name)
            if entry is None:
                raise self.error(name, "an object")
            yield name, entry

    def objects(self, name: str) -> list[JsonFields]:
        """A list of objects; absent reads as empty."""
        values = self._typed(name, list, "a list of objects") or []
        if not all(isinstance(value, dict) for value in values):
            raise self.error(name, "a list of objects", "a list with other things in it")
        return [JsonFields(self.path, value, f"{self.trail}{name}[{i}].") for i, value in enumerate(values)]

    def _typed(self, name: str, kind: type[T], expected: str) -> T | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):  # to Python, True is an int
            raise self.error(name, expected)
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:  # repr may refuse it
        return "a number beyond 64 bits"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{type(value).__name__} {shown[:56]} ..."

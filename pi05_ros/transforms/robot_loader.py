"""A robot's YAML file to `Robot`, strictly: what is unknown, missing, doubled or of the wrong type is an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pi05_ros.config import share_directory
from pi05_ros.errors import ConfigError
from pi05_ros.transforms.robot_file import Robot

SUFFIX = ".yaml"
WAY_OUT = "Correct the file; its keys are explained in pi05_ros/transforms/robot_file.py."


def list_robots() -> list[str]:
    """Names of the robots that come with the package."""
    return sorted(path.stem for path in _folder().glob("*" + SUFFIX))


def load_robot(name_or_path: str) -> Robot:
    """A robot of this package by its name, or any by the path of its file (which ends in .yaml).

    Raises:
        ConfigError: names the file and the key, what was expected there and what it holds.
    """
    if name_or_path.endswith((SUFFIX, ".yml")):
        path = Path(os.path.expanduser(name_or_path))
    else:
        path = _folder() / (name_or_path + SUFFIX)
        if name_or_path not in list_robots():
            raise ConfigError(f"robot '{name_or_path}'", expected="one of " + ", ".join(list_robots()),
                              received=repr(name_or_path), way_out="Or give the path of a .yaml file.")
    data = _read(path)
    if "name" in data:
        raise ConfigError(f"{path}: name", expected="no such key: the file's name is the robot's",
                          received=repr(data["name"]), way_out="Remove the key, or rename the file.")
    return _build(Robot, {"name": path.stem, **data}, str(path), separator=": ")


def _folder() -> Path:
    return share_directory() / "config" / "robots"


class _UniqueKeys(yaml.SafeLoader):
    """safe_load would silently keep the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # on a value that its tag does not fit, PyYAML raises anything: KeyError, TypeError, ...
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"robot file {path}", expected="a readable YAML file", received=str(reason),
                          way_out=WAY_OUT) from error
    return _mapping(data, f"robot file {path}")


def _build(kind: type, data: Mapping[str, Any], where: str, separator: str = ".") -> Any:
    """A dataclass from a mapping; `where` begins every subject, as in `file: joints[2].lower`."""
    known = {f.name: f for f in fields(kind)}
    unknown = [str(key) for key in data if key not in known]
    if unknown:
        raise ConfigError(where + separator + unknown[0], received=f"'{unknown[0]}'", way_out=WAY_OUT,
                          expected="a key among " + ", ".join(known))
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(where + separator + name, expected="this key", received="none", way_out=WAY_OUT)
    hints = get_type_hints(kind)
    values = {name: _parse(hints[name], value, where + separator + name) for name, value in data.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.subject}", expected=error.expected, received=error.received,
                          way_out=WAY_OUT) from error


def _parse(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type of a dataclass field."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _build(hint, _mapping(value, where), where)  # type: ignore[arg-type]
    if origin in (Union, UnionType):  # only `X | None` occurs
        return None if value is None else _parse(next(a for a in args if a is not NoneType), value, where)
    if origin is Literal:
        return _check(value, value in args and isinstance(value, str), "one of " + ", ".join(map(str, args)), where)
    if origin is tuple:
        _check(value, isinstance(value, list), "a list", where)
        return tuple(_parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        return {key: _parse(args[1], item, f"{where}.{key}") for key, item in _mapping(value, where).items()}
    if hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        finite = is_number and abs(value) <= sys.float_info.max  # an int may be too long for a float
        return float(_check(value, finite, "a finite number (1.0e-3, not 1e-3)", where))
    words = {int: "a whole number", bool: "true or false", str: "text (in quotes)"}
    return _check(value, type(value) is hint, words[hint], where)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    return _check(value, isinstance(value, dict) and all(isinstance(k, str) for k in value), "keys with values", where)


def _check(value: Any, holds: bool, expected: str, where: str) -> Any:
    if not holds:
        raise ConfigError(where, expected=expected, received=repr(value), way_out=WAY_OUT)
    return value

"""Normalisation statistics: openpi's norm_stats.json, and the checks every source of them must pass (PI05_SPEC 10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint_config import CheckpointConfig, Kind
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.schema import ACTION_DIM, Conventions, FieldStats, NormMode, NormStats

FILE = "norm_stats.json"
SEVERAL_ASSETS = "asset_id"  # the `cause` of the error that giving an asset_id cures
NEEDED: dict[NormMode, tuple[str, ...]] = {"quantile": ("q01", "q99"), "zscore": ("mean", "std"), "identity": ()}
KINDS = ("mean", "std", "q01", "q99")
WAY_OUT = "Compute the statistics again over the training data."
MAX_DEPTH = 3  # of folders in an asset_id such as physical-intelligence/libero
ALMOST_CONSTANT = 1e-6  # in the robot's units (rad, m)


@dataclass(frozen=True)
class Processing:
    """How the trainer treated its data: conventions, statistics and their file, notes for the user.

    `stats` is None if they are needed and not there; where the mode is identity they are empty.
    """

    conventions: Conventions
    stats: NormStats | None
    source: Path | None
    notes: tuple[str, ...] = ()


def openpi_processing(directory: Path, asset_id: str, described: CheckpointConfig, kind: Kind) -> Processing:
    """openpi normalises by quantiles, pi0 by mean and deviation."""
    mode: NormMode = "quantile" if kind == "pi05" else "zscore"
    in_prompt = kind == "pi05" and described.state_in_prompt is not False
    conventions = Conventions("openpi", "pil", mode, mode, "pi05" if in_prompt else "pi0")
    source = find_openpi_stats(directory, asset_id)
    certain = kind == "pi0" or described.state_in_prompt is not None
    notes = () if certain else ("The files do not tell whether the prompt carries the state: pi05_libero was trained "
                                "without and needs prompt_format pi0.",)
    return Processing(conventions, None if source is None else read_openpi_stats(source, mode), source, notes)


def asset_folders(directory: Path) -> dict[str, Path]:
    """asset_id to its folder: under the checkpoint's own assets/, or where there are none, beside its parent's."""
    for assets in (directory / "assets", directory.absolute().parent / "assets"):
        files = [file for depth in range(MAX_DEPTH + 1) for file in sorted(assets.glob("*/" * depth + FILE))]
        found = {file.parent.relative_to(assets).as_posix(): file.parent for file in files}
        if found:
            return found
    return {}


def find_openpi_stats(directory: Path, asset_id: str = "") -> Path | None:
    """The norm_stats.json of `asset_id`, or without one the only one there is; None if there is none at all.

    Raises:
        CheckpointError: that asset_id is not there, or none is given and there are several.
    """
    folders = asset_folders(directory)
    if not folders:
        return None
    if not asset_id and len(folders) > 1:
        raise CheckpointError(f"statistics of {directory}", expected="an asset_id, as there are several",
                              received="none", way_out="Give one of " + ", ".join(map(repr, folders)) + ".",
                              cause=SEVERAL_ASSETS)
    if asset_id and asset_id not in folders:
        raise CheckpointError(f"statistics of {directory}", expected=f"assets/{asset_id}/{FILE}",
                              received="no such file", way_out="Give one of " + ", ".join(map(repr, folders)) + ".")
    return (folders[asset_id] if asset_id else next(iter(folders.values()))) / FILE


def read_openpi_stats(file: Path, mode: NormMode) -> NormStats:
    """Read and check norm_stats.json; `mode` says which statistics must be there."""
    both = JsonFields.read(file).fields("norm_stats")
    if both is None:
        raise CheckpointError(str(file), expected="the key 'norm_stats'", received="none", way_out=WAY_OUT)

    def one(name: str) -> FieldStats:
        fields = both.fields(name)
        if fields is None:
            raise both.error(name, "an object with " + ", ".join(KINDS), way_out=WAY_OUT)
        return checked_stats(f"'norm_stats.{name}' in {file}", {k: fields.numbers(k) for k in KINDS}, mode)

    return NormStats(state=one("state"), actions=one("actions"))


def checked_stats(subject: str, arrays: Mapping[str, np.ndarray | None], mode: NormMode) -> FieldStats:
    """`FieldStats` of one vector, or CheckpointError naming `subject` and the dimension that is wrong.

    Args:
        arrays: of `KINDS`; each [d], finite; None where the source has none.
        mode: whose statistics must be there.
    """
    present = {kind: array for kind, array in arrays.items() if array is not None}

    def refuse(kind: str, expected: str, received: object) -> CheckpointError:
        return CheckpointError(f"'{kind}' of {subject}", expected=expected, received=str(received), way_out=WAY_OUT)

    for kind in NEEDED[mode]:
        if kind not in present:
            raise refuse(kind, f"numbers, for {mode} normalisation", "none")
    for kind, array in present.items():
        if array.ndim != 1 or not 1 <= array.size <= ACTION_DIM:
            raise refuse(kind, f"a list of 1 to {ACTION_DIM} numbers", f"shape {list(array.shape)}")
        width = next(iter(present.values())).size
        if array.size != width:
            raise refuse(kind, f"{width} numbers, as '{next(iter(present))}' has", array.size)
    checks = [(kind, ~np.isfinite(array), "finite numbers") for kind, array in present.items()]
    if "std" in present:
        checks.append(("std", present["std"] < 0, "no negative number"))
    if "q01" in present and "q99" in present:
        checks.append(("q01", present["q01"] > present["q99"], "at most q99"))
    for kind, wrong, expected in checks:
        if wrong.any():
            dimension = int(wrong.argmax())
            raise refuse(kind, expected, f"{present[kind][dimension]:g} in dimension {dimension}")
    return FieldStats(**present)


def constant_dimensions(stats: FieldStats, mode: NormMode) -> list[int]:
    """Dimensions that hardly moved in the training data: normalising divides by almost nothing there."""
    if mode == "quantile" and stats.q01 is not None and stats.q99 is not None:
        spread = stats.q99 - stats.q01
    elif mode == "zscore" and stats.std is not None:
        spread = stats.std
    else:
        return []
    return np.flatnonzero(spread < ALMOST_CONSTANT).tolist()

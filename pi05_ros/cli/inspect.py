"""Tells what a checkpoint is, what is in it and what is missing, without loading it into a model.

Reads openpi's and lerobot's safetensors checkpoints. `--check` also reads every tensor and looks for NaN.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pi05_ros.cli.report import Report, console, progress, table
from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint import Checkpoint, open_checkpoint
from pi05_ros.model.checkpoint_config import NO_HORIZON
from pi05_ros.model.norm_stats import SEVERAL_ASSETS, asset_folders, constant_dimensions
from pi05_ros.model.weights import parameter_counts
from pi05_ros.schema import FieldStats

HELP = "say what a checkpoint holds, and what is missing"
WAYS_OUT = {
    "config.json": "download it too; without it sizes come from the tensors and conventions from the trainer's usual",
    "statistics": "put openpi's assets/<asset_id>/norm_stats.json or lerobot's policy_preprocessor files beside it",
    "tokenizer": "put paligemma_tokenizer.model beside it, or give --tokenizer",
    "cameras": "config.json names none; the robot file's order of cameras is used",
    "action_horizon": "give --horizon: what the model was trained with",
    "asset_id": "give --asset-id",
}
STACKS = {"vision": "vision", "prefix": "prefix", "expert": "action expert"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint directory or .safetensors file")
    parser.add_argument("--horizon", type=int, metavar="H", help="action horizon, where config.json does not tell it")
    parser.add_argument("--asset-id", default="", metavar="ID", help="folder of openpi's statistics under assets/")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model, if not in the directory")
    parser.add_argument("--check", action="store_true", help="read every tensor; fail at the first NaN or infinity")


def run(args: argparse.Namespace) -> Report:
    """Raises CheckpointError for a checkpoint that no option can make loadable."""
    checkpoint, missing = _open(args)
    if args.check:
        _read_all(checkpoint)
    data = describe(checkpoint, missing) | {"checked": args.check}
    _print(data)
    return Report(ok=True, data=data)


def _open(args: argparse.Namespace) -> tuple[Checkpoint, list[str]]:
    """Open it with the options given; one that is needed and absent is reported, and something stands in for it."""
    options: dict[str, Any] = {"action_horizon": args.horizon, "asset_id": args.asset_id, "tokenizer": args.tokenizer}
    missing: list[str] = []
    while True:
        try:
            checkpoint = open_checkpoint(args.path, **options)
            return checkpoint, missing + list(checkpoint.missing)
        except CheckpointError as error:
            if error.cause not in (NO_HORIZON, SEVERAL_ASSETS) or error.cause in missing:
                raise
            missing.append(error.cause)
            directory = args.path if args.path.is_dir() else args.path.parent
            options[error.cause] = 1 if error.cause == NO_HORIZON else next(iter(asset_folders(directory)))


def describe(checkpoint: Checkpoint, missing: list[str]) -> dict[str, Any]:
    """Everything worth knowing, as JSON. What `missing` names is null."""
    config, conventions = checkpoint.config, checkpoint.conventions
    parameters = parameter_counts(config)
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "layout": checkpoint.layout,
        "sizes": {stack: asdict(getattr(config, stack)) for stack in STACKS},
        "parameters": parameters | {"used": sum(parameters.values())},
        "tensors": len(checkpoint.tensors) + len(checkpoint.unused),
        "unused_bytes": sum(tensor.nbytes for tensor in checkpoint.unused),
        "stored_dtypes": dict(checkpoint.stored_dtypes),
        "action_horizon": None if NO_HORIZON in missing else config.action_horizon,
        "n_action_steps": checkpoint.n_action_steps,
        "max_token_len": config.max_token_len,
        "robot_action_dim": checkpoint.robot_action_dim,
        "camera_keys": checkpoint.camera_keys,
        "conventions": asdict(conventions),
        "statistics": None if SEVERAL_ASSETS in missing else describe_stats(checkpoint),
        "asset_ids": list(asset_folders(checkpoint.path)) if conventions.trainer == "openpi" else [],
        "tokenizer": checkpoint.tokenizer_path and str(checkpoint.tokenizer_path),
        "missing": missing,
        "notes": checkpoint.notes,
    }


def describe_stats(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Where the statistics come from, their widths, and the dimensions that hardly moved in training."""
    stats, conventions = checkpoint.stats, checkpoint.conventions
    if stats is None:
        return None
    fields = {"state": (stats.state, conventions.state_norm), "actions": (stats.actions, conventions.action_norm)}
    return {"file": checkpoint.stats_path and str(checkpoint.stats_path)} | {
        name: {"norm": mode, "width": stats_width(field), "constant_dimensions": constant_dimensions(field, mode)}
        for name, (field, mode) in fields.items()}


def stats_width(stats: FieldStats) -> int:
    """Number of dimensions; 0 where there are no statistics."""
    return next((len(array) for array in (stats.q01, stats.mean) if array is not None), 0)


def _read_all(checkpoint: Checkpoint) -> None:
    total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0
    with progress("reading every tensor") as update:
        for name, stored in checkpoint.tensors.items():
            checkpoint.get(name, torch.Size(stored.shape), torch.device("cpu"))
            done += stored.nbytes
            update(done, total)


def _print(data: dict[str, Any]) -> None:
    table(data["path"], ("checkpoint", ""), _overview(data))
    rows = ([label, *(data["sizes"][stack].get(key, "") for key in ("width", "depth", "mlp_dim", "num_heads"))]
            for stack, label in STACKS.items())
    table("sizes", ("stack", "width", "layers", "mlp", "heads"), rows)
    table("parameters", ("part", "number"), ((part, f"{count:,}") for part, count in data["parameters"].items()))
    if data["statistics"]:
        rows = ([name, field["norm"], field["width"], field["constant_dimensions"] or "none"]
                for name, field in data["statistics"].items() if name != "file")
        table("statistics", ("of", "normalisation", "width", "constant dimensions"), rows)
    if data["missing"]:
        table("missing", ("what", "what to do"), ((name, WAYS_OUT[name]) for name in data["missing"]))
    for note in data["notes"]:
        console.print(f"Note: {note}", highlight=False, markup=False)


def _overview(data: dict[str, Any]) -> list[tuple[str, object]]:
    conventions = data["conventions"]
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in data["stored_dtypes"].items())
    delta = conventions["delta_actions"]
    moving = [dimension for dimension, is_delta in enumerate(delta or ()) if is_delta]
    return [
        ("model", data["kind"]),
        ("layout", data["layout"]),
        ("tensors", f"{data['tensors']}: {dtypes}"),
        ("unused", f"{data['unused_bytes'] / 2**20:,.1f} MiB"),
        ("action horizon", data["action_horizon"] or "unknown"),
        ("actions executed of a chunk", data["n_action_steps"] or "not told"),
        ("robot action width", data["robot_action_dim"] or "not told"),
        ("prompt length", data["max_token_len"]),
        ("prompt format", conventions["prompt_format"]),
        ("image resize", conventions["resize"]),
        ("delta actions", "as the robot file says" if delta is None else moving or "none"),
        ("cameras", ", ".join(data["camera_keys"]) or "not told"),
        ("statistics", (data["statistics"] or {}).get("file") or "none"),
        ("asset ids", ", ".join(data["asset_ids"]) or "none"),
        ("tokenizer", data["tokenizer"] or "none"),
        ("every tensor finite", "yes" if data["checked"] else "not checked (--check)"),
    ]

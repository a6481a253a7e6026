"""From a path to the files of a checkpoint; what is not one is told apart, with the way out."""

from __future__ import annotations

import os
from pathlib import Path

from pi05_ros.config import share_directory
from pi05_ros.errors import CheckpointError
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.stored_tensors import pickled

WEIGHTS = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
ORBAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt")


def shipped() -> dict[str, Path]:
    """The checkpoints that come with the package, by name."""
    return {file.parent.name: file.parent for file in sorted((share_directory() / "models").glob(f"*/{WEIGHTS}"))}


def locate(given: str | Path) -> tuple[Path, list[Path]]:
    """The checkpoint's directory and its safetensors files (several if it is sharded). A name of `shipped` is that
    one, whatever lies in the working directory.

    Raises:
        CheckpointError: there is no such path, or it holds something else.
    """
    try:
        path = shipped().get(str(given)) or Path(given).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL in the name, and ~ of nobody
        raise CheckpointError(str(given), expected="a checkpoint directory, a .safetensors file, or a checkpoint that "
                              "comes with the package: " + ", ".join(shipped()),
                              received=getattr(error, "strerror", None) or str(error),
                              way_out="Check the path; a model on a hub must be downloaded first.") from error
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickled(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(str(path), expected="a checkpoint directory or a .safetensors file",
                                  received=f"a file '{path.name}'", way_out="Give the directory that holds it.")
        return path.parent, [path]
    if (path / WEIGHTS).exists():
        return path, [path / WEIGHTS]
    if (path / SHARD_INDEX).exists():
        return path, _shards(path)
    raise _not_a_checkpoint(path)


def find_tokenizer(directory: Path, given: str | Path | None = None) -> Path | None:
    """The SentencePiece model: the one given, else the one in the directory or its assets, else None."""
    if given:
        found = os.path.expanduser(given)
        if not os.path.isfile(found):
            raise CheckpointError(f"tokenizer {given}", expected="a SentencePiece .model file",
                                  received="no such file", way_out="Give the path of paligemma_tokenizer.model.")
        return Path(found)
    for folder in (directory, directory / "assets"):
        for name in ("tokenizer.model", "paligemma_tokenizer.model"):
            if (folder / name).is_file():
                return folder / name
        models = sorted(file for file in folder.glob("*.model") if file.is_file())
        if len(models) > 1:
            raise CheckpointError(f"tokenizer in {folder}", expected="one .model file",
                                  received=", ".join(file.name for file in models),
                                  way_out="Say which one with the tokenizer option.")
        if models:
            return models[0]
    return None


def _shards(directory: Path) -> list[Path]:
    index = JsonFields.read(directory / SHARD_INDEX)
    weight_map = index.fields("weight_map")
    if weight_map is None or not weight_map.values:
        raise index.error("weight_map", "an object from tensor name to file name")
    names = {weight_map.text(key) or "" for key in weight_map.values}
    for name in sorted(names):
        if Path(name).name != name or not os.path.isfile(directory / name):
            raise CheckpointError(f"shard '{name}' of {directory}", expected="a file in that directory",
                                  received="no such file", way_out="Download the missing shard.")
    return [directory / name for name in sorted(names)]


def _not_a_checkpoint(directory: Path) -> CheckpointError:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return CheckpointError(str(directory), expected="a readable directory", received=str(error),
                               way_out="Check its permissions.")
    if "params" in names or not set(names).isdisjoint(ORBAX_MARKS):
        received = "a JAX (orbax) checkpoint"
        way_out = "Convert it with openpi's examples/convert_jax_model_to_pytorch.py."
    elif "adapter_model.safetensors" in names:
        received, way_out = "a LoRA adapter alone", "Merge it into its base model and save that."
    elif "pretrained_model" in names:
        received, way_out = "a lerobot training folder", f"Give {directory / 'pretrained_model'}."
    elif pickles := [name for name in names if Path(name).suffix in PICKLES]:
        return pickled(directory / pickles[0])
    else:
        received = "the files " + ", ".join(names[:8] + ["..."] * (len(names) > 8)) if names else "an empty directory"
        way_out = "Give the directory that holds model.safetensors."
    return CheckpointError(str(directory), expected=f"a directory with {WEIGHTS}", received=received, way_out=way_out)

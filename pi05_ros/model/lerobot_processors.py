"""lerobot's policy_preprocessor.json and policy_postprocessor.json: how data was normalised (PI05_SPEC section 11b).

A pipeline is a list of steps, each with its settings (`config`) and, where it has numbers, a `state_file` of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pi05_ros.errors import CheckpointError
from pi05_ros.model.checkpoint_config import Kind
from pi05_ros.model.json_fields import JsonFields
from pi05_ros.model.norm_stats import KINDS, Processing, checked_stats
from pi05_ros.model.stored_tensors import unreadable
from pi05_ros.schema import Conventions, FieldStats, NormMode, NormStats

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
RELATIVE = ("relative_actions_processor", "delta_actions_processor")  # the second is its name in lerobot 0.5.1
KNOWN_STEPS = (NORMALIZER, UNNORMALIZER, *RELATIVE, "absolute_actions_processor", "rename_observations_processor",
               "to_batch_processor", "pi05_prepare_state_tokenizer_processor_step", "pi0_new_line_processor",
               "tokenizer_processor", "device_processor")
RELATIVE_SETTINGS = {"enabled", "exclude_joints", "action_names"}
MODES: dict[str, NormMode] = {"QUANTILES": "quantile", "MEAN_STD": "zscore", "IDENTITY": "identity"}
DEFAULT_MODE: dict[Kind, NormMode] = {"pi05": "quantile", "pi0": "zscore"}  # lerobot's own
EPS = 1e-8  # the only one that normalising implements for lerobot
NO_STATS = FieldStats()  # where no normalisation needs any


def read_processors(directory: Path, config: JsonFields, kind: Kind, robot_action_dim: int | None) -> Processing:
    """Read both pipelines of `directory`; without them, what `config` (config.json) tells.

    Raises:
        CheckpointError: broken or absent files, a step or a normalisation that is not implemented.
    """
    if not (directory / PREPROCESSOR).exists():
        declared = config.fields("normalization_mapping")
        modes = [DEFAULT_MODE[kind] if declared is None else _mode(declared, name) for name in ("STATE", "ACTION")]
        told = config.flag("use_relative_actions") is not None
        delta = _delta_actions(config, None, robot_action_dim) if told else None
        return Processing(_conventions(kind, modes[0], modes[1], delta), None, None, _notes(config, kind, None))
    before = _steps(directory / PREPROCESSOR)
    unnormalizer = normalizer = _only(before, NORMALIZER, directory / PREPROCESSOR)
    if (directory / POSTPROCESSOR).exists():  # each holds all statistics; what is applied to actions is this one's
        unnormalizer = _only(_steps(directory / POSTPROCESSOR), UNNORMALIZER, directory / POSTPROCESSOR)
    state_norm, state = _field(normalizer, "observation.state", "STATE")
    action_norm, actions = _field(unnormalizer, "action", "ACTION")
    relative = next((step for step in before if step.text("registry_name") in RELATIVE), None)
    conventions = _conventions(kind, state_norm, action_norm, _delta_actions(config, relative, robot_action_dim))
    stats = None if state is None or actions is None else NormStats(state=state, actions=actions)
    return Processing(conventions, stats, _state_file(normalizer), _notes(config, kind, relative, conventions))


def _conventions(kind: Kind, state_norm: NormMode, action_norm: NormMode,
                 delta_actions: tuple[bool, ...] | None) -> Conventions:
    return Conventions("lerobot", "bilinear", state_norm, action_norm, "pi05" if kind == "pi05" else "pi0_joined",
                       delta_actions)


def _notes(config: JsonFields, kind: Kind, relative: JsonFields | None,
           conventions: Conventions | None = None) -> tuple[str, ...]:
    notes = []
    if kind == "pi05" and relative is None:  # that step is younger than the change, so its presence settles it
        notes.append("The files do not tell which lerobot trained it: 0.4.x padded the state in the prompt to 32 "
                     "numbers, and such a checkpoint needs prompt_format pi05_padded_state.")
    if conventions and conventions.state_norm == conventions.action_norm == "identity":
        notes.append("It declares no normalisation, as base models do: fine-tune it before it moves a robot.")
    if config.integer("rtc_training_max_delay", 0, 1000):
        notes.append("It was trained for real-time chunking: chunk_mode trained (backend eager) makes use of it.")
    return tuple(notes)


def _steps(file: Path) -> list[JsonFields]:
    steps = JsonFields.read(file).objects("steps")
    for step in steps:
        if step.text("registry_name") not in KNOWN_STEPS:
            raise step.error("registry_name", "a step this package knows", way_out="If the step changes no number, "
                             "take it out of the file; else this checkpoint cannot be run here.")
    return steps


def _only(steps: list[JsonFields], name: str, file: Path) -> JsonFields:
    found = [step for step in steps if step.text("registry_name") == name]
    if len(found) != 1:
        raise CheckpointError(str(file), expected=f"one step '{name}'", received=f"{len(found)}",
                              way_out="Save the checkpoint again with lerobot 0.4 or later.")
    return found[0]


def _field(step: JsonFields, feature: str, feature_type: str) -> tuple[NormMode, FieldStats | None]:
    """How one vector is normalised, and its statistics: None if they are needed and the checkpoint has no such file."""
    config = step.fields("config") or JsonFields(step.path)
    if config.number("eps") not in (None, EPS):
        raise config.error("eps", f"{EPS:g}", way_out="Another value is not implemented.")
    features, modes = config.fields("features"), config.fields("norm_map")
    if features is None or not features.values:
        return "identity", NO_STATS
    chosen = config.texts("normalize_observation_keys")
    if feature_type == "STATE" and (feature not in features.values or chosen is not None and feature not in chosen):
        return "identity", NO_STATS
    mode: NormMode = "identity" if modes is None else _mode(modes, feature_type)
    file = _state_file(step)
    if mode == "identity" or file is None:
        return mode, NO_STATS if mode == "identity" else None
    arrays = _read_arrays(file, feature)
    stats = checked_stats(f"'{feature}' in {file}", {k: None if k not in arrays else arrays[k].numpy() for k in KINDS},
                          mode)
    described, width = features.fields(feature), next(iter(arrays.values())).numel()
    shape = described.numbers("shape") if described else None
    if described and shape is not None and shape.tolist() != [width]:
        raise described.error("shape", f"[{width}], as the statistics have")
    return mode, stats


def _mode(modes: JsonFields, feature_type: str) -> NormMode:
    name = modes.text(feature_type) or "IDENTITY"
    if name not in MODES:
        raise modes.error(feature_type, " or ".join(MODES), way_out="Another normalisation is not implemented.")
    return MODES[name]


def _state_file(step: JsonFields) -> Path | None:
    name = step.text("state_file")
    if name is None:
        return None
    file = step.path.parent / name
    if Path(name).name != name or not os.path.isfile(file):
        raise step.error("state_file", f"a file in {step.path.parent}", f"'{name}', which is not there",
                         "Download the file too; it holds the normalisation statistics.")
    return file


def _read_arrays(file: Path, feature: str) -> dict[str, torch.Tensor]:
    """{kind: float32 [d]} of one feature, from keys such as `observation.state.q01`."""
    try:
        arrays = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(file, error) from error
    found = {key.removeprefix(feature + "."): array for key, array in arrays.items() if key.startswith(feature + ".")}
    found = {kind: array.float() for kind, array in found.items() if kind in KINDS}
    if not found:
        raise CheckpointError(f"'{feature}' in {file}", expected="its " + ", ".join(KINDS),
                              received="keys " + ", ".join(sorted(arrays)[:6]), way_out="Save the checkpoint again.")
    return found


def _delta_actions(config: JsonFields, step: JsonFields | None, width: int | None) -> tuple[bool, ...] | None:
    """Which action dimensions are differences from the state. A joint is excluded by a part of its name."""
    settings = (step.fields("config") if step else None) or JsonFields(config.path)
    declared = config.flag("use_relative_actions")
    enabled = settings.flag("enabled") if step else declared
    if step and declared is not None and declared != bool(enabled):
        raise config.error("use_relative_actions", f"{not declared}, as {step.path.name} has",
                           way_out="The files do not belong together; download them again.")
    if not enabled:
        return None if width is None else (False,) * width
    unknown = [name for name, value in settings.values.items() if value and name not in RELATIVE_SETTINGS]
    if unknown or width is None:
        what = f"no setting '{unknown[0]}' of relative actions" if unknown else "output_features.action.shape"
        raise CheckpointError(str(settings.path), expected=what, received="it" if unknown else "none",
                              way_out="Save the checkpoint again with a released lerobot.")
    excluded, names = settings.texts("exclude_joints"), settings.texts("action_names")
    excluded = config.texts("relative_exclude_joints") if excluded is None else excluded
    names = config.texts("action_feature_names") if names is None else names
    tokens = [name.lower() for name in excluded or () if name]
    relative = [not any(token in name.lower() for token in tokens) for name in (names or ())[:width]]
    return tuple(relative + [True] * (width - len(relative)))

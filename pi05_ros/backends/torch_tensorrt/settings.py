"""Settings of torch_tensorrt.dynamo.compile: which a user may set, and that the installed release has each of them.

compile() ends in **kwargs: a misspelt or dropped setting would be ignored without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pi05_ros.errors import BackendError, ConfigError

# What follows from what an engine is here. min_block_size: below it compile() hands the PyTorch module back as it is,
# whatever require_full_compilation says (2.13.0).
OURS: Mapping[str, Any] = {"require_full_compilation": True, "min_block_size": 1, "cache_built_engines": False,
                           "reuse_cached_engines": False}
# Arguments that are not settings, that would undo the above, or whose work `pi05 build` does.
NOT_TO_SET = frozenset({*OURS, "exported_program", "inputs", "arg_inputs", "kwarg_inputs", "device", "dryrun",
                        "torch_executed_ops", "torch_executed_modules", "fallback_data_dependent_ops",
                        "pass_through_build_failures", "timing_cache_path", "engine_cache_dir", "engine_cache_size",
                        "custom_engine_cache", "strip_engine_weights", "refit_identical_engine_weights",
                        "enabled_precisions", "use_explicit_typing", "enable_autocast", "autocast_low_precision_type",
                        "enable_weight_streaming", "enable_resource_partitioning", "dynamically_allocate_resources",
                        "use_distributed_mode_trace", "engine_capability", "use_python_runtime", "kwargs"})


def check_names(settings: Mapping[str, Any]) -> None:
    """ConfigError for a setting that is not for a user to set, or is no plain value."""
    for name, value in settings.items():
        if name in NOT_TO_SET:
            raise ConfigError(f"torch_tensorrt setting '{name}'", expected="not to be set", received=repr(value),
                              way_out="Leave it out: it follows from what an engine of this package is.")
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"torch_tensorrt setting '{name}'", expected="true, false, a number or a word",
                              received=repr(value), way_out="See config/torch_tensorrt.yaml.")


def arguments(compile: Callable[..., Any], settings: Mapping[str, Any], version: str) -> dict[str, Any]:
    """All settings to call `compile` with: the user's, ours, and strong typing where a release has to be told.

    Raises:
        ConfigError: a setting that `compile` does not have.
        BackendError: a release without strong typing, or without what an engine here needs.
    """
    check_names(settings)
    known = {name: parameter for name, parameter in inspect.signature(compile).parameters.items()
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)}
    for name in settings:
        if name not in known:
            near = [each for each in known if name.split("_")[0] in each and each not in NOT_TO_SET]
            raise ConfigError(f"torch_tensorrt setting '{name}'", received="a name that it does not have",
                              expected=f"an argument of dynamo.compile of torch_tensorrt {version}",
                              way_out=(f"Near it: {', '.join(near)}. " if near else "") + "Correct it or leave it out; "
                              "compile() would ignore it.")
    told = {"use_explicit_typing": True} if "use_explicit_typing" in known else {}
    lacks = [name for name in (*OURS, "timing_cache_path", "device", "arg_inputs") if name not in known]
    if "enabled_precisions" in known and not told:
        lacks.append("use_explicit_typing")
    if lacks:
        raise BackendError(f"torch_tensorrt {version}", expected="a release with strongly typed networks and the "
                           f"arguments {', '.join(lacks)} of dynamo.compile", received="one without",
                           way_out="Install one that fits this PyTorch: pip install 'pi05_ros[torch_tensorrt]'.")
    return {**settings, **OURS, **told}

"""The same by NVIDIA's ModelOpt: its predefined configurations, narrowed to a recipe's layers by its own patterns.

ModelOpt's predefined lists of exceptions switch every `*vision_tower*` and `*multi_modal_projector*` off, and would
leave out the whole vision stage without a word; here only the number formats are taken from them, and what is quantised
is what the recipe says. ModelOpt is an extra (pip install 'pi05_ros[quantize]'); what it makes is read without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from pi05_ros.errors import BackendError, CheckpointError
from pi05_ros.model.low_precision import Precision
from pi05_ros.model.pi05 import Pi05
from pi05_ros.quantize.calibration import Statistics
from pi05_ros.quantize.ptq import Amax, input_amax, with_layers
from pi05_ros.quantize.recipes import Recipe

PREDEFINED = {"fp8": "FP8_DEFAULT_CFG", "fp8_token": "FP8_PER_CHANNEL_PER_TOKEN_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
QUANTIZERS = ("weight_quantizer", "input_quantizer")


def library() -> Any:
    """modelopt.torch.quantization. Raises BackendError where it is not installed."""
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise BackendError("ModelOpt", expected="nvidia-modelopt and what it needs", received=str(error),
                           way_out="pip install 'pi05_ros[quantize]', or quantise with --by max.") from error
    return mtq


def version() -> str:
    return f"nvidia-modelopt {metadata.version('nvidia-modelopt')}"


def configuration(recipe: Recipe) -> dict[str, Any]:
    """ModelOpt's configuration of a recipe: everything off, then the formats of its predefined ones by our patterns."""
    mtq = library()
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern, precision in recipe.layers.items():
        predefined = getattr(mtq, PREDEFINED[precision])["quant_cfg"]
        for quantizer in QUANTIZERS:
            cfg = next(one["cfg"] for one in predefined if one["quantizer_name"] == f"*{quantizer}" and "cfg" in one)
            entries.append({"quantizer_name": f"{pattern}.{quantizer}", "cfg": copy.deepcopy(cfg)})
    return {"quant_cfg": entries, "algorithm": "max"}


def modelopt_maxima(model: Pi05, recipe: Recipe, chosen: Mapping[str, Precision],
                    calibrate: Callable[[Pi05], Statistics]) -> tuple[dict[str, Amax], Statistics]:
    """What ModelOpt finds while `calibrate` runs the model it is given, joined with what the statistics know of samples
    that ran before (a calibration that was resumed); and the statistics.

    Raises:
        CheckpointError: ModelOpt quantised other layers than the recipe says, or saw what our statistics did not.
        BackendError: ModelOpt is not installed.
    """
    mtq = library()
    converted = with_layers(model, {name: _own(model.get_submodule(name)) for name in chosen})
    kept: list[Statistics] = []
    mtq.quantize(converted, configuration(recipe), lambda running: kept.append(calibrate(running)))
    enabled = {name.rpartition(".")[0] for name, module in converted.named_modules()
               if name.endswith(QUANTIZERS) and getattr(module, "is_enabled", False)}
    if enabled != set(chosen):
        raise CheckpointError("ModelOpt", expected=f"{len(chosen)} layers of recipe '{recipe.name}'",
                              received=f"others, such as {sorted(enabled ^ set(chosen))[0]}",
                              way_out="This version of ModelOpt reads patterns in another way; use --by max.")
    return {name: _joined(model, name, precision, converted.get_submodule(name), kept[0])
            for name, precision in chosen.items()}, kept[0]


def _own(linear: nn.Module) -> nn.Linear:
    """A module of its own with the same tensors: ModelOpt changes the class of what it converts."""
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    made.weight, made.bias = linear.weight, linear.bias
    return made


def _joined(model: Pi05, name: str, precision: Precision, converted: nn.Module, statistics: Statistics) -> Amax:
    weight: Tensor = getattr(converted.weight_quantizer, "amax").detach().float()  # noqa: B009
    weight = weight.reshape(-1, 1) if precision == "fp8_token" else weight.reshape(1)
    ours = input_amax(model, name, precision, statistics)
    theirs = getattr(converted.input_quantizer, "amax", None)
    if ours is not None and theirs is not None and float(theirs.float().amax()) > float(ours):
        raise CheckpointError(f"ModelOpt's calibration of {name}", expected=f"at most {float(ours):.8g}, as was seen",
                              received=f"{float(theirs.float().amax()):.8g}", way_out="Use --by max, and report this.")
    return Amax(weight, ours)

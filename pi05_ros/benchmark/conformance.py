"""Recorded runs of the reference implementation against our eager forward, intermediate by intermediate.

A file is an .npz: inputs under `in/`, recorded tensors under `out/`, a `meta` dictionary. Weights come from the recipe
unless a checkpoint is given. Token-wise tensors are thinned in the files (`out/stride_tok_dim`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pi05_ros.benchmark.error import relative_error
from pi05_ros.config import GemmaConfig, Pi05Config, SiglipConfig, tiny_config
from pi05_ros.errors import ConfigError
from pi05_ros.model import flow, weights
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.pi05 import Pi05, PrefixCache
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.schema import CAMERAS, Guidance, Schedule

# Largest relative error allowed: (actions, intermediates). The bfloat16 ones are noise of kernel order (PI05_SPEC 14).
GATES = {"float32": (1e-5, 1e-5), "bfloat16": (6e-3, 2e-2)}


@dataclass(frozen=True)
class Comparison:
    """Relative error (norm of the difference over norm of the reference) of one recorded tensor, and its gate."""

    name: str
    error: float
    gate: float

    @property
    def ok(self) -> bool:
        return self.error <= self.gate  # false for NaN


@dataclass(frozen=True)
class Case:
    """One file: its arrays and what its `meta` says."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def dtype(self) -> str:
        return self.meta["config"]["dtype"]

    @property
    def cameras(self) -> list[str]:
        found = [key.removeprefix("in/image/") for key in self.arrays if key.startswith("in/image/")]
        return sorted(found, key=lambda name: CAMERAS.index(name) if name in CAMERAS else len(CAMERAS))

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def image_mask(self) -> Tensor:
        return torch.stack([self.tensor(f"in/image_mask/{camera}") for camera in self.cameras], dim=1)


def read_case(path: Path) -> Case:
    """Raises ConfigError for a file that is not of this layout."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}'", expected="a conformance file (.npz, no pickles)", received=str(error),
                          way_out="Give files of the layout described in test/data/conformance/README.md.") from error
    if "meta" not in arrays and "in/prev" not in arrays:
        raise ConfigError(f"'{path}'", expected="the key 'meta', or 'in/prev' for real-time chunking",
                          received=", ".join(sorted(arrays)[:8]),
                          way_out="Give files of the layout described in test/data/conformance/README.md.")
    return Case(path, arrays, ast.literal_eval(str(arrays["meta"])) if "meta" in arrays else {})


def case_config(case: Case) -> Pi05Config:
    """The model a file was recorded with; the tag tells which RoPE frequencies its bfloat16 mode had."""
    recorded = case.meta["config"]
    tiny = tiny_config()
    known = {"tiny_vlm": tiny.prefix, "tiny_expert": tiny.expert,
             "gemma_2b": GemmaConfig(width=2048, mlp_dim=16384, vocab_size=257152),
             "gemma_300m": GemmaConfig(width=1024, mlp_dim=4096)}
    for key in ("paligemma_variant", "action_expert_variant"):
        if recorded[key] not in known:
            raise ConfigError(f"{case.path.name}: {key}", expected="one of " + ", ".join(known), received=recorded[key],
                              way_out="Give the recorded weights with --weights.")
    rounded = case.dtype == "bfloat16" and "fp32rope" not in case.meta["tag"]
    return tiny_config(
        vision=tiny.vision if recorded["paligemma_variant"].startswith("tiny") else SiglipConfig(),
        prefix=known[recorded["paligemma_variant"]],
        expert=known[recorded["action_expert_variant"]],
        kind="pi05" if recorded["pi05"] else "pi0",
        action_horizon=recorded["action_horizon"],
        max_token_len=recorded["max_token_len"],
        num_cameras=len(case.cameras),
        rope_inv_freq="bfloat16" if rounded else "float32",
    )


def recorded_source(case: Case, checkpoint: Path | None) -> weights.WeightSource:
    """The recipe's weights, or the checkpoint's, for the model the file was recorded with."""
    if checkpoint is None:
        return RecipeSource(case_config(case), seed=case.meta.get("seed", 0))
    rounded = case.dtype == "bfloat16" and "fp32rope" not in case.meta["tag"]
    return open_checkpoint(checkpoint, action_horizon=case.meta["config"]["action_horizon"],
                           max_token_len=case.meta["config"]["max_token_len"],
                           rope_inv_freq="bfloat16" if rounded else "float32")


def load_model(case: Case, checkpoint: Path | None, device: str) -> Pi05:
    return weights.load(recorded_source(case, checkpoint), device, case.dtype)


@torch.no_grad()
def compare(path: Path, checkpoint: Path | None = None, device: str = "cpu") -> list[Comparison]:
    """Every recorded tensor of one file against ours."""
    case = read_case(path)
    if not case.meta:
        return list(_compare_guided(case, checkpoint, device))
    model, gates = load_model(case, checkpoint, device), GATES[case.dtype]
    ours = dict(run(case, model, device))
    valid = case.tensor("out/prefix_pad_masks")[:, :: int(case.arrays["out/stride_tok_dim"][0])]
    results = []
    for name, value in ours.items():
        if f"out/{name}" not in case.arrays:
            continue
        found, reference = value.float().cpu(), case.tensor(f"out/{name}")
        if name == "prefix_embs" or name[:1] in "kv" and name[1:].isdigit():
            found, reference = found[valid], reference[valid]
        results.append(Comparison(name, relative_error(found, reference), gates[0 if name == "actions" else 1]))
    return results


def run(case: Case, model: Pi05, device: str) -> Iterator[tuple[str, Tensor]]:
    """Our forward on the case's inputs: (recorded name, tensor), token-wise ones thinned as in the file."""
    thin, config = int(case.arrays["out/stride_tok_dim"][0]), model.config
    frames = [case.arrays[f"in/image/{camera}"] for camera in case.cameras]
    tokens, state = case.tensor("in/tokens").to(device), case.tensor("in/state").to(device)
    image_tokens = model.encode_images(model.prepare_images(frames, device))
    per_camera = image_tokens.unflatten(1, (len(frames), config.vision.num_patches)).transpose(0, 1)
    yield "image_features", per_camera[:, :, ::thin]
    yield "prefix_embs", model.embed_prefix(image_tokens, tokens)[:, ::thin]
    cache = model.prefill(image_tokens, case.image_mask().to(device), tokens, case.tensor("in/token_mask").to(device))
    for layer in range(config.prefix.depth):
        yield f"k{layer}", cache.keys[layer][:, 0, ::thin]
        yield f"v{layer}", cache.values[layer][:, 0, ::thin]
    yield from _run_expert(case, model, cache, state, device)


def _run_expert(case: Case, model: Pi05, cache: PrefixCache, state: Tensor,
                device: str) -> Iterator[tuple[str, Tensor]]:
    recorded: dict[str, list[Tensor]] = {"steps_x_t": [], "steps_v_t": [], "steps_time": [], "steps_adarms_cond": []}
    noise, steps = case.tensor("in/noise").to(device), int(case.meta["steps"])
    first: dict[str, Tensor] = {}

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        suffix, cond, block_starts = model.embed_suffix(x_t, t, state)
        if not first:
            first["suffix_embs_step0"] = suffix
            first["suffix_out_step0"] = model.run_expert(cache, suffix, cond, block_starts)
        v_t = model.velocity(cache, x_t, t, state)
        recorded["steps_x_t"].append(x_t)
        recorded["steps_v_t"].append(v_t)
        recorded["steps_time"].append(t.expand(len(x_t)))
        if cond is not None:
            recorded["steps_adarms_cond"].append(cond[:, 0])
        return v_t

    actions = flow.integrate(velocity, noise, steps)
    yield from first.items()
    yield from ((name, torch.stack(values)) for name, values in recorded.items() if values)
    yield "actions", actions


def _compare_guided(rtc: Case, checkpoint: Path | None, device: str) -> Iterator[Comparison]:
    """Guided real-time chunking: the observation and weights are those of the case the file's name points to."""
    observed = rtc.path.with_name(rtc.path.name.replace("_rtc_case_", "_case_").replace(".npz", "_steps10.npz"))
    case = read_case(observed)
    model = load_model(case, checkpoint, device)
    frames = [case.arrays[f"in/image/{camera}"] for camera in case.cameras]
    cache = model.prefill(model.encode_images(model.prepare_images(frames, device)), case.image_mask().to(device),
                          case.tensor("in/tokens").to(device), case.tensor("in/token_mask").to(device))
    for key in sorted(k for k in rtc.arrays if k.startswith(("out/", "weights/"))):
        *_, jacobian, schedule = key.split("/")
        guidance = Guidance(rtc.arrays["in/prev"], int(rtc.arrays["delay"]), int(rtc.arrays["end"]),
                            cast(Schedule, schedule), float(rtc.arrays["beta"]),
                            "vjp" if jacobian == "vjp" else "identity")
        if key.startswith("weights/"):
            value = torch.from_numpy(flow.guidance_weights(guidance))
        else:
            value = model.denoise(cache, rtc.tensor("in/noise").to(device), 10, guidance=guidance)
        yield Comparison(key.removeprefix("out/"), relative_error(value.cpu(), rtc.tensor(key)), GATES[case.dtype][0])

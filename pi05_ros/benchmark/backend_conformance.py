"""Recorded runs of the reference against any backend, by what its stages hand on: image features, K, V, actions.

The other recorded tensors are inside a stage, where only the eager forward can be looked into; they are named as not
compared. Rows of a batch run one by one, as some backends take no more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pi05_ros.backends import base
from pi05_ros.benchmark.conformance import GATES, Case, Comparison, read_case, recorded_source
from pi05_ros.benchmark.error import relative_error
from pi05_ros.errors import ConfigError

NOT_VALUES = {"stride_tok_dim", "prefix_pad_masks", "kv_dtype", "kv_shape", "prefix_out"}  # as compare() leaves out


def compare_backend(path: Path, backend: str, checkpoint: Path | None,
                    device: torch.device) -> tuple[list[Comparison], list[str]]:
    """What was compared, and the names of the recorded tensors that a backend does not show.

    Raises:
        BackendError: the backend cannot run the file's precision or model.
        ConfigError: the file is of another layout, or of real-time chunking.
    """
    case = read_case(path)
    if not case.meta:
        raise ConfigError(f"'{path.name}' with --backend", expected="a file that records one whole run",
                          received="one of guided real-time chunking",
                          way_out="Leave it out, or compare it without --backend.")
    stages = base.build(backend, recorded_source(case, checkpoint), device, case.dtype)
    rows = [_run(case, stages, row) for row in range(len(case.arrays["in/noise"]))]
    valid = case.tensor("out/prefix_pad_masks")[:, :: int(case.arrays["out/stride_tok_dim"][0])]
    results = []
    for name in rows[0]:
        found = torch.cat([row[name] for row in rows], dim=int(name == "image_features")).float().cpu()
        reference = case.tensor(f"out/{name}")
        if name[0] in "kv":
            found, reference = found[valid], reference[valid]
        results.append(Comparison(name, relative_error(found, reference), GATES[case.dtype][name != "actions"]))
    recorded = {key.removeprefix("out/") for key in case.arrays if key.startswith("out/")}
    return results, sorted(recorded - NOT_VALUES - set(rows[0]))


def _run(case: Case, stages: base.StageSet, row: int) -> dict[str, Tensor]:
    """One row of the batch through the stages: recorded name to tensor with a batch of 1, thinned as in the file."""
    thin, layers = int(case.arrays["out/stride_tok_dim"][0]), stages.config.prefix.depth
    put = lambda key: case.tensor(key)[row:row + 1].to(stages.device)  # noqa: E731
    frames: list[np.ndarray | None] = [case.arrays[f"in/image/{camera}"][row:row + 1] for camera in case.cameras]
    tokens = stages.vision.encode_images(stages.images.prepare_images(frames))
    features = tokens.unflatten(1, (len(frames), -1))[:, :, ::thin].transpose(0, 1).clone()
    cache = stages.prefix.prefill(tokens, case.image_mask()[row:row + 1].to(stages.device), put("in/tokens"),
                                  put("in/token_mask"))
    found = {f"{kind}{layer}": tensor[layer][:, 0, ::thin].clone() for layer in range(layers)
             for kind, tensor in (("k", cache.keys), ("v", cache.values))}
    actions = stages.expert.denoise(cache, put("in/noise"), int(case.meta["steps"]), put("in/state"))
    return {"image_features": features, **found, "actions": actions}

"""What float32 eager makes of observations, stage by stage: one stage's weights are in memory at a time.

Kept in a directory, it is made once for all exports of the same weights, and another machine judges its engines by it:

| file           | arrays                                                                                |
|----------------|---------------------------------------------------------------------------------------|
| reference.json | fingerprint of weights, of float8 scales; horizon; observations [{name, steps}]       |
| <k>.inputs.npz | pixels [N, 3, 224, 224], tokens int32 [T], noise [H, 32]                              |
| <k>.vision.npz | image_tokens [I, W]                                                                   |
| <k>.prefix.npz | keys, values [L, G, P, head_dim]                                                      |
| <k>.expert.npz | of n denoising steps: modulation_<n> [n, 2L+1, 3E], actions steps_<n> [H, 32]         |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pi05_ros.backends.tensorrt.graphs import adaptive_norms
from pi05_ros.config import Pi05Config
from pi05_ros.errors import ConfigError
from pi05_ros.model import images, schedule, weights
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.pi05 import Pi05, PrefixCache
from pi05_ros.model.time_embedding import time_embedding
from pi05_ros.model.weights import WeightSource
from pi05_ros.schema import ModelInputs

if TYPE_CHECKING:
    from pi05_ros.backends.tensorrt.fp8 import Scales

STAGES = ("vision", "prefix", "expert")
MANIFEST = "reference.json"
Arrays = Mapping[str, np.ndarray]
Watch = Callable[[str, int, int], None]  # (what is done, done, in all)


@dataclass(frozen=True, eq=False)
class Given:
    """One observation without padding: `arrays` as in <k>.inputs.npz; steps: the numbers of denoising steps."""

    name: str
    arrays: Arrays
    steps: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reference:
    """`made`: stage to its arrays, as in the files; only stages that were asked for."""

    given: Given
    made: dict[str, Arrays] = field(default_factory=dict)


def random_observation(config: Pi05Config, cameras: int, tokens: int, steps: Sequence[int],
                       random: np.random.Generator) -> Given:
    """Uniform pixels, any tokens, normal noise."""
    size = config.vision.image_size
    arrays = {"pixels": random.uniform(-1, 1, (cameras, 3, size, size)).astype(np.float32),
              "tokens": random.integers(0, config.prefix.vocab_size, tokens).astype(np.int32),
              "noise": random.standard_normal((config.action_horizon, config.action_dim)).astype(np.float32)}
    return Given(f"{cameras} cameras, {tokens} tokens", arrays, tuple(steps))


def recorded_observation(name: str, inputs: ModelInputs, noise: np.ndarray, steps: Sequence[int], config: Pi05Config,
                         resize: str = "pil") -> Given:
    """A batch of one: its cameras and tokens that are there; noise [1, H, 32]."""
    inputs = inputs.trimmed()
    pixels = images.prepare(inputs.frames, config.vision.image_size, resize, torch.device("cpu"))
    arrays = {"pixels": pixels[0].numpy(), "tokens": inputs.tokens[0].astype(np.int32), "noise": noise[0]}
    return Given(f"{name}: {len(inputs.frames)} cameras, {inputs.tokens.shape[1]} tokens", arrays, tuple(steps))


def make(source: WeightSource, observations: Sequence[Given], last: str, directory: Path | None = None,
         scales: Mapping[str, Scales] | None = None,
         watch: Watch = lambda what, done, total: None) -> list[Reference]:
    """The stages up to `last` for every observation; those that `directory` holds are read, others are added to it.
    With `scales` (backends/tensorrt/fp8.py) their Linears round weights and inputs to float8.

    Raises:
        ConfigError: the directory is of other weights or observations.
    """
    found = [Reference(given) for given in observations]
    if directory is not None:
        _open(directory, observations, {"fingerprint": fingerprint(source), "horizon": source.config.action_horizon,
                                        "scales": _digest(scales or {})})
    for stage in STAGES[:STAGES.index(last) + 1]:
        files = [directory / f"{k}.{stage}.npz" if directory else None for k in range(len(found))]
        todo = [k for k, file in enumerate(files) if file is None or not file.is_file()]
        model = None
        if todo:
            model = weights.load(source, "cpu", torch.float32, [stage],
                                 lambda done, total: watch(f"eager {stage}: weights", done, total))  # noqa: B023
            if scales:
                from pi05_ros.backends.tensorrt.fp8 import fake_quantise_linears  # needs the extra `export`

                fake_quantise_linears(model, scales)
        for k, (one, file) in enumerate(zip(found, files, strict=True)):
            watch(f"eager {stage}", k, len(found))
            if model is not None and k in todo:
                one.made[stage] = _run(stage, model, one)
                if file is not None:
                    _save(file, one.made[stage])
            else:
                assert file is not None
                one.made[stage] = dict(np.load(file))
        del model  # before the next one is loaded
    return found


def _open(directory: Path, observations: Sequence[Given], of: Mapping[str, Any]) -> None:
    """Begin a reference, or find the same one begun."""
    wanted = {**of, "observations": [{"name": given.name, "steps": list(given.steps)} for given in observations]}
    if not (directory / MANIFEST).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        for k, given in enumerate(observations):
            _save(directory / f"{k}.inputs.npz", given.arrays)
        (directory / MANIFEST).write_text(json.dumps(wanted, indent=1) + "\n")
    elif _stored(directory) != wanted or any(
            not np.array_equal(np.load(directory / f"{k}.inputs.npz")[name], array)
            for k, given in enumerate(observations) for name, array in given.arrays.items()):
        raise ConfigError(f"--reference {directory}", expected="these weights and observations", received="others",
                          way_out="Give another directory, or delete this one.")


def _digest(scales: Mapping[str, Scales]) -> str:
    """Which scales; '' without any."""
    digest = hashlib.sha256()
    for name, given in sorted(scales.items()):
        digest.update(name.encode() + given.weight.tobytes() + given.input.tobytes())
    return digest.hexdigest()[:32] if scales else ""


def _stored(directory: Path) -> dict[str, Any]:
    try:
        stored = json.loads((directory / MANIFEST).read_text())
        assert isinstance(stored, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ConfigError(f"--reference {directory}", expected=MANIFEST, received=str(error),
                          way_out="Give another directory, or delete this one.") from error
    return stored


def _save(file: Path, arrays: Arrays) -> None:
    """Whole or not at all: an interrupted run goes on from what it has."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    part.replace(file)


@torch.no_grad()
def _run(stage: str, model: Pi05, one: Reference) -> Arrays:
    given = {name: torch.from_numpy(array) for name, array in one.given.arrays.items()}
    if stage == "vision":
        return {"image_tokens": model.encode_images(given["pixels"][None])[0].numpy()}
    masks = [torch.ones(1, len(given[name]), dtype=torch.bool) for name in ("pixels", "tokens")]
    if stage == "prefix":
        image_tokens = torch.from_numpy(one.made["vision"]["image_tokens"])[None]
        cache = model.prefill(image_tokens, masks[0], given["tokens"][None], masks[1])
        return {"keys": cache.keys[:, 0].numpy(), "values": cache.values[:, 0].numpy()}
    keys, values = (torch.from_numpy(one.made["prefix"][name])[:, None] for name in ("keys", "values"))
    cache = PrefixCache(keys, values, torch.ones(1, keys.shape[3], dtype=torch.bool))
    actions = {f"steps_{n}": model.denoise(cache, given["noise"][None], n)[0].numpy() for n in one.given.steps}
    return actions | {f"modulation_{n}": _modulations(model, n) for n in one.given.steps}


def _modulations(model: Pi05, steps: int) -> np.ndarray:
    """Of every adaptive norm at every flow time of a run."""
    times = torch.tensor(schedule.time_grid(steps))
    cond = model.condition(time_embedding(times, model.config.expert.width))
    return torch.stack([norm.dense(cond) for norm in adaptive_norms(model)], dim=1).numpy()


def last_stage(graphs: Iterable[str]) -> str:
    """The last stage whose results are needed to judge `graphs`."""
    of = {"vision": "vision", "prefix": "prefix"}
    return max((of.get(graph, "expert") for graph in graphs), key=STAGES.index)

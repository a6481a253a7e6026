"""An export against float32 eager, graph by graph, on fresh random inputs; whoever runs the graphs is a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pi05_ros.backends.tensorrt.names import Manifest
from pi05_ros.config import Pi05Config
from pi05_ros.errors import BackendError
from pi05_ros.model import schedule, weights
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.pi05 import Pi05, PrefixCache
from pi05_ros.model.weights import WeightSource

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # (graph, inputs by name) to outputs by name
# Relative error that a graph may have: weights and products of 16 bits against float32.
LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def open_runner(name: str, directory: Path) -> Run:
    """`onnxruntime` or `torch` on this CPU, or engines of that flavour built of the export, on a GPU."""
    if name == "torch":
        from pi05_ros.backends.torch_tensorrt.program_runner import ProgramRunner

        return ProgramRunner(directory)
    if name == "onnxruntime":
        from pi05_ros.backends.tensorrt.onnx_cpu import OnnxRunner

        return OnnxRunner(directory)
    from pi05_ros.backends.tensorrt.engine_arrays import EngineRunner

    return EngineRunner(directory, name)


@dataclass(frozen=True)
class Compared:
    """Relative error of one output: norm of the difference over norm of eager's. layers: the same for each layer of
    keys and values."""

    graph: str
    output: str
    case: str
    error: float
    layers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """One observation: cameras, valid prompt tokens, denoising steps."""

    cameras: int
    tokens: int
    steps: int

    def __str__(self) -> str:
        return f"{self.cameras} cameras, {self.tokens} tokens, {self.steps} steps"


def cases_of(manifest: Manifest, count: int, random: np.random.Generator) -> list[Case]:
    """Within what the graphs take: the largest and the smallest first, then at random."""
    cameras, tokens = _range(manifest, "vision", 0, "pixels"), _range(manifest, "prefix", 0, "tokens")
    steps = (manifest.stages["loop"].steps,) if "loop" in manifest.stages else (10, 1, 3)
    ends = [(cameras[1], tokens[1]), (cameras[0], tokens[0])]
    drawn = [(int(random.integers(cameras[0], cameras[1] + 1)), int(random.integers(tokens[0], tokens[1] + 1)))
             for _ in range(max(0, count - 2))]
    return [Case(*pair, steps=int(steps[k % len(steps)] or 1)) for k, pair in enumerate([*ends, *drawn][:count])]


def _range(manifest: Manifest, graph: str, axis: int, name: str) -> tuple[int, int]:
    for spec in manifest.stages[graph].inputs if graph in manifest.stages else ():
        if spec.name == name:
            return spec.min[axis], spec.max[axis]
    return 1, 1


def compare(manifest: Manifest, source: WeightSource, run: Run, cases: list[Case],
            seed: int = 0) -> Iterator[Compared]:
    """Every graph of the export, each given what eager made of the graphs before it.

    Raises:
        BackendError: `source` has other weights than the export.
    """
    if manifest.source.get("fingerprint") != fingerprint(source):
        raise BackendError("weights to compare with", expected=f"those of {manifest.source.get('checkpoint')}",
                           received="others", way_out="Give the --checkpoint, or --size, that was exported.")
    model = weights.load(source, "cpu", torch.float32, ["vision", "prefix", "expert"]).eval()
    random = np.random.default_rng(seed)
    for case in cases:
        for graph, output, mine, eager in _outputs(manifest, model, run, case, random):
            layers = zip(mine, eager, strict=True) if graph == "prefix" and len(mine) == len(eager) else ()
            yield Compared(graph, output, str(case), _error(mine, eager), tuple(_error(*each) for each in layers))


def _error(mine: np.ndarray, eager: np.ndarray) -> float:
    if mine.shape != eager.shape:
        return float("inf")
    return float(np.linalg.norm(mine.astype(np.float64) - eager) / (np.linalg.norm(eager) or 1.0))


@torch.no_grad()
def _outputs(manifest: Manifest, model: Pi05, run: Run, case: Case,
             random: np.random.Generator) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(graph, output, as run, by eager)."""
    config, graphs = model.config, manifest.stages
    size = config.vision.image_size
    pixels = random.uniform(-1, 1, (case.cameras, 3, size, size)).astype(np.float32)
    image_tokens = model.encode_images(torch.from_numpy(pixels)[None])
    if "vision" in graphs:
        yield "vision", "image_tokens", run("vision", {"pixels": pixels})["image_tokens"], image_tokens[0].numpy()
    tokens = random.integers(0, config.prefix.vocab_size, case.tokens).astype(np.int32)
    cache = model.prefill(image_tokens, torch.ones(1, case.cameras, dtype=torch.bool), torch.from_numpy(tokens)[None],
                          torch.ones(1, case.tokens, dtype=torch.bool))
    held = {"keys": cache.keys[:, 0].numpy(), "values": cache.values[:, 0].numpy()}
    if "prefix" in graphs:
        made = run("prefix", {"image_tokens": image_tokens[0].numpy(), "tokens": tokens})
        yield from (("prefix", name, made[name], held[name]) for name in held)
    noise = random.standard_normal((config.action_horizon, config.action_dim)).astype(np.float32)
    if "step" in graphs:
        yield "step", "actions", _steps(run, held, noise, case.steps, config), _eager(model, cache, noise, case.steps)
    if "loop" in graphs:
        actions = run("loop", {**held, "noise": noise})["actions"]
        yield "loop", "actions", actions, _eager(model, cache, noise, graphs["loop"].steps or 1)


def _steps(run: Run, held: Mapping[str, np.ndarray], noise: np.ndarray, steps: int, config: Pi05Config) -> np.ndarray:
    """The graph `step` once for each flow time, with the rows that `modulation` made."""
    features = schedule.time_features(schedule.time_grid(steps), config.expert.width)
    rows, x = run("modulation", {"time_features": features})["modulation"], noise
    for row in rows:
        x = run("step", {**held, "x_t": x, "modulation": row, "dt": np.array([schedule.step_size(steps)])})["x_next"]
    return x


def _eager(model: Pi05, cache: PrefixCache, noise: np.ndarray, steps: int) -> np.ndarray:
    return model.denoise(cache, torch.from_numpy(noise)[None], steps)[0].numpy()

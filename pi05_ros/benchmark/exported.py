"""An export against float32 eager, graph by graph, on random or recorded observations; a `Run` runs the graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pi05_ros.backends.tensorrt.names import GRAPHS, Manifest
from pi05_ros.benchmark.reference import Given, Reference
from pi05_ros.errors import BackendError, ConfigError
from pi05_ros.model import schedule
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.weights import WeightSource

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]  # (graph, inputs by name) to outputs by name
# Relative error that a graph may have: weights and products of 16 bits against float32.
LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def open_runner(name: str, directory: Path, float16: str = "copy") -> Run:
    """`onnxruntime` or `torch` on this CPU, or engines of that flavour built of the export, on a GPU."""
    if name == "torch":
        from pi05_ros.backends.torch_tensorrt.program_runner import ProgramRunner

        return ProgramRunner(directory)
    if name == "onnxruntime":
        from pi05_ros.backends.tensorrt.onnx_cpu import OnnxRunner

        return OnnxRunner(directory, float16, torch.get_num_threads())
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


def draw_shapes(manifest: Manifest, count: int, random: np.random.Generator) -> list[tuple[int, int]]:
    """(cameras, tokens) within what the graphs take: the largest and the smallest first, then at random."""
    (fewest, most), (shortest, longest) = camera_range(manifest), token_range(manifest)
    drawn = [(int(random.integers(fewest, most + 1)), int(random.integers(shortest, longest + 1)))
             for _ in range(max(0, count - 2))]
    return [(most, longest), (fewest, shortest), *drawn][:count]


def camera_range(manifest: Manifest) -> tuple[int, int]:
    return _range(manifest, "vision", "pixels")


def token_range(manifest: Manifest) -> tuple[int, int]:
    return _range(manifest, "prefix", "tokens")


def _range(manifest: Manifest, graph: str, name: str) -> tuple[int, int]:
    for spec in manifest.stages[graph].inputs if graph in manifest.stages else ():
        if spec.name == name:
            return spec.min[0], spec.max[0]
    return 1, 1


def check(manifest: Manifest, source: WeightSource, observations: Sequence[Given]) -> None:
    """Raises BackendError if `source` has other weights than the export, ConfigError for a shape it does not take."""
    if manifest.source.get("fingerprint") != fingerprint(source):
        raise BackendError("weights to compare with", expected=f"those of {manifest.source.get('checkpoint')}",
                           received="others", way_out="Give the --checkpoint, or --size, that was exported.")
    for given in observations:
        for graph, name in (("vision", "pixels"), ("prefix", "tokens")):
            low, high = _range(manifest, graph, name)
            if graph in manifest.stages and not low <= len(given.arrays[name]) <= high:
                raise ConfigError(f"observation '{given.name}'", expected=f"{name} of {low} to {high}",
                                  received=str(len(given.arrays[name])),
                                  way_out="Export for its shape (--cameras, --tokens), or give others.")


def compare(manifest: Manifest, references: Sequence[Reference], run: Run) -> Iterator[Compared]:
    """Every graph of the export for every observation, each given what eager made of the graphs before it; but `step`
    takes the modulations that the export made."""
    modulations: dict[int, np.ndarray] = {}
    for graph in (graph for graph in GRAPHS if graph in manifest.stages):
        for one in references:
            for output, case, mine, eager in _outputs(manifest, graph, one, run, modulations):
                layers = zip(mine, eager, strict=True) if graph == "prefix" and len(mine) == len(eager) else ()
                yield Compared(graph, output, case, _error(mine, eager), tuple(_error(*each) for each in layers))


def _error(mine: np.ndarray, eager: np.ndarray) -> float:
    if mine.shape != eager.shape:
        return float("inf")
    return float(np.linalg.norm(mine.astype(np.float64) - eager) / (np.linalg.norm(eager) or 1.0))


def _outputs(manifest: Manifest, graph: str, one: Reference, run: Run,
             modulations: dict[int, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(output, case, as run, by eager)."""
    given, name, made = one.given.arrays, one.given.name, one.made
    if graph == "vision":
        image_tokens = run(graph, {"pixels": given["pixels"]})["image_tokens"]
        yield "image_tokens", name, image_tokens, made["vision"]["image_tokens"]
    elif graph == "prefix":
        cache = run(graph, {"image_tokens": made["vision"]["image_tokens"], "tokens": given["tokens"]})
        yield from ((output, name, cache[output], eager) for output, eager in made["prefix"].items())
    for steps in one.given.steps if graph in ("modulation", "step", "loop") else ():
        eager, case = made["expert"][f"steps_{steps}"], f"{name}, {steps} steps"
        if graph == "modulation" and steps not in modulations:  # the same for all observations
            features = schedule.time_features(schedule.time_grid(steps), manifest.config["expert"]["width"])
            modulations[steps] = run(graph, {"time_features": features})["modulation"]
            yield "modulation", f"{steps} steps", modulations[steps], made["expert"][f"modulation_{steps}"]
        elif graph == "step":
            yield "actions", case, _steps(run, one, modulations[steps], schedule.step_size(steps)), eager
        elif graph == "loop" and steps == manifest.stages["loop"].steps:
            yield "actions", case, run(graph, {**made["prefix"], "noise": given["noise"]})["actions"], eager


def _steps(run: Run, one: Reference, modulations: np.ndarray, dt: np.float32) -> np.ndarray:
    """The graph `step` once for each flow time."""
    x = one.given.arrays["noise"]
    for modulation in modulations:
        x = run("step", {**one.made["prefix"], "x_t": x, "modulation": modulation, "dt": np.array([dt])})["x_next"]
    return x

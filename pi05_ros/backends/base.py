"""The stages every backend implements, and how a user chooses who runs which.

Stage names: `images` (stage 0), `vision`, `prefix`, `expert`. One backend may run them all, or each stage another
(`vision=eager,expert=cuda`): hybrids are configuration. Nothing falls back by itself; what is not there raises.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pi05_ros.errors import BackendError
from pi05_ros.schema import Guidance

if TYPE_CHECKING:
    import torch

    from pi05_ros.config import Pi05Config
    from pi05_ros.model.pi05 import PrefixCache
    from pi05_ros.model.quant_config import Quantisation
    from pi05_ros.model.weights import Progress, WeightSource

STAGES = ("images", "vision", "prefix", "expert")
# name -> module with `build(stages, source, device, dtype, resize, on_progress) -> Stages`
BACKENDS = {"eager": "pi05_ros.backends.eager", "cuda": "pi05_ros.backends.cuda.build",
            "tensorrt": "pi05_ros.backends.tensorrt.load", "tensorrt_rtx": "pi05_ros.backends.tensorrt.load_rtx",
            "torch_tensorrt": "pi05_ros.backends.torch_tensorrt.load"}


class Stages(Protocol):
    """Shapes as in model/pi05.py; tensors live on the backend's device. A backend may refuse a batch above 1.

    A result may lie in a static buffer that the same stage overwrites in its next call; who needs it longer copies it.
    All work goes to the caller's current stream. `overlaps` says that calls of different stages may run at the same
    time on different streams: then no stage writes where another reads, if what it was given stays as it is until it
    is done (`denoise` must not write to the memory that `prefill` returns). `takes_padding` (True where it is not said)
    says that masked cameras and prompt slots may be among the inputs.
    """

    overlaps: bool

    def prepare_images(self, frames: Sequence[np.ndarray | None]) -> torch.Tensor:
        """N frames uint8 [B, h, w, 3] or None to float32 [B, N, 3, 224, 224] in [-1, 1]."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """To image tokens [B, N*256, W]."""

    def prefill(self, image_tokens: torch.Tensor, image_mask: torch.Tensor, tokens: torch.Tensor,
                token_mask: torch.Tensor) -> PrefixCache:
        """To the prefix KV cache."""

    def denoise(self, cache: PrefixCache, noise: torch.Tensor, num_steps: int, state: torch.Tensor | None = None,
                guidance: Guidance | None = None) -> torch.Tensor:
        """noise float32 [B, H, 32] to actions x_0, float32 [B, H, 32]."""


@dataclass(frozen=True)
class StageSet:
    """The chosen implementation of each stage, with the model's configuration and device."""

    images: Stages
    vision: Stages
    prefix: Stages
    expert: Stages
    config: Pi05Config
    device: torch.device
    names: Mapping[str, str]  # stage -> backend
    quantisation: Quantisation | None = None

    @property
    def runs(self) -> dict[str, str]:
        """Quantised layer -> how its products run, as the backends of the stages say now (`Stages`)."""
        stages = {id(one): one for one in (self.images, self.vision, self.prefix, self.expert)}
        return {layer: how for one in stages.values() for layer, how in getattr(one, "runs", {}).items()}

    def how_layers_run(self) -> str:
        """In words: `51 layers FP8`; nothing where no backend says it."""
        return ", ".join(f"{count} layers {how}" for how, count in Counter(self.runs.values()).items())


def parse_choice(choice: str) -> dict[str, str]:
    """`eager` or `vision=cuda,expert=eager` (stages left out are eager) to {stage: backend}."""
    if "=" not in choice:
        chosen = dict.fromkeys(STAGES, choice.strip())
    else:
        chosen = dict.fromkeys(STAGES, "eager")
        for pair in choice.split(","):
            stage, _, name = (part.strip() for part in pair.partition("="))
            if stage not in STAGES:
                raise BackendError(f"backend '{choice}'", expected=f"stages among {', '.join(STAGES)}",
                                   received=f"'{stage}'", way_out="Write for example vision=eager,expert=eager.")
            chosen[stage] = name
    for stage, name in chosen.items():
        if name not in BACKENDS:
            raise BackendError(f"backend of stage '{stage}'", expected=f"one of {', '.join(sorted(BACKENDS))}",
                               received=f"'{name}'",
                               way_out=f"This version has no backend '{name}'; use backend 'eager'.")
    return chosen


def build(choice: str, source: WeightSource, device: str | torch.device = "cpu", dtype: str = "float32",
          resize: str = "pil", on_progress: Progress | None = None) -> StageSet:
    """Load the weights of `source`, each once, into the backends chosen for the stages.

    Raises:
        BackendError: unknown backend or device, with what is available.
        CheckpointError: from reading the weights.
    """
    chosen, device = parse_choice(choice), check_device(device)
    built = {}
    for name in dict.fromkeys(chosen.values()):
        stages = [stage for stage in STAGES if chosen[stage] == name]
        module = importlib.import_module(BACKENDS[name])
        built[name] = module.build(stages, source, device, dtype, resize, on_progress)
    return StageSet(**{stage: built[name] for stage, name in chosen.items()}, config=source.config, device=device,
                    names=chosen, quantisation=source.quantisation)


def check_device(device: str | torch.device) -> torch.device:
    """`cpu`, `cuda`, `cuda:1` to a device that exists; `auto` takes the GPU where there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise BackendError("device", expected="cpu, cuda, cuda:<number> or auto", received=repr(device),
                           way_out="Choose one of them.") from error
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise BackendError("device", expected=f"one of {count} CUDA devices" if count else "a CUDA device",
                           received=f"'{parsed}'" + ("" if count else ", but PyTorch sees no CUDA device"),
                           way_out="Check nvidia-smi and the PyTorch build (torch.version.cuda), or use device 'cpu'.")
    return parsed

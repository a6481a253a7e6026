"""A backend that runs a quantised model, against the model before quantisation: what `validate.compare` says of eager.

Each stage alone, on the reference's own input to it, and the whole forward. How layers ran is the backend's own word
(`StageSet.runs`): layers it does not name did not run, and those that it simulates or multiplies in a wider form are
named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pi05_ros.backends.base import StageSet
from pi05_ros.errors import CheckpointError
from pi05_ros.model.pi05 import Pi05
from pi05_ros.quantize.recipes import unread_layers
from pi05_ros.quantize.samples import OnDevice, Sample
from pi05_ros.quantize.validate import STAGES, Comparison, Difference

LOW = "FP8"  # of StageSet.runs: as the recipe has it


@torch.no_grad()
def compare_backend(reference: Pi05, built: StageSet, samples: Sequence[Sample], num_steps: int, eager: Comparison,
                    resize: str = "pil", on_progress: Callable[[int, int], None] | None = None) -> Comparison:
    """`eager`: the comparison of the same model by eager, whose layer errors and proof of the weights hold here too.
    `steps` stays empty: backends do not show x_t.

    Raises:
        CheckpointError: the backend's model is not quantised.
    """
    if built.quantisation is None:
        raise CheckpointError("validation", expected="a backend with a quantised model", received="one without",
                              way_out="Give the output of `pi05 quantize`, or --recipe.")
    unread = unread_layers(reference.config)
    found = replace(eager, stages={stage: [] for stage in STAGES}, steps=[])
    for done, sample in enumerate(samples):
        _compare_one(reference, built, sample, num_steps, resize, found)
        if on_progress:
            on_progress(done + 1, len(samples))
    runs = built.runs  # now that they have run
    found.runs = Counter(runs.values())
    found.idle = [name for name in built.quantisation.layers if name not in runs and name not in unread]
    found.wider = [name for name, how in runs.items() if how != LOW]
    weights = {name: math.prod(built.quantisation.layers[name].shape) for name in runs}
    found.wider_share = sum(weights[name] for name in found.wider) / max(1, sum(weights.values()))
    return found


def _compare_one(reference: Pi05, built: StageSet, sample: Sample, num_steps: int, resize: str,
                 found: Comparison) -> None:
    """A backend's results lie in buffers that its next call overwrites: each is judged before that."""
    device = next(reference.parameters()).device
    batch = OnDevice.of([sample], device)
    masks = (batch.image_mask, batch.tokens, batch.token_mask)
    pixels = reference.prepare_images(batch.frames, device, resize)
    tokens = reference.encode_images(pixels)
    cache = reference.prefill(tokens, *masks)
    truth = reference.denoise(cache, batch.noise, num_steps, batch.state)
    seen = built.vision.encode_images(pixels)
    found.stages["vision"].append(Difference.of(seen, tokens))
    whole = built.expert.denoise(built.prefix.prefill(seen, *masks), batch.noise, num_steps, batch.state)
    found.stages["actions"].append(Difference.of(whole, truth))
    alone = built.prefix.prefill(tokens, *masks)
    found.stages["keys"].append(Difference.of(alone.keys, cache.keys))
    found.stages["values"].append(Difference.of(alone.values, cache.values))
    found.stages["expert"].append(
        Difference.of(built.expert.denoise(cache, batch.noise, num_steps, batch.state), truth))

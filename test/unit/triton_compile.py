"""Every kernel of the CUDA backend's forward compiled for GPUs that are not here, and what each takes of shared memory.

The forward runs on tensors without memory, and each launch compiles for the target instead. As a script it prints all
candidates: PYTHONPATH=. python test/unit/triton_compile.py
"""

from contextlib import contextmanager
from functools import partial

import fp8_models
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pi05_ros.backends.cuda import forward, forward_fp8, packing, quantised, shapes, tilings
from pi05_ros.backends.cuda.kernels import flow_step, norm, prefix_input
from pi05_ros.backends.cuda.tuning import Gpu
from pi05_ros.config import Pi05Config

META = torch.device("meta")
KIB = 1024
GPUS = [Gpu("A100", (8, 0), 108, 163 * KIB), Gpu("RTX 3090", (8, 6), 82, 99 * KIB),
        Gpu("RTX 4090", (8, 9), 128, 99 * KIB), Gpu("H200", (9, 0), 132, 227 * KIB),
        Gpu("B200", (10, 0), 148, 227 * KIB), Gpu("RTX 5090", (12, 0), 170, 99 * KIB)]


class MetaSource:
    """A full-size model without numbers."""

    config = Pi05Config()

    def get(self, name, shape, device):
        return torch.empty(shape, dtype=torch.bfloat16, device=device)


class Driver:
    """What Triton asks of a GPU when it compiles."""

    def __init__(self, gpu):
        self.capability = gpu.capability[0] * 10 + gpu.capability[1]

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):  # kernels are kept per device
        return self.capability

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling_for(gpu):
    """Launches compile for `gpu`, and nothing runs; yields {(kernel, warps, stages, tiles...): shared bytes}."""
    shared, run, active = {}, JITFunction.run, triton.runtime.driver._active

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        shared[self.__name__, *(f"{k}={v}" for k, v in options.items()), kernel.hash[:8]] = kernel.metadata.shared
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(Driver(gpu))
    try:
        yield shared
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def model():
    config = MetaSource.config
    return config, packing.pack(MetaSource(), META, ["vision", "prefix", "expert"]), shapes.allocate(config, META)


def compile_forward(gpu, choice):
    """Shared bytes of each kernel, with the tiles of `choice`."""
    config, w, b = model()
    mask = partial(torch.ones, dtype=torch.bool, device=META)
    tokens = torch.zeros(config.max_token_len, dtype=torch.int64, device=META)
    with compiling_for(gpu) as shared:
        forward.vision(w.vision, b, config, config.num_cameras)
        prefix_input.plan(mask(config.num_cameras), mask(config.max_token_len), tokens, config.vision.num_patches,
                          b.source, b.valid, b.positions)
        forward.prefix(w.prefix, b, choice, config, config.prefix_len)
        noise = torch.zeros(1, config.action_horizon, config.action_dim, device=META)
        flow_step.start(noise, mask(config.prefix_len), b.x_t, b.expert_valid, b.counters)
        forward.denoising_step(w.expert, b, choice, 0)
        forward.guide(b, 0)
    return shared


def compile_fp8_forward(gpu, choice):
    """The same of vision and prefix in FP8, whose products are the library's."""
    source = fp8_models.MetaSource(MetaSource.config, "fp8")
    runs = quantised.how_layers_run(source.quantisation, source.config, ["vision", "prefix"], (8, 9))
    w = packing.pack(source, META, ["vision", "prefix"], low=list(runs))
    b, config, scaled_mm = shapes.allocate(source.config, META), source.config, torch._scaled_mm
    torch._scaled_mm = lambda a, b, out=None, **_: a.new_empty(len(a), b.shape[1], dtype=torch.bfloat16)
    try:
        with compiling_for(gpu) as shared:
            forward_fp8.vision(w.vision, b, config, config.num_cameras)
            norm.row_sums(b.vision_x, w.vision.position, w.vision.position[0], forward_fp8.narrow(b.vision_normed),
                          b.vision_sums[0])
            forward_fp8.prefix(w.prefix, b, choice, config, config.prefix_len)
    finally:
        torch._scaled_mm = scaled_mm
    return shared


def compile_candidates(gpu):
    """(kernel, tiles, what shared_bytes promises, what it takes) of each candidate that fits."""
    config, w, b = model()
    works = tilings.workloads(w, b, config)
    for name, bound in tilings.shared_bytes(config).items():
        for tiles in tilings.candidates(config, gpu)[name]:
            with compiling_for(gpu) as shared:
                works[name](tiles)
            yield name, tiles, bound(tiles, gpu), max(shared.values())


if __name__ == "__main__":
    for gpu in GPUS:
        print(f"{gpu.name}, {gpu.shared_bytes} bytes of shared memory a block; kernels with the first tiles that fit:")
        for kernel, taken in compile_forward(gpu, tilings.first_that_fit(Pi05Config(), gpu)).items():
            print(f"  {kernel[0]:20s} {taken:7d}")
        for name, tiles, bound, taken in compile_candidates(gpu):
            print(f"  {name:18s} {tiles} at most {bound}, took {taken}{'' if taken <= bound else '  TOO MUCH'}")

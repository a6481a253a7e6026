"""The CUDA backend's kernels on GPUs with less shared memory than the one they were measured on."""

from dataclasses import replace

import pytest

from pi05_ros.config import Pi05Config

pytest.importorskip("triton", reason="needs Triton, which PyTorch's CPU build does not bring")
import triton_compile  # noqa: E402

from pi05_ros.backends.cuda import tilings  # noqa: E402
from pi05_ros.backends.cuda.tuning import Gpu  # noqa: E402
from pi05_ros.errors import BackendError  # noqa: E402

ADA, H200 = (next(gpu for gpu in triton_compile.GPUS if gpu.name == name) for name in ("RTX 4090", "H200"))


@pytest.mark.parametrize("gpu", triton_compile.GPUS, ids=lambda gpu: gpu.name)
def test_every_kernel_compiles_within_the_shared_memory_of(gpu):
    taken = triton_compile.compile_forward(gpu, tilings.first_that_fit(Pi05Config(), gpu))
    assert len(taken) >= 10 and all(shared <= gpu.shared_bytes for shared in taken.values()), taken


def test_the_shipped_table_holds_candidates_that_fit():
    fits = tilings.candidates(Pi05Config(), H200)
    assert all(tiles in fits[name] for name, tiles in vars(tilings.KNOWN_GPUS["NVIDIA H200"]).items())


def test_a_gpu_without_enough_shared_memory_is_refused():
    with pytest.raises(BackendError, match="shared memory a block"):
        tilings.candidates(Pi05Config(), Gpu("small", (8, 0), 1, 32 * 1024))


class Timer:
    """Every candidate is faster than the one before."""

    def __init__(self):
        self.runs = 0

    def __call__(self, work):
        self.runs += 1
        return 1.0 / self.runs


@pytest.fixture
def choose(monkeypatch, tmp_path):
    monkeypatch.setenv("PI05_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("PI05_TUNE", raising=False)
    config, weights, buffers = triton_compile.model()

    def run(gpu, **stages):
        timer = Timer()
        return tilings.tilings_for(config, replace(weights, **stages), buffers, gpu, timer), timer.runs

    return run


def test_an_unknown_gpu_is_measured_once(choose):
    fits = tilings.candidates(Pi05Config(), ADA)
    last = tilings.Tilings(**{name: tiles[-1] for name, tiles in fits.items()})
    assert choose(ADA) == (last, sum(map(len, fits.values())))
    assert choose(ADA) == (last, 0)


def test_only_the_kernels_of_the_stages_loaded_are_measured(choose):
    fits = tilings.candidates(Pi05Config(), ADA)
    chosen, runs = choose(ADA, expert=None)
    assert runs == len(fits["prefix_attention"]) and chosen.mlp_down == fits["mlp_down"][0]
    assert choose(ADA)[1] == sum(map(len, fits.values())) - runs


def test_a_gpu_of_the_table_is_measured_only_when_asked(choose, monkeypatch):
    known = replace(H200, name="NVIDIA H200")
    assert choose(known) == (tilings.KNOWN_GPUS["NVIDIA H200"], 0)
    monkeypatch.setenv("PI05_TUNE", "1")
    assert choose(known)[1] > 0 and choose(known)[1] == 0
    monkeypatch.setenv("PI05_TUNE", "0")
    assert choose(ADA) == (tilings.first_that_fit(Pi05Config(), ADA), 0)
    monkeypatch.setenv("PI05_TUNE", "yes")
    with pytest.raises(BackendError, match="0, 1 or nothing"):
        choose(ADA)

"""The reference on a GPU: the recorded runs again, and the full size."""

from pathlib import Path

import pytest
import torch

from pi05_ros.backends import base
from pi05_ros.benchmark import conformance
from pi05_ros.benchmark.error import relative_error, run_stages
from pi05_ros.benchmark.inputs import random_inputs
from pi05_ros.config import Pi05Config
from pi05_ros.model import weights
from pi05_ros.model.checkpoint import open_checkpoint
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.model.save import save_openpi

pytestmark = pytest.mark.gpu
FILES = sorted((Path(__file__).parents[1] / "data" / "conformance").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_reproduces_the_recorded_run_on_a_gpu(path):
    assert [r for r in conformance.compare(path, device="cuda") if not r.ok] == []


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A checkpoint of the full size on disk, as openpi's converter would have written it."""
    config = Pi05Config()
    model = weights.load(RecipeSource(config), "cuda", "bfloat16")
    return save_openpi(model, tmp_path_factory.mktemp("full"), config, dtype="bfloat16", expert_lm_head=True)


def test_the_full_size_loads_from_disk_and_bfloat16_agrees_with_float32(full_size):
    checkpoint = open_checkpoint(full_size)
    assert len(checkpoint.tensors) == 811 and checkpoint.kind == "pi05"
    inputs = random_inputs(checkpoint.config, torch.device("cuda"), cameras=3, tokens=200, seed=1)
    actions = {dtype: run_stages(base.build("eager", checkpoint, "cuda", dtype), inputs, 10)
               for dtype in ("float32", "bfloat16")}
    assert actions["bfloat16"].shape == (1, 50, 32)
    assert relative_error(actions["bfloat16"], actions["float32"]) < 2e-2  # PI05_SPEC section 14

"""On a machine with a GPU and TensorRT: exported, built, run, and compared with eager. Needs nothing but the two."""

import json

import numpy as np
import pytest
import torch

from pi05_ros.backends import base
from pi05_ros.cli.main import main
from pi05_ros.config import tiny_config
from pi05_ros.model.fingerprint import fingerprint
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.runtime.forward import Forward, Given
from pi05_ros.runtime.timing import StageTimer
from pi05_ros.schema import Guidance, ModelInputs

pytestmark = pytest.mark.gpu
FLAVOURS = {"tensorrt": ("tensorrt", "tensorrt_bindings"), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
            "torch_tensorrt": ("torch_tensorrt",)}
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def installed(flavour):
    from importlib.util import find_spec

    return any(find_spec(name) for name in FLAVOURS[flavour])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_engines_give_what_eager_gives(tmp_path, monkeypatch, capsys, flavour, dtype):
    if not installed(flavour):
        pytest.skip(f"needs {flavour}")
    if flavour == "tensorrt_rtx" and torch.cuda.get_device_capability()[0] in (9, 10, 11):
        pytest.skip("TensorRT-RTX is for desktop GPUs")
    if flavour != "torch_tensorrt":
        pytest.importorskip("onnxscript", reason="needs the extra export")
    from pi05_ros.backends.tensorrt.export import ExportOptions, export_stages
    from pi05_ros.backends.torch_tensorrt.program_files import export_programs

    source = RecipeSource(tiny_config())
    export = export_programs if flavour == "torch_tensorrt" else export_stages
    export(source, tmp_path / "export", ("vision", "prefix", "expert"),
           ExportOptions(dtype=dtype, cameras=3, tokens=48), origin={"fingerprint": fingerprint(source)})
    monkeypatch.setenv("PI05_ENGINES", str(tmp_path / "engines"))
    assert main(["build", str(tmp_path / "export"), "--flavour", flavour]) == 0
    assert all(engine["inspected"] for engine in json.loads(capsys.readouterr().out)["engines"])
    assert main(["engines", "--check", "--load"]) == 0

    device = torch.device("cuda")
    ours, eager = (base.build(choice, source, device, dtype) for choice in (flavour, "eager"))
    previous = np.random.default_rng(1).standard_normal((1, 10, 32)).astype(np.float32)
    for seed, (cameras, tokens, steps) in enumerate([(3, 48, 10), (1, 5, 1), (3, 48, 10), (3, 48, 10), (2, 17, 3)]):
        rng = np.random.default_rng(seed)
        inputs = ModelInputs([rng.integers(0, 256, (1, 90, 120, 3), dtype=np.uint8) for _ in range(cameras)],
                             np.ones((1, cameras), bool), rng.integers(3, 512, (1, tokens)),
                             np.ones((1, tokens), bool), np.zeros((1, 32), np.float32))
        noise = rng.standard_normal((1, 10, 32)).astype(np.float32)
        for guidance in (None, Guidance(previous, delay=2, end=8)):
            actions = []
            for stages in (ours, eager):
                forward = Forward(stages, Given(inputs, noise), steps, StageTimer(device))
                actions.append(forward.expert(forward.prefix(forward.vision()), guidance).cpu())
            error = (actions[0] - actions[1]).norm() / actions[1].norm()
            assert error < TOLERANCE[dtype], (cameras, tokens, steps, guidance is not None)

"""The guidance kernel against the reference's formulas, run by Triton's interpreter: no GPU needed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pi05_ros.model import flow
from pi05_ros.schema import Guidance

HORIZON, WIDTH = 10, 32


def velocity(x, t):
    """Smooth, and different in every element, row and time."""
    return torch.sin(3.0 * x + t) + 0.1 * torch.arange(HORIZON)[:, None]


def random_guidance(rng):
    end = int(rng.integers(0, HORIZON + 1))
    schedule = str(rng.choice(["linear", "exp", "ones", "zeros"]))
    return Guidance(rng.standard_normal((1, HORIZON, WIDTH), dtype=np.float32), delay=int(rng.integers(0, HORIZON)),
                    end=end, schedule=schedule, beta=float(rng.uniform(1, 20)))


def worst_error():
    """Of twenty random chunks, kernel against flow.guided."""
    from pi05_ros.backends.cuda.kernels import guidance as kernel

    rng, worst = np.random.default_rng(), 0.0
    for _ in range(20):
        guidance, num_steps = random_guidance(rng), int(rng.integers(1, 51))
        x = torch.from_numpy(rng.standard_normal((1, HORIZON, WIDTH), dtype=np.float32))
        expected = flow.integrate(flow.guided(velocity, guidance), x, num_steps)
        x, before, previous = x[0].clone(), x[0].clone(), torch.from_numpy(guidance.previous[0])
        reach, pull = (torch.from_numpy(table) for table in kernel.tables(guidance, num_steps))
        for step, t in enumerate(flow.time_grid(num_steps)):
            x += float(flow.step_size(num_steps)) * velocity(x, torch.tensor(t))
            kernel.guide(x, before, previous, reach[step:step + 1], pull[step])
        worst = max(worst, float((x - expected[0]).abs().max() / expected.abs().max()))
    return worst


def test_the_guidance_kernel_follows_the_reference():
    pytest.importorskip("triton", reason="needs Triton, which PyTorch's CPU build does not bring")
    done = subprocess.run([sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


if __name__ == "__main__":
    print(worst_error())

"""The sampler and its guidance (PI05_SPEC sections 6 and 12)."""

import numpy as np
import pytest
import torch

from pi05_ros.errors import ConfigError
from pi05_ros.model import flow
from pi05_ros.model.time_embedding import time_embedding
from pi05_ros.schema import Guidance


def test_the_time_grid_accumulates_in_float32():
    expected = [1.0, 0.9, 0.79999995, 0.69999993, 0.5999999, 0.4999999, 0.39999992, 0.29999992, 0.19999993, 0.09999993]
    assert flow.time_grid(10) == [float(np.float32(t)) for t in expected]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 20, 50])
def test_takes_exactly_the_steps_asked_for(steps):
    calls = []
    noise = torch.randn(1, 4, 32)
    target = torch.randn(1, 4, 32)

    def straight(x, t):
        calls.append(float(t))
        return noise - target

    torch.testing.assert_close(flow.integrate(straight, noise, steps), target, atol=1e-5, rtol=1e-5)
    assert len(calls) == steps


@pytest.mark.parametrize("steps", [0, -1, 100_000])
def test_refuses_an_impossible_number_of_steps(steps):
    with pytest.raises(ConfigError, match="num_steps"):
        flow.time_grid(steps)


def guidance(**changes):
    return Guidance(**{**dict(previous=np.zeros((1, 10, 32), np.float32), delay=3, end=8), **changes})


@pytest.mark.parametrize(("schedule", "expected"), [
    ("linear", [1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]),
    ("ones", [1] * 8 + [0, 0]),
    ("zeros", [1, 1, 1] + [0] * 7),
])
def test_guidance_weights_fall_from_the_delay_to_the_end(schedule, expected):
    np.testing.assert_allclose(flow.guidance_weights(guidance(schedule=schedule)), expected, rtol=1e-6)


def test_a_delay_beyond_the_end_guides_only_up_to_the_end():
    np.testing.assert_allclose(flow.guidance_weights(guidance(delay=9, end=4)), [1] * 4 + [0] * 6)


def test_both_jacobians_agree_where_the_velocity_does_not_depend_on_x():
    wanted = guidance(previous=np.random.default_rng(0).standard_normal((1, 10, 32)).astype(np.float32))
    x, results = torch.randn(1, 10, 32), []
    for jacobian in ("identity", "vjp"):
        velocity = flow.guided(lambda x, t: 0.0 * x + 0.5, Guidance(wanted.previous, 3, 8, jacobian=jacobian))
        results.append(velocity(x, torch.tensor(0.7)))
    torch.testing.assert_close(*results)


def test_a_trained_prefix_is_given_clean_at_time_0_and_stays():
    previous = np.random.default_rng(0).standard_normal((1, 10, 32)).astype(np.float32)
    seen, noise, target = [], torch.randn(1, 10, 32), torch.randn(1, 10, 32)

    def velocity(x, t):
        seen.append((x[0, :3].clone(), t))
        return noise - target

    x_0 = flow.integrate(velocity, noise, 5, guidance(previous=previous, trained=True))
    torch.testing.assert_close(x_0[0, 3:], target[0, 3:], atol=1e-5, rtol=1e-5)
    for given, _ in (*seen, (x_0[0, :3], None)):
        np.testing.assert_array_equal(given.numpy(), previous[0, :3])
    expected = np.repeat(np.array(flow.time_grid(5), np.float32)[:, None], 10, axis=1)
    expected[:, :3] = 0
    np.testing.assert_array_equal(torch.cat([t for _, t in seen]).numpy(), expected)


@pytest.mark.parametrize("change", [{"schedule": "cubic"}, {"jacobian": "numeric"}])
def test_refuses_unknown_guidance(change):
    with pytest.raises(ConfigError):
        flow.guided(lambda x, t: x, guidance(**change))


def test_the_time_embedding_has_sines_first_and_spans_the_periods():
    embedding = time_embedding(torch.tensor(0.5), 8)
    periods = 0.004 * 1000 ** (np.arange(4) / 3)
    expected = np.concatenate([np.sin(np.pi / periods), np.cos(np.pi / periods)])
    np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-6)

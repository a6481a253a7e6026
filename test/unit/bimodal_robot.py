"""Chunk after chunk at a set latency: a robot that integrates, and a policy that can pass an obstacle on either side.

The policy is a flow of its own, in closed form: chunks are drawn from two Gaussians, one around each way, so that
independent chunks change their mind. `python test/unit/bimodal_robot.py` prints a table of the modes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pi05_ros.model import flow
from pi05_ros.runtime.chunking import CommandLimits, JointLimits, JointMeasurement, plan_chunk
from pi05_ros.runtime.joining import Joining, JoinSettings
from pi05_ros.schema import ActionChunk, Observation
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.sim.smoothness import jerk
from pi05_ros.transforms.robot_file import ControllerSpec, JointSpec, Robot

PERIOD, HORIZON, WIDTH, STEPS = 0.02, 50, 32, 10
SPREAD = 0.01  # of a chunk around its way, in every action
SECONDS, EVERY = 4.0, 10
JOINTS = (JointSpec("x", -10.0, 10.0, 20.0), JointSpec("y", -10.0, 10.0, 20.0))
LIMITS = JointLimits(Robot("r", "joint_position", 1 / PERIOD, {}, 2, 2, JOINTS, (ControllerSpec("t", ("x", "y")),)))


def ways(state: np.ndarray, sides: tuple[float, float]) -> torch.Tensor:
    """[2, H, 32]: on from here in x at 0.5 rad/s, in y with a time constant of 0.4 s to one side or the other."""
    t = np.arange(HORIZON) * PERIOD
    out = np.zeros((2, HORIZON, WIDTH), np.float32)
    for k, side in enumerate(sides):
        out[k, :, 0] = 0.5 * t
        out[k, :, 1] = (side - state[1]) * (1 - np.exp(-t / 0.4))
    return torch.from_numpy(out)


def velocity_of(means: torch.Tensor):
    """v(x, t) = E[noise - x_0 | x_t] for x_0 from equal Gaussians around `means`, of deviation SPREAD."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        variance = t**2 + (1 - t) ** 2 * SPREAD**2
        off = x - (1 - t) * means  # [2, H, 32]
        share = torch.softmax(-(off**2).sum(dim=(1, 2)) / (2 * variance), dim=0)[:, None, None]
        x_0 = (share * (means + (1 - t) * SPREAD**2 / variance * off)).sum(dim=0, keepdim=True)
        return (x - x_0) / t

    return velocity


def drive(settings: JoinSettings, latency_s: float, seed: int, sides: tuple[float, float] = (-0.3, 0.3),
          fade_s: float = 0.0) -> np.ndarray:
    """Positions [T, 2] at the control period, for SECONDS. Every tenth control step, or as soon as the last chunk is
    published, a chunk begins; it is published `latency_s` after its observation."""
    command = CommandLimits(max_committed_s=1.0, stop_time_s=0.2, lead_s=0.02, fade_s=fade_s)
    rng, robot, running, now = np.random.default_rng(seed), JointIntegrator((0.0, 0.0)), None, 10**12
    joining = Joining(lambda actions, state: np.pad(actions - state, ((0, 0), (0, WIDTH - 2))))
    grid = (now + np.arange(round(SECONDS / PERIOD)) * PERIOD * 1e9).round().astype(int)
    positions, index = [], 0
    while now <= grid[-1]:
        state = robot.at(now)[0]
        guidance = joining.guidance(Observation({}, state, "", now), settings)
        velocity, noise = velocity_of(ways(state, sides)), rng.standard_normal((1, HORIZON, WIDTH), "f4")
        wrapped = flow.guided(velocity, guidance) if guidance else velocity
        x_0 = flow.integrate(wrapped, torch.from_numpy(noise), STEPS)[0].numpy()
        chunk = ActionChunk(x_0[:, :2] + state.astype("f4"), x_0, now, PERIOD, "", STEPS, seed, index,
                            guidance=guidance)
        joining.made(chunk)
        published = now + round(latency_s * 1e9)
        positions += [robot.at(at)[0] for at in grid[(grid >= now) & (grid < published)]]
        running = plan_chunk(joining.combined(chunk, settings), LIMITS, JointMeasurement(now, state), published,
                             command, running, settings.mode != "plain")
        joining.published(chunk, published)
        assert robot.execute(running, published)
        now, index = max(now + round(EVERY * PERIOD * 1e9), published), index + 1
        positions += [robot.at(at)[0] for at in grid[(grid >= published) & (grid < now)]]
    return np.array(positions)


SETTINGS = {
    "plain": JoinSettings("plain"), "delay_aware": JoinSettings("delay_aware"), "ensembled": JoinSettings("ensembled"),
    "guided": JoinSettings("guided"), "guided, exp, beta 5": JoinSettings("guided", schedule="exp", beta=5.0),
    "guided, vjp": JoinSettings("guided", jacobian="vjp"),
    "guided, 10 rows at most": JoinSettings("guided", horizon=10),
}


def measure(settings: JoinSettings, latency_s: float, seeds: int,
            sides: tuple[float, float] = (-0.3, 0.3), fade_s: float = 0.0) -> tuple[float, float, float]:
    """Jerk of the whole runs but their first second, RMS over the runs, the median run's peak, and the x travelled."""
    runs = [drive(settings, latency_s, seed, sides, fade_s) for seed in range(seeds)]
    found = [jerk(run[50:], PERIOD) for run in runs]
    travelled = float(np.mean([run[-1, 0] - run[50, 0] for run in runs]))
    return math.sqrt(np.mean([r**2 for r, _ in found])), float(np.median([p for _, p in found])), travelled


if __name__ == "__main__":
    print("jerk in rad/s^3, RMS / peak (median of 20 runs), and x travelled in 3 s (1.5 rad wanted)")
    rows = [("one way only", JoinSettings(), (0.3, 0.3), 0.0), *((n, s, (-0.3, 0.3), 0.0) for n, s in SETTINGS.items()),
            *((f"{n}, fading", SETTINGS[n], (-0.3, 0.3), 0.5) for n in ("delay_aware", "ensembled", "guided"))]
    for name, settings, sides, fade_s in rows:
        cells = [measure(settings, ms * 1e-3, 20, sides, fade_s) for ms in (0, 50, 100, 200)]
        print(f"| {name} | " + " | ".join(f"{r:.0f} / {p:.0f} ({x:.2f})" for r, p, x in cells) + " |", flush=True)

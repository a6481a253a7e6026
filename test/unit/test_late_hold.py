"""Why stop_time_s is at least twice command_lead_s: what a controller makes of a hold that was long on its way."""

import numpy as np
import pytest

from pi05_ros.runtime.chunking import JointLimits, plan_hold
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.transforms.robot_loader import load_robot

S = 10**9
STOP_S, PUBLISHED_NS = 0.2, S // 20


@pytest.mark.parametrize(("share", "safe"), [(0.0, True), (0.2, True), (0.5, True), (0.9, False)])
def test_a_hold_may_travel_for_half_its_time(share, safe):
    limits = JointLimits(load_robot("arm6"))
    middle, speed = (limits.lower + limits.upper) / 2, 0.3 * limits.velocity
    times = np.linspace(0.001, 0.3, 16)
    velocities = np.tile(speed, (16, 1))
    velocities[-1] = 0.0
    running = JointTrajectoryPlan(0, times, middle + np.outer(times, speed), velocities)
    controller = JointIntegrator(middle)
    controller.execute(running, 0)
    hold = plan_hold(running, None, PUBLISHED_NS, limits, STOP_S)
    arrived_ns = PUBLISHED_NS + int(share * STOP_S * S)
    controller.execute(hold, arrived_ns)
    fastest = max((np.abs(controller.at(t)[1]) / speed).max() for t in range(arrived_ns, S // 2, S // 1000))
    assert (fastest < 1.001) == safe

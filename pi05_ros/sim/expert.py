"""The scripted expert: what a good operator would do, from the true places of the blocks. It makes training data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pi05_ros.errors import ConfigError
from pi05_ros.sim.kinematics import TipKinematics
from pi05_ros.sim.tasks import COLOURS
from pi05_ros.sim.variation import AREA_M
from pi05_ros.sim.world import BLOCK_HEIGHT_M, TabletopWorld

HOVER_M = 0.10  # height of the fingertips on their way over the blocks
PRESS_M = 0.012  # below a block's top, to where a touch aims: a policy that is off by millimetres still touches
FORK_M = 0.12  # height over a block that may go either way: both ways down begin there, and their mean meets the block
PUSH_HEIGHT_M = 0.018
BEHIND_M = 0.055  # from the fingertips to the middle of a block before it is pushed
PUSH_M = 0.085  # past the block's old middle: tips end 0.055 m short of that, plus some for the servos' lag
SPEED_M_S = 0.25  # peak, of the fingertips
SPEED_SHARE = 2 / 3  # of each joint's limit, which is what the node keeps in steps
HOLD_STEPS = 6
LOW_M = 0.01  # below the hovering height by this: in the way of the blocks
STRAY_CLEAR_M = 0.055  # from a low place to the nearest block's middle: half a diagonal and the fingers fit between
STRAY_ABOVE_M = 0.055  # lowest a place nearer than that may be
STRAY_NEAR_M = 0.03  # deviation of the half of the places that are about where the arm will come down
# The arm comes straight to where it works from inside a cone over that place, else it goes up first: a policy that has
# strayed a little is led back without a jump. Radius at the place, and its growth with height: a push must not come
# down on the block, a touch may.
TOUCH_CONE, PUSH_CONE = (0.02, 0.8), (0.012, 0.3)
Move = Callable[[np.ndarray, np.ndarray], np.ndarray]
CLOSED_M = 0.0


class ScriptedExpert:
    """Plans an episode's joint targets: up, over, down, on, with smooth motion."""

    def __init__(self, world: TabletopWorld) -> None:
        self._world, self._kinematics = world, TipKinematics(world)
        self._step = SPEED_SHARE * world.robot.control_period_s * np.array(
            [joint.max_velocity for joint in world.robot.joints])

    def plan(self, random: np.random.Generator) -> np.ndarray:
        """float64 [T, 7]: targets at the control rate from where the arm is commanded to be, ending at rest.

        `random` chooses where there are several equally good ways.
        """
        goals = self._waypoints(random)
        return self._along([self._over, self._straight, self._straight], goals, cone=self._cone)

    def stray(self, random: np.random.Generator) -> np.ndarray:
        """float64 [7]: a place on the table or near where the task begins, high or low, clear of the blocks."""
        if random.random() < 0.5:
            place = random.uniform(AREA_M[:, 0], AREA_M[:, 1])
        else:
            place = self._waypoints(random)[0][:2] + STRAY_NEAR_M * random.standard_normal(2)
        clear = np.linalg.norm(self._world.blocks.position - place, axis=1).min() > STRAY_CLEAR_M
        height = random.uniform(PUSH_HEIGHT_M if clear else STRAY_ABOVE_M, HOVER_M)
        joints = self._kinematics.solve(np.append(place, height), near=self._world.command)
        return np.append(joints, CLOSED_M)

    @property
    def _cone(self) -> tuple[float, float]:
        return PUSH_CONE if self._world.task.ways else TOUCH_CONE

    def _along(self, moves: list[Move], goals: list[np.ndarray], cone: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
        command = self._world.command
        joints, rows = command[:6], [command]
        tip = self._kinematics.tip(joints)
        if tip[2] < HOVER_M - LOW_M:
            above = tip[2] - goals[1][2]
            if above > 0 and np.linalg.norm(tip[:2] - goals[1][:2]) < cone[0] + cone[1] * above:
                moves, goals = moves[1:], goals[1:]
            else:  # up first, so as not to sweep over the table
                moves, goals = [self._straight, *moves], [np.append(tip[:2], HOVER_M), *goals]
        for move, goal in zip(moves, goals, strict=False):
            segment = move(joints, goal)
            rows.extend(np.column_stack([segment, np.zeros(len(segment))]))
            joints = segment[-1]
        targets = np.array(rows[1:] + [rows[-1]] * HOLD_STEPS)
        travel = command[6] - self._step[6] * np.arange(1, len(targets) + 1)  # the gripper closes on the way
        targets[:, 6] = np.maximum(CLOSED_M, travel)
        return targets

    def _waypoints(self, random: np.random.Generator) -> list[np.ndarray]:
        task, blocks = self._world.task, self._world.blocks
        centre = blocks.position[COLOURS.index(task.colour)]
        if not task.ways:
            return [np.append(centre, HOVER_M), np.append(centre, BLOCK_HEIGHT_M - PRESS_M)]
        way = np.array(task.ways[random.integers(len(task.ways))])
        behind = centre - BEHIND_M * way
        above = np.append(behind, HOVER_M) if len(task.ways) == 1 else np.append(centre, FORK_M)
        return [above, np.append(behind, PUSH_HEIGHT_M),
                np.append(centre + (PUSH_M - BEHIND_M + 0.02) * way, PUSH_HEIGHT_M)]

    def _over(self, joints: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """float64 [K, 6]: joints move together to where the fingertips are at `goal` and the hand is upright."""
        end = self._kinematics.solve(goal, near=joints)
        steps = max(2, int(np.ceil((1.875 * np.abs(end - joints) / self._step[:6]).max())))
        return joints + (end - joints) * minimum_jerk(np.arange(1, steps + 1) / steps)[:, None]

    def _straight(self, joints: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """float64 [K, 6]: a straight line of the fingertips to `goal`, slow enough for every joint."""
        start = self._kinematics.tip(joints)
        seconds = 1.875 * np.linalg.norm(goal - start) / SPEED_M_S  # a minimum-jerk line peaks at 1.875 x its mean
        steps = max(2, int(np.ceil(seconds / self._world.robot.control_period_s)))
        for _ in range(10):
            line = start + (goal - start) * minimum_jerk(np.arange(1, steps + 1) / steps)[:, None]
            rows = [joints]
            for point in line:
                rows.append(self._kinematics.solve(point, near=rows[-1]))
            excess = (np.abs(np.diff(rows, axis=0)) / self._step[:6]).max()
            if excess <= 1:
                return np.array(rows[1:])
            steps = int(np.ceil(steps * max(1.05, excess)))
        raise ConfigError("scripted expert", expected="a path within the joints' speeds",
                          received=f"{excess:.1f} times their share of the limit", way_out="Begin nearer to home.")


def minimum_jerk(share: np.ndarray) -> np.ndarray:
    """0..1 to 0..1, at rest at both ends (Flash and Hogan 1985)."""
    return share**3 * (10 + share * (6 * share - 15))

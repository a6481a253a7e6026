"""What the demo's onlooker takes for a bad run."""

import pytest
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros.sim.onlooker import Onlooker
from pi05_ros.transforms.robot_loader import load_robot


@pytest.fixture
def onlooker(executor):
    robot = load_robot("tabletop")
    node = Onlooker(robot)
    executor.add_node(node)
    controller, limits = robot.controllers[0], {joint.name: joint for joint in robot.joints}
    joints = [limits[name] for name in controller.joints]

    def trajectory(position=0.0, velocity=0.0, last=0.0):
        middle = [(j.lower + j.upper) / 2 + position for j in joints]
        points = [JointTrajectoryPoint(positions=middle, velocities=[v] * len(joints)) for v in (velocity, last)]
        node._on_trajectory(JointTrajectory(joint_names=controller.joints, points=points), counted=True)

    def moves(share):
        for position in (0.0, 0.1):
            node._on_joints(JointState(name=[j.name for j in robot.joints], position=[position] * len(robot.joints),
                                       velocity=[share * j.max_velocity for j in robot.joints]))

    node.trajectory, node.moves = trajectory, moves
    return node


def test_a_run_within_its_limits_is_good(onlooker):
    assert "expected a stream of trajectories, received 0" in onlooker.problems(lockstep=True)
    onlooker.trajectory()
    onlooker.trajectory()
    assert onlooker.problems(lockstep=True) == ["trajectories came but no joint moved"]
    onlooker.moves(1.05)
    assert onlooker.problems(lockstep=True) == []


@pytest.mark.parametrize(("sent", "said"), [
    ({"position": float("nan")}, "NaN"), ({"position": 100.0}, "position limits"),
    ({"velocity": 100.0}, "velocity limits"), ({"last": 0.1}, "at rest"),
])
def test_a_trajectory_that_must_not_leave_the_node(onlooker, sent, said):
    onlooker.trajectory()
    onlooker.trajectory(**sent)
    onlooker.moves(0.5)
    (problem,) = onlooker.problems(lockstep=False)
    assert said in problem


def test_joints_that_are_too_fast_where_no_command_can_be_late(onlooker):
    onlooker.trajectory()
    onlooker.trajectory()
    onlooker.moves(1.2)
    assert onlooker.problems(lockstep=True) == ["a joint moved at 1.20 of its speed limit"]
    assert onlooker.problems(lockstep=False) == []  # commands that come late jump: the summary shows it

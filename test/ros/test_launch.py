"""The launch file, where ROS's launch is installed; elsewhere these are skipped."""

import importlib.util

import pytest

from pi05_ros.config import share_directory

pytest.importorskip("launch_ros", reason="needs launch and launch_ros of a ROS installation")

from launch import LaunchContext, LaunchDescription  # noqa: E402
from launch.actions import DeclareLaunchArgument  # noqa: E402


@pytest.fixture
def launch_file():
    spec = importlib.util.spec_from_file_location("policy_launch", share_directory() / "launch" / "policy.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started(launch_file, **given):
    """The actions for these arguments, the others at their defaults."""
    context = LaunchContext()
    for action in launch_file.generate_launch_description().entities:
        if isinstance(action, DeclareLaunchArgument):
            context.launch_configurations[action.name] = given.get(action.name, action.default_value[0].text)
    return launch_file.start(context)


def test_every_argument_has_a_default_and_a_description(launch_file):
    description = launch_file.generate_launch_description()
    assert isinstance(description, LaunchDescription)
    arguments = description.get_launch_arguments()
    assert {a.name for a in arguments} >= {"robot", "checkpoint", "backend", "denoising_steps", "namespace",
                                           "params_file", "autostart", "use_sim_time", "log_level", "use_respawn"}
    assert all(a.default_value is not None and len(a.description) > 10 for a in arguments)


def test_autostart_configures_and_activates_and_can_be_left_out(launch_file):
    assert len(started(launch_file)) == 3
    assert len(started(launch_file, autostart="false")) == 1


def test_the_simulated_robot_comes_with_its_clock(launch_file):
    robot, policy, *_ = started(launch_file, sim="true", sim_seed="3", joint_states_topic="/joints")
    assert robot.node_executable == "sim_robot" and policy.node_executable == "policy_node"
    assert len(started(launch_file, sim="true", autostart="false")) == 2
    with pytest.raises(ValueError, match="sim_seed: expected a whole number"):
        started(launch_file, sim="true", sim_seed="any")


@pytest.mark.parametrize(("namespace", "name"), [("", "/pi05_policy"), ("left", "/left/pi05_policy")])
def test_a_recorder_comes_first_where_asked_for(launch_file, namespace, name):
    actions = started(launch_file, record="true", bag="run_1", namespace=namespace)
    command = ["".join(part.text for part in word) for word in actions[0].cmd]
    assert command[2:] == ["pi05_ros", "pi05", "record", "run_1", "--node", name] and len(actions) == 4


@pytest.mark.parametrize("steps", ["0", "51", "many"])
def test_a_bad_number_of_steps_is_refused(launch_file, steps):
    with pytest.raises(ValueError, match="denoising_steps: expected a whole number"):
        started(launch_file, denoising_steps=steps)

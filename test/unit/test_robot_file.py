from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pi05_ros.errors import ConfigError
from pi05_ros.transforms.robot_loader import list_robots, load_robot

ROBOTS = Path(__file__).resolve().parents[2] / "config" / "robots"
ARM6 = yaml.safe_load((ROBOTS / "arm6.yaml").read_text())
JOINT = {"name": "j", "lower": -1.0, "upper": 1.0, "max_velocity": 1.0}
ONE = {"action_meaning": "joint_position", "control_rate_hz": 50, "state_dim": 1, "action_dim": 1,
       "cameras": {"base_0_rgb": {}}, "joints": [JOINT], "controllers": [{"topic": "trajectory", "joints": ["j"]}]}


def load(folder, **changes):
    """ONE with changes; a key changed to ... is left out."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**ONE, **changes}.items() if value is not ...}))
    return load_robot(str(path))


def test_lists_the_robots_of_the_package():
    assert list_robots() == ["aloha", "arm6", "droid", "droid_jointpos", "libero", "tabletop"]


@pytest.mark.parametrize("name", list_robots())
def test_every_robot_of_the_package_loads(name):
    robot = load_robot(name)
    assert robot.name == name and robot.description
    assert robot.action_meaning == "end_effector" or robot.controllers[0].topic == "trajectory"
    assert robot == load_robot(str(ROBOTS / f"{name}.yaml"))


@pytest.mark.parametrize("name, state, action, rate, asset", [
    ("libero", 8, 7, 20.0, "physical-intelligence/libero"), ("droid", 8, 8, 15.0, "droid"),
    ("droid_jointpos", 8, 8, 15.0, "droid"), ("aloha", 14, 14, 50.0, "trossen"), ("arm6", 7, 7, 50.0, ""),
])
def test_dimensions_rate_and_statistics_are_those_of_the_checkpoints(name, state, action, rate, asset):
    robot = load_robot(name)
    assert (robot.state_dim, robot.action_dim, robot.control_rate_hz, robot.asset_id) == (state, action, rate, asset)
    assert robot.control_period_s == 1 / rate


def test_deltas_are_on_the_joints_that_openpi_gives_as_differences():
    assert [j.delta for j in load_robot("aloha").joints] == (6 * [True] + [False]) * 2
    assert [j.delta for j in load_robot("droid_jointpos").joints] == 7 * [True] + [False]
    assert not any(j.delta for name in ("droid", "arm6") for j in load_robot(name).joints)


def test_libero_turns_both_frames_and_has_no_third_camera():
    robot = load_robot("libero")
    assert {slot: spec.rotate_180 for slot, spec in robot.cameras.items()} == {
        "base_0_rgb": True, "left_wrist_0_rgb": True}
    assert robot.prompt_format == "pi0"


def test_the_smallest_file_loads(tmp_path):
    robot = load(tmp_path)
    assert robot.name == "mine" and robot.joints[0].scale == 1.0 and robot.cameras["base_0_rgb"].required


def joint(**changes):
    return {"joints": [{key: value for key, value in {**JOINT, **changes}.items() if value is not ...}]}


@pytest.mark.parametrize("changes, key", [
    # unknown, missing
    ({"speed": 1}, "mine.yaml: speed"), ({"state_dim": ...}, "mine.yaml: state_dim"),
    ({"name": "x"}, "mine.yaml: name"), (joint(max_speed=1.0), r"joints\[0\].max_speed"),
    (joint(upper=...), r"joints\[0\].upper"), ({"cameras": {"base_0_rgb": {"topic": "x"}}}, "base_0_rgb.topic"),
    # types
    ({"control_rate_hz": "fast"}, "control_rate_hz"), ({"control_rate_hz": True}, "control_rate_hz"),
    ({"state_dim": 1.0}, "state_dim"), ({"joints": {}}, "joints"), ({"cameras": []}, "cameras"),
    ({"cameras": {"base_0_rgb": None}}, "cameras.base_0_rgb"), ({"cameras": {1: {}}}, "cameras"),
    ({"cameras": {"base_0_rgb": {"required": 1}}}, "required"), ({"default_prompt": 3}, "default_prompt"),
    ({"action_meaning": "torque"}, "action_meaning"), ({"adapter": ["aloha"]}, "adapter"),
    ({"prompt_format": "pi7"}, "prompt_format"), (joint(name=7), r"joints\[0\].name"),
    (joint(upper=10**400), r"joints\[0\].upper"),
    (joint(lower=float("nan")), r"joints\[0\].lower"), (joint(upper=float("inf")), r"joints\[0\].upper"),
    # values
    ({"control_rate_hz": 0}, "control_rate_hz"), ({"control_rate_hz": -1.5}, "control_rate_hz"),
    ({"state_dim": 2}, "state_dim"), ({"action_dim": 33}, "action_dim"), ({"adapter": "aloha"}, "adapter"),
    (joint(lower=1.0), "joint 'j' upper"), (joint(lower=2.0), "joint 'j' upper"), (joint(name=""), "name"),
    (joint(max_velocity=0), "max_velocity"), (joint(max_velocity=-1), "max_velocity"), (joint(scale=0), "scale"),
    (joint(unit="deg"), r"joints\[0\].unit"), (joint(velocity_scale=2.0), "velocity_scale"),
    (joint(action="velocity", delta=True), "delta"), (joint(action="velocity", velocity_scale=0), "velocity_scale"),
    # what belongs together
    ({"cameras": {"wrist": {}}}, "cameras 'wrist'"), ({"joints": [JOINT, JOINT]}, "joint 'j'"), ({"joints": []}, "dim"),
    (joint(action="velocity"), "joints"), ({"action_meaning": "joint_velocity"}, "joints"),
    ({"action_meaning": "end_effector"}, "joints"), ({"controllers": []}, "joint 'j'"),
    ({"controllers": ...}, "joint 'j'"),
    ({"controllers": [{"topic": "a", "joints": ["j"]}, {"topic": "b", "joints": ["j"]}]}, "joint 'j'"),
    ({"controllers": 2 * [{"topic": "a", "joints": ["j"]}]}, "controller 'a'"),
    ({"controllers": [{"topic": "a", "joints": ["j", "j"]}]}, "joint 'j'"),
    ({"controllers": [{"topic": "a", "joints": ["j", "k"]}]}, "controllers"),
    ({"controllers": [{"topic": "a", "joints": []}, {"topic": "b", "joints": ["j"]}]}, "controller 'a' joints"),
    ({"controllers": [{"topic": "/abs", "joints": ["j"]}]}, "controller topic"),
])
def test_refuses_a_wrong_file_and_names_file_and_key(tmp_path, changes, key):
    with pytest.raises(ConfigError, match=key) as error:
        load(tmp_path, **changes)
    assert "mine.yaml: " in error.value.subject
    assert error.value.expected and error.value.received and error.value.way_out


def test_shows_what_it_received(tmp_path):
    with pytest.raises(ConfigError, match=r"upper: expected more than lower \(1.0\), received 0.5"):
        load(tmp_path, **joint(lower=1.0, upper=0.5))


def test_a_doubled_key_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(ONE) + "control_rate_hz: 60\n")
    with pytest.raises(ConfigError, match="'control_rate_hz' twice.*line"):
        load_robot(str(path))


@pytest.mark.parametrize("text", [
    "", "- 1\n", "a: [", "a: !!python/object:os.system {}\n", "? [a]\n: 1\n", "3: 1\n", "a: 2024-13-45",
    "a: !!set [1]", "a: !!bool x", pytest.param("[" * 3000, id="deep"),
])
def test_a_file_that_is_no_mapping_of_names_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="mine.yaml"):
        load_robot(str(path))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_robot(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="readable YAML"):
        load_robot(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize("name", ["arm7", "", "../robots/arm6", "arm6.yaml.bak"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match="aloha, arm6, droid, droid_jointpos, libero"):
        load_robot(name)


def test_the_home_of_nobody_is_refused():
    with pytest.raises(ConfigError, match="No such file"):
        load_robot("~nobody-of-that-name/arm.yaml")


def test_a_robot_may_lose_its_cameras_but_stays_checked():
    robot = load_robot("arm6")
    assert replace(robot, cameras={}).cameras == {}
    with pytest.raises(ConfigError, match="control_rate_hz"):
        replace(robot, control_rate_hz=0.0)

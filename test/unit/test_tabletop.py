"""The simulated world's physics, its tasks and the scripted expert."""

import numpy as np
import pytest

from pi05_ros.errors import ConfigError
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.expert import ScriptedExpert
from pi05_ros.sim.joint_integrator import JointIntegrator
from pi05_ros.sim.kinematics import TipKinematics
from pi05_ros.sim.tasks import (
    COLOURS,
    HELD_OUT_SEEDS,
    KINDS,
    TRAIN_SEEDS,
    BlockRecord,
    Task,
    all_prompts,
    judge,
    understood,
)
from pi05_ros.sim.world import TabletopWorld

REST = np.zeros((len(COLOURS), 2))


@pytest.fixture(scope="module")
def world():
    return TabletopWorld()


def record(moved, touched=()):
    return BlockRecord(REST, REST + np.array([moved.get(colour, (0, 0)) for colour in COLOURS]),
                       np.array([colour in touched for colour in COLOURS]))


@pytest.mark.parametrize(("kind", "moved", "touched", "outcome"), [
    ("touch", {}, (), "running"),
    ("touch", {}, ("red",), "success"),
    ("touch", {}, ("red", "blue"), "failure"),
    ("left", {"red": (0.0, 0.051)}, ("red",), "success"),
    ("left", {"red": (-0.01, 0.0495)}, ("red",), "running"),  # further than 0.05 m, but not yet along the way
    ("left", {"red": (0.041, 0.03)}, ("red",), "failure"),
    ("left", {"red": (0.0, -0.05)}, ("red",), "failure"),
    ("right", {"red": (0.0, -0.051)}, ("red",), "success"),
    ("forward", {"red": (0.051, 0.0)}, ("red",), "success"),
    ("sideways", {"red": (0.0, 0.051)}, ("red",), "success"),
    ("sideways", {"red": (0.0, -0.051)}, ("red",), "success"),
    ("sideways", {"red": (0.061, 0.0)}, ("red",), "failure"),
    ("sideways", {"red": (0.0, 0.061), "green": (0.021, 0.0)}, ("red",), "failure"),
])
def test_what_counts_as_done(kind, moved, touched, outcome):
    assert judge(Task(kind, "red"), record(moved, touched)) == outcome


def test_every_prompt_can_be_drawn_and_seeds_do_not_overlap(world):
    said = {world.reset(seed).prompt for seed in range(400)}
    assert said <= set(all_prompts()) and len(said) > 50
    assert not set(TRAIN_SEEDS) & set(HELD_OUT_SEEDS[:10]) and TRAIN_SEEDS.stop <= HELD_OUT_SEEDS.start


def demonstrate(world, seed, task):
    world.reset(seed, task)
    for target in ScriptedExpert(world).plan(np.random.default_rng(seed)):
        outcome = world.step(target)
        if outcome != "running":
            break
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_succeeds(world, kind):
    assert [demonstrate(world, seed, Task(kind, COLOURS[seed % 4])) for seed in range(8)] == ["success"] * 8


def test_the_expert_goes_both_ways(world):
    ways = set()
    for seed in range(8):
        demonstrate(world, seed, Task("sideways", "blue"))
        ways.add(np.sign(world.blocks.position[2, 1] - world.blocks.start[2, 1]))
    assert ways == {-1.0, 1.0}


def test_an_arm_that_rests_neither_succeeds_nor_disturbs(world):
    world.reset(5)
    for _ in range(100):
        assert world.step(world.command) == "running"
    assert np.abs(world.blocks.position - world.blocks.start).max() < 1e-6
    np.testing.assert_allclose(world.state, world.command, atol=2e-3)


def test_an_episode_repeats_exactly(world):
    def run(one):
        one.reset(7, Task("forward", "green"))
        for target in ScriptedExpert(one).plan(np.random.default_rng(0)):
            one.step(target)
        return np.append(one.state, one.blocks.position)

    first = run(world)
    world.reset(8)
    np.testing.assert_array_equal(run(world), first)
    np.testing.assert_array_equal(run(TabletopWorld()), first)


def test_steps_are_cut_at_the_limits(world):
    world.reset(1)
    before = world.command
    world.step(np.full(7, 100.0))
    reach = world.robot.control_period_s * np.array([joint.max_velocity for joint in world.robot.joints])
    assert (world.command - before <= reach + 1e-12).all() and (world.command <= world.upper).all()
    with pytest.raises(ConfigError, match="finite"):
        world.step(np.full(7, np.nan))
    with pytest.raises(ConfigError, match="7 finite numbers"):
        world.step(np.zeros(6))


def test_a_trajectory_is_followed_held_and_refused_when_past(world):
    world.reset(2)
    goal = world.command + np.array([0.2, 0, 0, 0, 0, 0, 0])
    plan = JointTrajectoryPlan(0, np.array([0.5]), goal[None], np.zeros((1, 7)))
    assert world.execute(plan)
    world.advance(0.25)
    assert 0.05 < world.command[0] - (goal[0] - 0.2) < 0.15
    world.advance(0.75)
    np.testing.assert_allclose(world.command, goal)
    np.testing.assert_allclose(world.state, goal, atol=2e-3)
    assert world.time_ns == 1_000_000_000
    assert not world.execute(plan)


def test_a_trajectory_that_began_in_the_past_is_joined_where_it_is_now():
    joints = JointIntegrator([0.0])
    times = np.array([1.0, 2.0, 3.0])
    plan = JointTrajectoryPlan(0, times, times[:, None], np.array([[1.0], [1.0], [0.0]]))
    joints.execute(plan, 1_500_000_000)
    assert joints.at(1_500_000_000)[0] == 1.5 and joints.at(2_000_000_000)[0] == 2.0
    empty = JointTrajectoryPlan(0, np.empty(0), np.empty((0, 1)), np.empty((0, 1)))
    assert not joints.execute(empty, 0) and joints.refused == 1 and joints.at(2_000_000_000)[0] == 2.0


def test_another_task_is_judged_from_where_the_blocks_are(world):
    assert demonstrate(world, 3, Task("touch", "red")) == "success"
    world.ask(Task("touch", "green"))
    assert world.outcome == "running" and world.task.prompt == "touch the green block"
    assert world.step(world.command) == "running"  # the finger still rests on the red one
    assert not world.blocks.touched.any()
    world.ask(Task("touch", "red"))
    assert world.step(world.command) == "running"  # nor is that another touch


def test_a_block_that_the_finger_left_counts_again(world):
    assert demonstrate(world, 3, Task("touch", "red")) == "success"
    block, there = world.blocks.position[COLOURS.index("red")], world.command
    above = np.append(TipKinematics(world).solve(np.append(block, 0.12), near=there), 0.0)
    world.ask(Task("touch", "green"))
    for share in np.linspace(0, 1, 20):
        assert world.step(there + share * (above - there)) == "running"
    for share in np.linspace(0, 1, 20):
        outcome = world.step(above + share * (there - above))
    assert outcome == "failure" and world.blocks.touched[COLOURS.index("red")]


def test_a_block_that_is_pressed_on_from_above_is_touched_but_not_pushed(world):
    kinematics, red = TipKinematics(world), COLOURS.index("red")
    outcomes = {}
    for kind in ("touch", "sideways"):
        world.reset(5, Task(kind, "red"))
        block = world.blocks.position[red]
        above, pressing = (kinematics.solve(np.append(block, z), near=world.command) for z in (0.08, 0.03))
        world.place(np.append(above, 0.0))
        for share in np.linspace(0.1, 1, 10):
            outcomes[kind] = world.step(np.append(above + share * (pressing - above), 0.0))
        assert world.blocks.touched[red] and world.blocks.pressed[red]
    assert outcomes == {"touch": "success", "sideways": "failure"}
    world.ask(Task("left", "red"))  # a finger that rests on the block when it is asked has not begun
    assert world.step(world.command) == "running" and not world.blocks.pressed[red]
    for _ in range(10):
        world.step(np.append(above, 0.0))
    assert world.outcome == "running"
    for _ in range(10):
        world.step(np.append(pressing, 0.0))
    assert world.outcome == "failure" and world.blocks.pressed[red]


def test_a_prompt_is_understood_where_it_says_a_task():
    for prompt in all_prompts():
        task = understood(f" {prompt.capitalize()} ")
        assert task is not None and task.prompt == prompt
    assert understood("touch the purple block") is None


def test_inverse_kinematics_reaches_and_refuses(world):
    kinematics = TipKinematics(world)
    joints = kinematics.solve(np.array([0.32, -0.1, 0.1]), near=np.zeros(6))
    np.testing.assert_allclose(kinematics.tip(joints), [0.32, -0.1, 0.1], atol=3e-4)
    with pytest.raises(ConfigError, match="out of reach|pointing down"):
        kinematics.solve(np.array([1.5, 0.0, 0.1]), near=np.zeros(6))

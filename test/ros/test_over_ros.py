"""Evaluation through the node in a process of its own: the same episodes as in this process."""

import json
from dataclasses import replace

import pytest
from rendering import seen_world  # noqa: F401 (a fixture)

from pi05_ros.cli.main import main
from pi05_ros.errors import ConfigError, WorkerError
from pi05_ros.runtime.joining import JoinSettings
from pi05_ros.runtime.policy import Policy
from pi05_ros.sim.closed_loop import evaluate, may_lack
from pi05_ros.sim.episode import Ablation, Loop
from pi05_ros.sim.evaluation import Evaluation
from pi05_ros.sim.over_ros import PolicyUnderTest, run_over_ros
from pi05_ros.sim.tasks import Task
from pi05_ros.sim.world import TabletopWorld
from pi05_ros.transforms.robot_loader import load_robot

TASKS = {1_000_000: Task("touch", "red"), 1_000_001: Task("forward", "blue")}
MASKED = Ablation(masked="right_wrist_0_rgb", wrong_colour=True)  # also because two cameras are quicker
LOOPS = (Loop(1, limit=12), Loop(1, limit=12, delay=2, execute=3, join=JoinSettings("guided")))
pytestmark = pytest.mark.usefixtures("seen_world")


def test_episodes_over_ros_are_those_in_process(executor):
    evaluation = Evaluation(None, LOOPS, device="cpu", horizon=20, ablation=MASKED, film=True)
    progress = []
    (trials, rows), moments = run_over_ros(evaluation, TASKS, lambda *at: progress.append(at))
    policy = Policy.load(robot=may_lack(load_robot("tabletop"), MASKED.masked), action_horizon=20)
    world = TabletopWorld()
    for loop, over_ros in zip(LOOPS, trials[1:], strict=True):
        for one, other in zip(over_ros, evaluate(policy, [world], TASKS, loop, MASKED), strict=True):
            assert replace(one, jerk_rms=0, jerk_peak=0) == replace(other, jerk_rms=0, jerk_peak=0)
            assert one.jerk_rms == pytest.approx(other.jerk_rms, rel=1e-9)  # times are whole nanoseconds on the wire
            assert one.jerk_peak == pytest.approx(other.jerk_peak, rel=1e-9)
    world.close()
    assert moments.off_time == 0 and moments.chunks == 2 * (2 + 4)
    assert [trial.success for trial in trials[0]] == [True, True]  # the expert
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(rows) == 2 and len(rows[0][1]) >= 3


def test_what_the_node_refuses_is_said_and_its_end_is_noticed(executor):
    with PolicyUnderTest(Evaluation(None, LOOPS, device="cpu", horizon=20)) as under_test:
        with pytest.raises(ConfigError, match="horizon less the delay"):
            under_test.use(Loop(execute=17))
        with pytest.raises(ConfigError, match="trained for real-time chunking"):
            under_test.use(replace(LOOPS[0], join=JoinSettings("trained")))
        under_test.use(LOOPS[0])
        under_test._process.kill()
        with pytest.raises(WorkerError, match="its end"):
            under_test.play(1_000_000, TASKS[1_000_000])


def test_a_node_that_cannot_be_configured_is_an_error(capsys):
    assert main(["evaluate", "--over-ros", "--checkpoint", "/nowhere", "--episodes", "1", "--device", "cpu"]) == 1
    assert "configure: expected to succeed" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]

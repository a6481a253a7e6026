"""The node under injected faults, and a judge that can find something."""

import json

import numpy as np
import pytest
import rclpy
from rclpy.logging import LoggingSeverity, get_logger_level, set_logger_level

from pi05_ros.cli.main import main
from pi05_ros.ros.policy_node import PolicyNode
from pi05_ros.runtime.mailbox import Mailbox
from pi05_ros.sim.accounts import broken
from pi05_ros.sim.faults import KINDS, Fault, FaultPlan
from pi05_ros.sim.soak import Soak
from pi05_ros.sim.standing import grown


@pytest.fixture
def ros():
    rclpy.init()
    set_logger_level("pi05_policy", LoggingSeverity.FATAL)
    yield
    set_logger_level("pi05_policy", LoggingSeverity.INFO)
    rclpy.try_shutdown()


def first(plan, count):
    cycles = plan.cycles()
    return [next(cycles) for _ in range(count)]


def test_a_plan_is_a_function_of_its_seed():
    one = first(FaultPlan(1, ("base_0_rgb", "state")), 3000)
    assert one == first(FaultPlan(1, ("base_0_rgb", "state")), 3000)
    assert one != first(FaultPlan(2, ("base_0_rgb", "state")), 3000)
    assert {fault.kind for faults in one for fault in faults} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_fault_makes_the_robot_unsafe(ros, kind):
    soak = Soak(seed=3, share=0.05, kinds=(kind,))
    found = soak.run(300)
    soak.close()
    assert found.violations == {} and found.injected[kind] and found.trajectories


def test_the_judge_sees_what_is_wrong(ros):
    soak = Soak(share=0.0)
    soak.run(50)
    assert soak.found.violations == {} and soak.found.trajectories > 20
    soak.judge.judge(np.full(7, np.nan), np.zeros(7), soak._steady_ns)
    soak.judge.judge(np.full(7, 9.0), np.full(7, 9.0), soak._steady_ns)
    soak.close()
    assert set(soak.found.violations) == {"executes what is not finite", "beyond a position limit", "too fast"}


def test_a_node_without_limits_is_found_out(ros, monkeypatch):
    monkeypatch.setattr("pi05_ros.runtime.chunking.limit_steps", lambda wanted, *rest: wanted)
    soak = Soak(share=0.0)
    found = soak.run(50)
    soak.close()
    assert {"beyond a position limit", "too fast"} <= found.violations.keys()


def test_a_chunk_made_while_the_clock_was_set_back_joins_nothing(ros):
    soak = Soak(share=0.0)
    soak.run(50)
    published = soak.found.trajectories

    def set_back():
        soak._offset_ns -= 600_000_000

    soak._meanwhile.append(set_back)
    soak.run(1)
    refused = dict(soak.node.diagnostics.refused)
    soak.close()
    assert refused == {"silent at publication": 1}
    assert soak.found.trajectories == published + 1  # the hold alone


@pytest.mark.parametrize(("where", "name", "counter"), [
    (Mailbox, "_forget_unread", "received.base_image"), (PolicyNode, "_refuse", "taken.state"),
    (PolicyNode, "_counted", "refused.parameter")])
def test_a_node_that_does_not_count_is_found_out(ros, monkeypatch, where, name, counter):
    """A fault's only trace is taken away."""
    monkeypatch.setattr(where, name, lambda self, given, *rest: given)
    soak = Soak(share=0.2, seed=6)
    found = soak.run(600)
    accounts = broken(soak.compared())
    soak.close()
    assert "not counted" in found.violations and any(counter in line for line in accounts)


@pytest.mark.parametrize(("name", "fault"), [("_check_clock", Fault("clock_jump", "", 0.01)),
                                             ("_watch", Fault("silence", "state", 0.9))])
@pytest.mark.parametrize("blind", [False, True])
def test_a_clock_set_back_and_a_long_silence_must_be_seen(ros, monkeypatch, name, fault, blind):
    soak = Soak(share=0.0)
    soak.run(50)
    if blind:
        monkeypatch.setattr(PolicyNode, name, lambda self, *rest: None)
    soak._inject(fault)
    found = soak.run(200)
    soak.close()
    assert ("not counted" in found.violations) == blind


def test_growth_is_a_problem():
    flat = {"threads": 3, "descriptors": 9, "memory": 10**8}
    assert grown([flat] * 20, 1000) == []
    assert len(grown([flat] * 19 + [{"threads": 4, "descriptors": 10, "memory": 2 * 10**8}], 1000)) == 3


def test_the_command_ends_with_its_json_line_and_leaves_the_logger_as_it_was(capsys):
    level = get_logger_level("pi05_policy")
    assert main(["soak", "--cycles", "400", "--share", "0.02"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["ok"] and line["cycles"] == 400 and line["problems"] == []
    assert get_logger_level("pi05_policy") == level

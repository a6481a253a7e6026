"""The node under injected faults, and a judge that can find something."""

import json

import numpy as np
import pytest
import rclpy
from rclpy.logging import LoggingSeverity, get_logger_level, set_logger_level

from pi05_ros.cli.main import main
from pi05_ros.cli.soak import grown
from pi05_ros.sim.faults import KINDS, FaultPlan
from pi05_ros.sim.soak import Soak


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

"""The soak over DDS for a few simulated seconds, and judges that can find something."""

import json
from collections import Counter

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from robot_stand_in import rclpy_time
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from pi05_ros.cli.main import main
from pi05_ros.ros.conversions import status
from pi05_ros.runtime.trajectory import JointTrajectoryPlan
from pi05_ros.sim.accounts import broken, conservation, wire_accounts
from pi05_ros.sim.standing import in_pieces
from pi05_ros.sim.travel import TravelJudge
from pi05_ros.sim.wire_soak import START_NS as BEGIN_NS
from pi05_ros.sim.wire_soak import WireSoak
from pi05_ros.transforms.robot_loader import load_robot

S = 10**9
START_NS = BEGIN_NS + 2 * S  # long after any jump of the clock
LEAD_S = 0.1


@pytest.fixture
def judge():
    return TravelJudge(load_robot("arm6"), BEGIN_NS, lambda: "now", lead_s=LEAD_S, committed_s=1.0,
                       at_rest_s=1.05)


@pytest.fixture
def soak():
    soak = WireSoak()
    soak._node, soak._steady_ns = object(), START_NS  # as if it ran for a while
    yield soak
    soak._node = None
    soak.close()


def message(stamp_ns, times, positions, velocities=None):
    """A trajectory of all joints alike."""
    velocities = velocities or [0.0] * len(times)
    names = [joint.name for joint in load_robot("arm6").joints]
    middle = np.array([(joint.lower + joint.upper) / 2 for joint in load_robot("arm6").joints])
    out = JointTrajectory(joint_names=names)
    out.header.stamp = rclpy_time(stamp_ns)
    for time_s, position, velocity in zip(times, positions, velocities, strict=True):
        point = JointTrajectoryPoint(positions=middle + position, velocities=np.full(len(names), velocity))
        point.time_from_start.sec, point.time_from_start.nanosec = divmod(round(time_s * S), S)
        out.points.append(point)
    return out


def watch(judge, until_s, active=True, from_s=0.0):
    for t in np.arange(from_s, until_s, 0.005):
        if active:
            judge.active(START_NS + int(t * S))
        judge.look(START_NS + int(t * S))


def provenance(**values):
    return DiagnosticArray(status=[status("pi05_policy: chunk", b"\0", "", values)])


def test_a_quiet_trajectory_is_no_violation(judge):
    judge.execute(message(START_NS, [0.1, 0.5], [0.0, 0.01]), START_NS)
    judge.published(START_NS, START_NS)
    watch(judge, 1.0)
    assert judge.found.violations == {} and judge.found.trajectories == 1 and judge.late == 0


@pytest.mark.parametrize(("positions", "velocities", "times", "what"), [
    ([0.0, np.nan], None, [0.1, 0.5], "not finite"),
    ([0.0, 9.0], None, [0.1, 0.5], "a command beyond a position limit"),
    ([0.0, 0.01], [0.0, 0.1], [0.1, 0.5], "does not end at rest"),
    ([0.0, 0.01], None, [0.1, 1.5], "commits too far ahead"),
])
def test_a_bad_command_is_seen_when_it_arrives(judge, positions, velocities, times, what):
    judge.execute(message(START_NS, times, positions, velocities), START_NS)
    assert what in judge.found.violations


@pytest.mark.parametrize(("travel_s", "late"), [(0.05, False), (0.15, True)])
def test_the_way_to_a_curve_is_excused_for_a_late_command_alone(judge, travel_s, late):
    stamp = START_NS - int(travel_s * S)
    judge.execute(message(stamp, [travel_s + 0.02, 0.5], [0.02, 0.02]), START_NS)  # 1 unit a second
    watch(judge, 0.1)
    assert judge.found.violations == {}  # not known yet
    judge.published(stamp, stamp)
    assert ("too fast" in judge.found.violations) == (not late)
    assert (judge.late, judge.excused > 0) == (late, late)
    watch(judge, 0.4, from_s=0.1)
    assert ("too fast" in judge.found.violations) == (not late)


@pytest.mark.parametrize(("travel_s", "late"), [(0.02, False), (0.03, True)])
def test_a_hold_is_late_after_half_of_its_time(judge, travel_s, late):
    judge.execute(message(START_NS - int(travel_s * S), [0.05], [0.02]), START_NS)
    watch(judge, 0.2)
    assert judge.late == late and ("too fast" in judge.found.violations) == (not late)


def test_a_sound_picture_with_the_stamp_of_a_damaged_one_may_be_used(soak):
    send = soak._inputs._sender
    for kinds, named in (({"encoding": 0.0}, 1), ({}, 0)):
        send("base_0_rgb", START_NS, np.zeros(7), kinds)()
        assert len(soak._inputs.damaged) == named


def test_beyond_the_first_point_nothing_is_excused(judge):
    stamp = START_NS - int(0.15 * S)
    judge.execute(message(stamp, [0.16, 0.17, 0.5], [0.0, 0.03, 0.03]), START_NS)
    judge.published(stamp, stamp)
    watch(judge, 0.3)
    assert judge.late == 1 and "too fast" in judge.found.violations


@pytest.mark.parametrize("travel_s", [0.05, 0.15])
def test_a_step_is_excused_for_a_late_command_alone(judge, travel_s):
    stamp = START_NS - int(travel_s * S)
    judge.execute(message(stamp, [travel_s - 0.01, 0.5], [0.02, 0.02]), START_NS)  # its first point has passed
    judge.published(stamp, stamp)
    assert list(judge.found.violations) == ([] if travel_s > LEAD_S else ["a step"])


def test_how_far_a_command_commits_is_judged_on_the_nodes_own_clock(judge):
    judge.execute(message(START_NS, [0.1, 1.04], [0.0, 0.01]), START_NS)
    judge.published(START_NS, START_NS + S // 20)
    assert judge.found.violations == {}
    judge.execute(message(START_NS, [0.1, 1.06], [0.0, 0.01]), START_NS)
    judge.published(START_NS, START_NS + S // 20)
    assert list(judge.found.violations) == ["commits too far ahead"]


def test_motion_long_after_the_node_was_killed_is_seen(judge):
    judge.execute(message(START_NS, [0.1, 1.19], [0.0, 0.01]), START_NS)
    watch(judge, 0.01)
    judge.lost_track()
    watch(judge, 1.15, active=False, from_s=0.01)
    assert list(judge.found.violations) == ["moves while the node is not active"]


def test_a_command_outside_is_allowed_where_the_robot_was_outside_before(judge):
    judge.clock_jumped(START_NS)  # after which its motion is not judged
    out = judge.limits.upper + 0.05
    plan = JointTrajectoryPlan(START_NS, np.array([0.1]), out[None], np.zeros((1, len(out))))
    judge.controller.execute(plan, START_NS)
    watch(judge, 0.2)
    middle = (judge.limits.lower + judge.limits.upper) / 2
    back = float((out - middle)[-1])  # the joint with the smallest range is as far out as it was
    judge.execute(message(START_NS + S // 5, [0.1, 0.5], [back, 0.0]), START_NS + S // 5)
    assert judge.found.violations == {}
    judge.execute(message(START_NS + S // 5, [0.1, 0.5], [back + 5.0, 0.0]), START_NS + S // 5)
    assert list(judge.found.violations) == ["a command beyond a position limit"]


def test_what_a_chunk_was_made_of_and_when_is_judged(soak):
    def made(epoch, stamp_s=0.0, published_s=0.01, **more):
        soak._on_provenance(provenance(epoch=epoch, observation_stamp_ns=START_NS + int(stamp_s * S),
                                       published_ns=START_NS + int(published_s * S), **more))
        return soak.found.violations

    assert made(3) == {}
    assert set(made(3, 0.0, 1.1)) == {"a stale command"}
    soak._inputs.damaged.append("base_0_rgb 77")
    assert set(made(3, **{"input_stamp_ns.base_0_rgb": 77})) == {"a stale command", "a damaged picture"}
    soak._activation_ended(3)
    made(3, -0.1, -0.01)  # published before its end
    assert "a chunk of a past activation" not in soak.found.violations
    assert "a chunk of a past activation" in made(3)
    before = soak.found.counts["a chunk of a past activation"]
    made(4)
    made(3, -0.1, -0.01)
    assert soak.found.counts["a chunk of a past activation"] == before + 1


def test_what_a_node_does_not_count_is_found(soak):
    soak._on_diagnostics(provenance(**{"received.base_image": 9, "taken.base_0_rgb": 6, "dropped.base_0_rgb": 2}))
    assert soak.found.violations == {}
    soak._on_diagnostics(provenance(**{"received.base_image": 9, "taken.base_0_rgb": 5, "dropped.base_0_rgb": 2}))
    assert list(soak.found.violations) == ["not counted"]


def test_sets_that_vanish_and_messages_that_nobody_sent_are_found():
    counts = {"taken.state": 10, "chunks": 5, "refused.encoding": 2, "dropped.activation ended": 3,
              "refused.missing joint": 4, "refused.unusable state": 7}
    assert broken(conservation(counts, {}, open_sets=0)) == []
    assert len(broken(conservation(counts | {"chunks": 4}, {}, open_sets=0))) == 1
    assert len(broken(conservation(counts | {"chunks": 6}, {}))) == 1
    told = {"injected.refused.inference failed": 3, "refused.inference failed": 1, "refused.encoding": 2}
    assert len(broken(wire_accounts(told, Counter({"encoding": 1})))) == 2


def test_pieces_of_a_run_keep_its_peaks():
    flat = [{"threads": 3, "descriptors": 9, "memory": n % 7} for n in range(65)]
    pieces = in_pieces(flat)
    assert len(pieces) == 20 and {piece["threads"] for piece in pieces} == {3}
    assert max(piece["memory"] for piece in pieces) == 6


def test_a_picture_needs_dds(capsys):
    assert main(["soak", "--picture", "x.png"]) == 2


def test_the_node_is_safe_over_dds_and_after_a_kill(tmp_path, capfd):
    """Six simulated seconds, of which the node lives four before it is ended for the first time."""
    done = main(["soak", "--dds", "6", "--speed", "3", "--seed", "2", "--picture", str(tmp_path / "standing.png")])
    line = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert done == 0 and line["problems"] == [] and line["trajectories"] > 0, line
    assert line["node_processes"] >= 2 and line["injected"]["kill"] >= 1 and not line["growth_judged"]
    assert (tmp_path / "standing.png").read_bytes().startswith(b"\x89PNG")

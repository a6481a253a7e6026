"""From a chunk to what is published, on a clock that goes on while it is planned."""

from types import SimpleNamespace

import numpy as np
import pytest
from two_joints import LIMITS, NOW, chunk, measured

pytest.importorskip("rclpy", reason="needs ROS 2 (pip install 'pi05_ros[ros]', or source a ROS installation)")

from pi05_ros.errors import ObservationError  # noqa: E402
from pi05_ros.ros.motion import MOST_PLANS, Motion  # noqa: E402
from pi05_ros.runtime.inference_loop import Delivery  # noqa: E402
from pi05_ros.runtime.joining import Joining  # noqa: E402
from pi05_ros.runtime.mailbox import Mailbox  # noqa: E402

LEAD_S = 0.02
VALUES = {"input_timeout_s": 1.0, "max_input_age_s": 0.5, "stop_time_s": 0.2, "command_lead_s": LEAD_S,
          "max_committed_s": 1.0, "fade_s": 0.5}
LINE = np.linspace([0.0, 0.1], [0.3, 0.5], 50)


class Told:
    """What `Commands` is to the motion."""

    def __init__(self):
        self.last, self.plans, self.planned_ns, self.rehearsed = None, [], [], []

    def publish(self, plan):
        self.plans.append(plan)
        self.last = plan

    def rehearse(self, plan):
        self.rehearsed.append(plan)

    def publish_provenance(self, delivery, planned_ns, published_ns, measured_ns, plan):
        self.planned_ns.append(planned_ns)


def moving(halts_s):
    """A motion whose process halts for so long, once each, between two looks at the clock while it plans."""
    now, halts, told = NOW, list(halts_s), Told()

    def clock():
        nonlocal now
        looks.append(now)
        if len(looks) % 2 == 0 and halts:  # the second look of a try
            now += int(halts.pop(0) * 1e9)
        return now

    looks, mailbox = [], Mailbox(())
    mailbox.put(Mailbox.STATE, measured(LINE[5]), NOW, NOW)
    motion = Motion(LIMITS, mailbox, told, Joining(lambda *args: None), clock, lambda: VALUES, lambda line: None)
    delivery = Delivery(chunk(LINE, age_s=0.1), 1, {}, NOW, NOW)
    return SimpleNamespace(motion=motion, told=told, delivery=delivery)


@pytest.mark.parametrize(("halts_s", "at_s"), [([], 0.0), ([0.4 * LEAD_S], 0.0), ([0.015], 0.015),
                                               ([0.05, 0.2], 0.25), ([0.05, 0.05, 0.019], 0.1)])
def test_a_chunk_is_planned_again_where_the_lead_is_half_gone(halts_s, at_s):
    one = moving(halts_s)
    one.motion.publish(one.delivery)
    (plan,), (planned_ns,) = one.told.plans, one.told.planned_ns
    assert planned_ns == NOW + round(at_s * 1e9)
    # Nothing begins sooner than the lead after it was planned.
    assert plan.stamp_ns + plan.offsets_ns[0] >= planned_ns + LEAD_S * 1e9


def test_a_chunk_that_cannot_be_planned_in_time_is_not_executed():
    one = moving([0.03] * MOST_PLANS)
    with pytest.raises(ObservationError, match="less than command_lead_s = 0.02 s, received 0.030 s") as raised:
        one.motion.publish(one.delivery)
    assert raised.value.cause == "late plan" and not one.told.plans


def test_without_a_lead_nothing_is_promised():
    one = moving([0.03])
    one.motion._values = lambda: VALUES | {"command_lead_s": 0.0}
    one.motion.publish(one.delivery)
    assert len(one.told.plans) == 1


def test_what_was_commanded_is_asked_of_older_trajectories_only_where_the_running_one_does_not_know():
    one = moving([])
    one.motion.publish(one.delivery)
    assert (asked := one.motion._commanded.at(NOW)) is not None
    for known_from_ns, told in ((NOW, None), (NOW + 1, asked)):
        found = one.motion.measured(NOW, SimpleNamespace(known_from_ns=known_from_ns))
        np.testing.assert_equal((found.positions, found.told), (LINE[5], told))


def test_a_rehearsal_plans_what_would_be_published_and_publishes_nothing():
    one = moving([])
    one.motion.rehearse()
    assert not one.told.rehearsed  # nothing was executed yet
    one.motion.publish(one.delivery)
    last, held = one.told.last, one.motion.held
    one.motion.rehearse()
    (plan,) = one.told.rehearsed
    assert len(one.told.plans) == 1 and one.told.last is last and one.motion.held is held
    assert np.isfinite(plan.positions).all() and plan.offsets_ns[-1] > 0
    one.motion.hold("enough")
    one.motion.rehearse()
    assert len(one.told.rehearsed) == 1  # at rest there is nothing to get ready for


def test_a_rehearsal_of_what_can_no_longer_be_executed_says_nothing():
    one = moving([])
    one.motion.publish(one.delivery)
    one.motion._values = lambda: VALUES | {"max_input_age_s": -1.0}
    one.motion.rehearse()
    assert not one.told.rehearsed and len(one.told.plans) == 1

"""Newest wins, sets by stamp, and every refusal by its cause."""

import pytest

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.mailbox import Mailbox

MS = 1_000_000
NOW = 10_000 * MS


def put(mailbox, slot, value, stamp):
    mailbox.put(slot, value, stamp, now_ns=stamp)


def filled(*cameras, age_ms=20, optional=()):
    mailbox = Mailbox(cameras, optional)
    for camera in cameras:
        put(mailbox, camera, camera, NOW - age_ms * MS)
    put(mailbox, "state", "joints", NOW - 5 * MS)
    return mailbox


def cause(mailbox, now=NOW):
    with pytest.raises(ObservationError) as caught:
        mailbox.take(now)
    return caught.value.cause


def test_a_set_is_complete_once_and_then_waits_for_new_frames_of_every_required_camera():
    woken = []
    mailbox = Mailbox(("a", "b"), on_complete=lambda: woken.append(1))
    put(mailbox, "a", 1, NOW)
    put(mailbox, "b", 1, NOW)
    assert not mailbox.complete() and not woken
    put(mailbox, "state", 1, NOW)
    assert mailbox.complete() and len(woken) == 1
    mailbox.take(NOW)
    put(mailbox, "a", 2, NOW + MS)
    assert not mailbox.complete()
    put(mailbox, "b", 2, NOW + MS)
    assert mailbox.complete()


def test_the_newest_frame_wins_and_the_lost_one_is_counted():
    mailbox = filled("a")
    put(mailbox, "a", "newer", NOW - 10 * MS)
    assert mailbox.take(NOW)["a"].value == "newer"
    assert mailbox.dropped["a"] == 1


def test_a_frame_that_comes_out_of_order_is_counted_and_ignored():
    mailbox = filled("a")
    put(mailbox, "a", "older", NOW - 100 * MS)
    assert mailbox.take(NOW)["a"].value == "a"
    assert mailbox.dropped["a out of order"] == 1


def test_overwritten_joint_states_are_no_loss():
    mailbox = filled("a")
    put(mailbox, "state", "newer", NOW)
    assert mailbox.take(NOW)["state"].value == "newer" and not mailbox.dropped


def test_stale_inputs_are_refused_by_name():
    mailbox = Mailbox(("a",))
    put(mailbox, "a", 1, NOW - 501 * MS)
    put(mailbox, "state", 1, NOW - 501 * MS)
    assert cause(mailbox) == "stale input"


def test_a_stamp_in_the_future_is_refused_and_keeps_nothing_out():
    mailbox = filled("a")
    with pytest.raises(ObservationError) as caught:
        mailbox.put("a", "an hour ahead", NOW + 3_600_000 * MS, NOW)
    assert caught.value.cause == "future stamp"
    put(mailbox, "a", "good", NOW)
    assert mailbox.take(NOW)["a"].value == "good"


def test_a_set_waits_until_the_stamps_lie_close_together():
    mailbox = filled("a", "b", age_ms=120)
    put(mailbox, "b", "next", NOW)  # the next frame of b overtook that of a
    assert not mailbox.complete() and mailbox.take(NOW) is None
    put(mailbox, "a", "next", NOW)
    taken = mailbox.take(NOW)
    assert (taken["a"].value, taken["b"].value) == ("next", "next")


def test_cameras_that_never_agree_are_named_by_the_watchdog():
    mailbox = Mailbox(("a", "b"))
    for step in range(0, 2000, 100):
        for slot, lag in (("a", 0), ("b", 300), ("state", 0)):
            put(mailbox, slot, step, NOW + (step - lag) * MS)
        assert not mailbox.complete()
    causes = mailbox.missing(NOW + 1900 * MS, 1.0)
    assert set(causes) == {"b"} and "0.300 s behind" in causes["b"]


def test_without_an_input_there_is_no_set():
    mailbox = Mailbox(("a",))
    put(mailbox, "a", 1, NOW)
    assert mailbox.take(NOW) is None


def test_a_living_optional_camera_is_waited_for_and_a_dead_one_left_out():
    mailbox = filled("a", optional=("wrist",))
    assert set(mailbox.take(NOW)) == {"a", "state"}
    put(mailbox, "wrist", 1, NOW - 10 * MS)
    put(mailbox, "a", 2, NOW)
    assert set(mailbox.take(NOW)) == {"a", "wrist", "state"}
    put(mailbox, "a", 3, NOW + 30 * MS)
    assert not mailbox.complete()  # the wrist camera lives: its next frame is on the way
    put(mailbox, "wrist", 2, NOW + 30 * MS)
    assert mailbox.complete()
    mailbox.take(NOW + 30 * MS)
    for slot in ("a", "state"):
        put(mailbox, slot, 4, NOW + 600 * MS)
    assert mailbox.complete()
    assert set(mailbox.take(NOW + 600 * MS)) == {"a", "state"}


def test_the_watchdog_sees_what_is_silent_and_since_when():
    mailbox = Mailbox(("a", "b"))
    put(mailbox, "a", 1, NOW - 2000 * MS)
    assert mailbox.missing(NOW, 1.0) == {"a": "last is 2.00 s old", "b": "never arrived", "state": "never arrived"}


def test_nothing_of_an_earlier_activation_remains_after_clear():
    mailbox = filled("a")
    mailbox.clear()
    assert not mailbox.complete() and mailbox.latest("state") is None


def test_a_robot_without_cameras_is_driven_by_its_joints():
    mailbox = Mailbox(())
    put(mailbox, "state", 1, NOW)
    assert mailbox.complete()
    mailbox.take(NOW)
    assert not mailbox.complete()


def test_every_frame_is_taken_or_dropped_by_a_cause():
    mailbox = filled("a", optional=("b",))
    put(mailbox, "b", 1, NOW - 20 * MS)
    mailbox.take(NOW)
    assert mailbox.taken == {"a": 1, "b": 1, "state": 1} and not mailbox.dropped
    put(mailbox, "b", 2, NOW)
    put(mailbox, "a", 2, NOW + 900 * MS)  # long after: b is silent now, and its unread frame too old to wait for
    put(mailbox, "state", 2, NOW + 900 * MS)
    assert set(mailbox.take(NOW + 900 * MS)) == {"a", "state"}
    put(mailbox, "a", 3, NOW + 950 * MS)
    put(mailbox, "a", 3, NOW + 950 * MS)
    mailbox.clear()
    assert mailbox.dropped == {"b fallen silent": 1, "a repeated": 1, "a forgotten": 1}
    assert mailbox.taken == {"a": 2, "b": 1, "state": 2}


def test_joints_of_one_stamp_from_two_publishers_are_counted_and_the_later_ones_hold():
    mailbox = filled("a")
    put(mailbox, "state", "other", NOW - 5 * MS)
    assert mailbox.take(NOW)["state"].value == "other" and mailbox.dropped == {"state repeated": 1}

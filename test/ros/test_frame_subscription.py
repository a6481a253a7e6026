"""Frames taken straight into memory of ours, over real rclpy: none lost, none overwritten, none left behind."""

from __future__ import annotations

import ctypes
import gc
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.executors import SingleThreadedExecutor
from rclpy.experimental import EventsExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from robot_stand_in import PATIENCE_S
from sensor_msgs.msg import Image

from pi05_ros.errors import ObservationError
from pi05_ros.ros import rcl, taking
from pi05_ros.ros.conversions import image_message, to_time
from pi05_ros.ros.frame_subscription import FrameSubscription, take_frames_directly
from pi05_ros.ros.wire_images import read_image
from pi05_ros.sim import sensor_load

QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


class Bench:
    """A camera and its subscription; `frames` are what came, `refused` the errors, `given` all memory."""

    def __init__(self, executor):
        self._executor, self.node = executor, rclpy.create_node("bench", namespace="/somewhere",
                                                                cli_args=["--ros-args", "-r", "~/image:=/front"])
        executor.add_node(self.node)
        self.frames, self.refused, self.given, self.full = [], [], [], False
        self.through_rclpy = []
        self.subscription = self.node.create_subscription(Image, "~/image", self.through_rclpy.append, QOS, raw=True,
                                                          callback_group=MutuallyExclusiveCallbackGroup())
        take_frames_directly(self.subscription, self.memory, self.receive, self.refused.append)
        self.camera = self.node.create_publisher(Image, "/front", QOS)
        self.until(self.camera.get_subscription_count)

    def memory(self, size):
        if self.full:
            raise ObservationError("image", expected="room", received="none", way_out="none", cause="pinned memory")
        memory = np.empty(size, np.uint8)
        self.given.append(weakref.ref(memory))
        return memory

    def alive(self):
        return sum(memory() is not None for memory in self.given)

    def receive(self, cdr):
        self.frames.append(read_image(cdr))
        return self.frames[-1].data_at

    def until(self, holds):
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end
            self._executor.spin_once(timeout_sec=0.1)

    def send(self, frame, name=""):
        """Until it is here."""
        message = image_message(frame, to_time(len(self.frames) + 1))
        message.header.frame_id = name
        before = len(self.frames) + len(self.refused)
        self.camera.publish(message)
        self.until(lambda: len(self.frames) + len(self.refused) > before)


@pytest.fixture(params=[SingleThreadedExecutor, EventsExecutor])
def bench(request):
    rclpy.init()
    executor = request.param()
    bench = Bench(executor)
    yield bench
    executor.remove_node(bench.node)
    bench.node.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()
    assert not bench.through_rclpy


def pixels(image):
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


def picture(seed, height=48, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_frames_of_any_size_in_turn_arrive_bit_for_bit_and_in_order(bench):
    sent = [picture(n, *size) for n, size in enumerate([(48, 64), (48, 64), (480, 640), (1, 1), (48, 64), (481, 640)])]
    for frame in sent:
        bench.send(frame)
    assert [image.stamp_ns for image in bench.frames] == [1, 2, 3, 4, 5, 6]
    for frame, image in zip(sent, bench.frames, strict=True):
        np.testing.assert_array_equal(pixels(image), frame)


def test_what_somebody_has_is_not_overwritten_and_what_nobody_has_is_given_back(bench):
    kept = picture(0)
    bench.send(kept)
    held = pixels(bench.frames[0])
    for n in range(1, 200):
        bench.send(picture(n))
        bench.frames[n - 1] = None
        assert bench.alive() <= 3  # held, the newest, and the one that is being dropped
    np.testing.assert_array_equal(held, kept)


@pytest.mark.parametrize("name", ["", "camera", "a_much_longer_name_of_a_frame"])
def test_pixels_are_writeable_and_aligned_from_the_second_frame_on(bench, name):
    for n in range(3):
        bench.send(picture(n), name)
    for image in bench.frames[1:]:
        frame = pixels(image)
        assert frame.ctypes.data % taking.ALIGNMENT == 0 and frame.flags.writeable and frame.flags.c_contiguous


def test_a_frame_without_memory_is_refused_and_the_next_one_arrives(bench, capfd):
    bench.send(picture(0))
    bench.full = True
    bench.send(picture(1))
    bench.send(picture(2))
    bench.full = False
    bench.send(picture(3))
    assert [error.cause for error in bench.refused] == ["pinned memory"] * 2
    np.testing.assert_array_equal(pixels(bench.frames[-1]), picture(3))
    assert "overwritten" not in capfd.readouterr().err  # rcl's complaint about an error that nobody reset


def test_topic_and_qos_are_those_of_any_subscription(bench):
    assert bench.subscription.topic_name == "/front"
    infos = bench.node.get_subscriptions_info_by_topic("/front")
    (info,) = [info for info in infos if info.node_namespace == "/somewhere"]
    assert info.node_name == "bench" and info.topic_type == "sensor_msgs/msg/Image"
    assert info.qos_profile.reliability == ReliabilityPolicy.RELIABLE


def test_after_destroy_nothing_comes_and_nothing_is_left(bench):
    bench.send(picture(0))
    gone = weakref.ref(bench.subscription)
    bench.camera.publish(image_message(picture(1), to_time(2)))  # is ready, and not taken any more
    bench.node.destroy_subscription(bench.subscription)
    bench.camera.publish(image_message(picture(2), to_time(3)))  # while the executor has not heard of it
    bench.subscription = None
    bench.until(lambda: not bench.camera.get_subscription_count())
    assert len(bench.frames) == 1
    bench.frames.clear()
    bench.through_rclpy.clear()  # what the executor had in hand

    def collected():
        gc.collect()
        return gone() is None and not bench.alive()

    bench.until(collected)


def test_a_middleware_that_wants_the_exact_size_is_given_it():
    """As Cyclone DDS, which resizes for every message that is not as large as the one before."""
    given = []

    def memory(size):
        given.append(np.empty(size, np.uint8))
        return given[-1]

    taker = taking.Taker(memory)
    resize = rcl.library().rcutils_uint8_array_resize
    for size, memories in ((100, 1), (60, 1), (60, 1), (100, 1), (200, 2)):
        assert resize(ctypes.byref(taker._message), size) == 0
        begin = taker._message.buffer - given[-1].ctypes.data
        assert taker._message.capacity == size and 0 <= begin <= len(given[-1]) - size and len(given) == memories


def test_a_library_of_other_structures_is_not_used(monkeypatch):
    class Other(ctypes.Structure):
        _fields_ = [("length", ctypes.c_size_t), ("capacity", ctypes.c_size_t), ("buffer", ctypes.c_void_p),
                    ("allocator", rcl.Allocator)]

    for module in (rcl, taking):
        monkeypatch.setattr(module, "Message", Other)
    monkeypatch.setattr(taking, "library", rcl.library.__wrapped__)
    with pytest.raises(AttributeError, match="resized"):
        taking.Taker(taking.plain_memory)


def missing():
    raise AttributeError("rcl_take_serialized_message")


@pytest.mark.parametrize("place, name, value, why", [(taking, "library", missing, "rcl_take_serialized_message"),
                                                     (FrameSubscription, "raw", True, "before it asks")])
def test_where_rclpy_is_another_frames_come_through_it_and_the_log_says_so_once(node, robot, monkeypatch, capfd, place,
                                                                               name, value, why):
    monkeypatch.setattr(place, name, value)
    assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
    robot.introduce_optional_camera(node)
    robot.next_trajectory()
    for image, frame in zip(node.parts.policy.seen[0].images.values(), robot.frames, strict=True):
        np.testing.assert_array_equal(image, frame)
    node.parts.inputs.ask()
    node.parts.inputs.ask()
    said = [line for line in capfd.readouterr().err.splitlines() if "frames take longer" in line]
    assert len(said) == 1 and why in said[0]
    assert {"base_image", "left_wrist_image"} <= {s.topic_name.rsplit("/", 1)[1] for s in node.subscriptions}


def test_frames_are_taken_directly_in_the_node(active, robot, capfd):
    robot.next_trajectory()
    assert all(active.parts.inputs.made[name].taken for name in ("base_image", "left_wrist_image"))
    active.parts.inputs.ask()
    assert "frames take longer" not in capfd.readouterr().err


def test_damaged_images_are_refused_through_this_way_too(active, robot):
    whole = serialize_message(robot.image(0))
    robot.until(lambda: active.diagnostics.refused["wire format"] > 1, lambda: robot.cameras[0].publish(whole[:-9]))
    robot.next_trajectory()
    assert active.parts.inputs.received["base_image"] >= 3


@pytest.mark.parametrize("way", [rcl.publisher_of, sensor_load.way_out])
def test_a_message_goes_out_from_where_it_lies_as_it_is_then(bench, way):
    message = bytearray(serialize_message(image_message(picture(5), to_time(0))))
    publish = way(bench.camera, message)
    for second in (1, 2):
        message[sensor_load.STAMP] = second.to_bytes(4, "little") + bytes(4)
        publish()
        bench.until(lambda: bench.frames and bench.frames[-1].stamp_ns == second * 10**9)  # noqa: B023
        np.testing.assert_array_equal(pixels(bench.frames[-1]), picture(5))
    assert len(bench.frames) == 2


def test_where_rclpy_is_another_a_message_goes_out_through_it_and_that_is_said(bench, monkeypatch, capsys):
    monkeypatch.setattr(rcl, "library", missing)
    publish = sensor_load.way_out(bench.camera, bytearray(serialize_message(image_message(picture(5), to_time(7)))))
    publish()
    bench.until(lambda: bench.frames)
    assert bench.frames[0].stamp_ns == 7 and "rcl_take_serialized_message" in capsys.readouterr().err


def test_a_middleware_that_fails_is_an_input_that_was_refused(monkeypatch):
    taker, told = taking.Taker(taking.plain_memory), []
    failing = SimpleNamespace(rcl_take_serialized_message=lambda *args: 1,
                              rcutils_reset_error=lambda: told.append("reset"))
    monkeypatch.setattr(taker, "_library", failing)
    with pytest.raises(ObservationError, match="hand it over, received error 1 of rcl"):
        taker.take(0)
    assert told == ["reset"]

"""Configure, activate, deactivate, clean up, again and again: nothing may be left behind."""

import gc
import weakref

import numpy as np
import psutil
from rclpy.logging import LoggingSeverity, set_logger_level

from pi05_ros.ros.policy_node import PolicyNode

CYCLES, EVERY = 1000, 100  # a cycle takes about 10 ms on two cores
MEMORY_BYTES = 500  # a cycle; the allocator's rare jumps do not count, a leak of one small object does


def cycle(node):
    for transition in ("configure", "activate", "deactivate", "cleanup"):
        assert getattr(node, f"trigger_{transition}")().name == "SUCCESS"


def test_a_thousand_cycles_leave_nothing_behind(node):
    set_logger_level("pi05_policy", LoggingSeverity.ERROR)
    process = psutil.Process()

    def standing():
        gc.collect()
        node.made.clear()  # the test's own list of policies
        return process.num_threads(), process.num_fds(), len(gc.get_objects()), process.memory_full_info().uss

    seen = []
    try:
        for _ in range(CYCLES // EVERY):
            for _ in range(EVERY):
                cycle(node)
            seen.append(standing())
    finally:
        set_logger_level("pi05_policy", LoggingSeverity.INFO)
    threads, files, objects, memory = zip(*seen[1:], strict=True)  # the first hundred warm up
    assert len(set(threads)) == len(set(files)) == 1, (threads, files)
    assert objects[-1] - objects[0] < 100, objects
    assert np.median(np.diff(memory)) / EVERY < MEMORY_BYTES, memory


def test_frames_that_arrive_while_a_configuration_ends_harm_nobody(node, robot, executor):
    """rclpy's executor ended the process where an event came for what had just been taken away."""
    for cycles in range(1, 31):
        for transition in ("configure", "activate", "deactivate", "cleanup"):
            assert getattr(node, f"trigger_{transition}")().name == "SUCCESS"
            robot.send()
            if transition == "configure":
                robot.connect()
                received = node.parts.inputs.received
                robot.until(lambda: received["base_image"], robot.send)  # noqa: B023
        for _ in range(20):
            executor.spin_once(timeout_sec=0.0)
        assert node.diagnostics.counted["activations"] == cycles


def test_cleanup_lets_go_of_the_model(executor):
    node = PolicyNode()
    executor.add_node(node)
    for _ in range(2):
        assert node.trigger_configure().name == "SUCCESS" and node.trigger_activate().name == "SUCCESS"
        model = weakref.ref(node.parts.policy.stages.vision.model)
        assert model() is not None
        assert node.trigger_deactivate().name == "SUCCESS" and node.trigger_cleanup().name == "SUCCESS"
        assert model() is None

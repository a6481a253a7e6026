"""Sensors of a soak over DDS: messages lost, late, doubled, damaged; publishers that end and begin anew, in this
process and in another."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from pi05_ros.ros.subscriptions import TOPICS
from pi05_ros.runtime.chunking import JointLimits
from pi05_ros.sim.faults import Fault
from pi05_ros.sim.faulty_inputs import BESIDE, joint_damage, joints, picture, picture_damage
from pi05_ros.sim.wire import TARGET, Wire
from pi05_ros.transforms.robot_file import Robot


class WireInputs:
    """`sent` counts messages by topic, and damaged ones by their damage; `damaged` names the last damaged pictures as
    provenance would.

    Args:
        slots: cameras, and `state`.
        domain: ROS_DOMAIN_ID of the other process.
    """

    def __init__(self, wire: Wire, robot: Robot, slots: tuple[str, ...], domain: int) -> None:
        self._wire, self._robot, self._slots, self._domain = wire, robot, slots, domain
        limits = JointLimits(robot)
        self._beside = BESIDE * (limits.upper - limits.lower)
        self._silent_until_ns: Counter[str] = Counter()
        self._late: list[tuple[int, Callable[[], None]]] = []
        self._faults: dict[str, dict[str, float]] = {slot: {} for slot in slots}  # of the slot's next message
        self._foreign: subprocess.Popen | None = None
        self.sent: Counter[str] = Counter()
        self.damaged: deque[str] = deque(maxlen=200)

    def inject(self, fault: Fault, steady_ns: int) -> None:
        if fault.kind == "silence":
            self._silent_until_ns[fault.target] = steady_ns + int(fault.amount * 3e9)
        elif fault.kind == "publisher_restart":
            self._wire.restart_publisher(fault.target)
        elif fault.kind == "foreign_publisher":
            self._foreign_publisher()
        else:
            self._faults[fault.target][fault.kind] = fault.amount

    def send(self, steady_ns: int, now_ns: int, positions: np.ndarray, pictures: bool) -> None:
        """Joints, pictures if it is their turn, and what was late. now_ns: of the robot's clock, for the stamps."""
        due = [send for at_ns, send in self._late if at_ns <= steady_ns]
        self._late = [late for late in self._late if late[0] > steady_ns]
        for slot in self._slots:
            if slot == "state" or pictures:
                self._send(slot, steady_ns, now_ns, positions)
        for send in due:
            send()

    def close(self) -> None:
        if self._foreign is not None:
            self._foreign_publisher()

    def _send(self, slot: str, steady_ns: int, now_ns: int, positions: np.ndarray) -> None:
        kinds, self._faults[slot] = self._faults[slot], {}
        if "drop" in kinds or self._silent_until_ns[slot] > steady_ns:
            return
        send = self._sender(slot, now_ns, positions, kinds)
        wait_s = 0.6 * kinds["delay"] if "delay" in kinds else 0.1 if "reorder" in kinds else 0.0
        if wait_s:
            self._late.append((steady_ns + int(wait_s * 1e9), send))
            return
        for _ in range(1 + ("duplicate" in kinds)):
            send()
        if "second_publisher" in kinds:
            self._sender(slot, now_ns, positions + self._beside, {})()

    def _sender(self, slot: str, now_ns: int, positions: np.ndarray, kinds: dict[str, float]) -> Callable[[], None]:
        message: Any
        if slot == "state":
            message, damage = joints(self._robot, positions, now_ns, kinds), joint_damage(kinds)
        else:
            message, damage = picture(now_ns, kinds), picture_damage(kinds)

        def send() -> None:
            self.sent[TOPICS.get(slot, "joint_states")] += 1
            name = f"{slot} {now_ns}"
            if damage:
                self.sent[damage] += 1
                self.damaged.append(name)
            elif name in self.damaged:  # of a second publisher, and sound: it is used where the damaged one was lost
                self.damaged.remove(name)
            self._wire.publish(slot, message)

        return send

    def _foreign_publisher(self) -> None:
        """A second process publishes the first camera, on a clock of its own; the next time it is killed."""
        if self._foreign is not None:
            self._foreign.kill()
            self._foreign.communicate()
            self._foreign = None
            return
        words = ["--topic", f"{TARGET}/{TOPICS[self._slots[0]]}", "--rate", "20", "--seconds", "3600", "--height", "8",
                 "--width", "8"]
        self._foreign = subprocess.Popen([sys.executable, "-m", "pi05_ros.sim.sensor_load", *words], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                         env=os.environ | {"ROS_DOMAIN_ID": str(self._domain)})
        assert self._foreign.stdin is not None
        self._foreign.stdin.write(f"{time.time()}\n")
        self._foreign.stdin.flush()

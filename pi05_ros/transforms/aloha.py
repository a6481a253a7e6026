"""ALOHA's numbers to those of pi's base models (PI05_SPEC section 10): joint signs and gripper quantities.

Vectors of 14: six joints and a gripper, left then right. The dataset's gripper *state* is a finger position, its
gripper *action* a motor angle, both scaled to 0 (closed) .. 1 (open).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pi05_ros.errors import ObservationError

GRIPPERS = (6, 13)
SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
FINGER_CLOSED_M, FINGER_OPEN_M = 0.01844, 0.05800
MOTOR_CLOSED_RAD, MOTOR_OPEN_RAD = -0.6213, 1.4910  # range of ALOHA's gripper action
PI_CLOSED_RAD, PI_OPEN_RAD = 0.5476, 1.6296  # motor angles that are 0 and 1 in the base models' gripper state
HORN_M, ARM_M = 0.022, 0.036  # the linkage between motor and finger


def finger_to_motor(finger_m: np.ndarray) -> np.ndarray:
    """Finger position [m] to the motor's angle [rad]. Raises ObservationError for a position <= 0."""
    if (finger_m <= 0).any():
        raise ObservationError("gripper", expected="a finger position > 0 m", received=f"{finger_m.min():.4f} m",
                               way_out="Check unit, scale and offset of the grippers in the robot file.",
                               cause="gripper range")
    return np.arcsin(np.clip((HORN_M**2 + finger_m**2 - ARM_M**2) / (2 * HORN_M * finger_m), -1.0, 1.0))


def motor_to_finger(motor_rad: np.ndarray) -> np.ndarray:
    """The motor's angle [rad] to the finger position [m]; beyond a quarter turn the finger stays where it is."""
    angle = np.clip(motor_rad, -np.pi / 2, np.pi / 2)
    return HORN_M * np.sin(angle) + np.sqrt(ARM_M**2 - (HORN_M * np.cos(angle)) ** 2)


@dataclass(frozen=True)
class AlohaAdapter:
    """openpi's `adapt_to_pi`. State and action grippers are converted differently, by design."""

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        out, grippers = state * SIGNS, list(GRIPPERS)
        finger = out[grippers] * (FINGER_OPEN_M - FINGER_CLOSED_M) + FINGER_CLOSED_M
        out[grippers] = (finger_to_motor(finger) - PI_CLOSED_RAD) / (PI_OPEN_RAD - PI_CLOSED_RAD)
        return out

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        out, grippers = actions * SIGNS, list(GRIPPERS)
        out[:, grippers] = out[:, grippers] * (MOTOR_OPEN_RAD - MOTOR_CLOSED_RAD) + MOTOR_CLOSED_RAD - PI_CLOSED_RAD
        return out

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        out, grippers = actions * SIGNS, list(GRIPPERS)
        out[:, grippers] = (out[:, grippers] + PI_CLOSED_RAD - MOTOR_CLOSED_RAD) / (MOTOR_OPEN_RAD - MOTOR_CLOSED_RAD)
        return out


@dataclass(frozen=True)
class FingerCommand:
    """For grippers that ROS commands by finger position: the action's motor angle, as the state's finger number.

    A straight line between the two ends would be up to 3.7 mm off a finger.
    """

    grippers: tuple[int, ...]

    def encode_state(self, state: np.ndarray) -> np.ndarray:
        return state

    def apply(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        out, columns = actions.copy(), list(self.grippers)
        motor = finger_to_motor(out[:, columns] * (FINGER_OPEN_M - FINGER_CLOSED_M) + FINGER_CLOSED_M)
        out[:, columns] = (motor - MOTOR_CLOSED_RAD) / (MOTOR_OPEN_RAD - MOTOR_CLOSED_RAD)
        return out

    def invert(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        out, columns = actions.copy(), list(self.grippers)
        finger = motor_to_finger(out[:, columns] * (MOTOR_OPEN_RAD - MOTOR_CLOSED_RAD) + MOTOR_CLOSED_RAD)
        out[:, columns] = (finger - FINGER_CLOSED_M) / (FINGER_OPEN_M - FINGER_CLOSED_M)
        return out

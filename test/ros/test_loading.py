"""What a load that failed leaves behind: nothing, even while its error is kept."""

import weakref

import pytest

from pi05_ros.errors import WorkerError
from pi05_ros.ros.loading import load
from pi05_ros.ros.parameters import SPECS
from pi05_ros.transforms.robot_loader import load_robot

VALUES = {name: spec.default for name, spec in SPECS.items()}


class Weights:
    pass


def failing(error, made):
    def inner():
        half_loaded = Weights()
        made.append(weakref.ref(half_loaded))
        raise error

    def make(**arguments):
        try:
            inner()
        except KeyError as cause:
            raise RuntimeError("CUDA error: out of memory") from cause

    return make


@pytest.mark.parametrize(("error", "raised"), [(ValueError("damaged"), ValueError), (KeyError("k"), WorkerError)])
def test_a_failed_load_keeps_nothing_of_what_it_had_loaded(error, raised):
    made = []
    with pytest.raises(raised) as kept:
        load(failing(error, made), load_robot("arm6"), VALUES, print, lambda: False)
    assert made[0]() is None
    assert kept.value.__traceback__ is not None  # where it happened is still known

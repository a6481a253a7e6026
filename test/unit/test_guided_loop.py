"""Which chunk guides the next one, with two in the making."""

import pytest
from scripted_loop import Bench

from pi05_ros.runtime.delay import WARM_UP
from pi05_ros.runtime.joining import JoinSettings
from pi05_ros.runtime.trigger import LoopSettings


@pytest.fixture
def bench():
    return Bench()


def test_a_chunk_continues_the_one_that_was_denoised_before_it(bench):
    """Also in overlap, where that one was not yet made when this one began; and in the mode in which it began."""
    bench.settings = LoopSettings(join=JoinSettings("guided"))
    for _ in range(WARM_UP + 1):
        bench.joining.delay.add(0.02)
    first = bench.send()
    bench.run()
    bench.now_ms += 5
    second = bench.send()
    bench.run()
    bench.settings = LoopSettings()
    bench.finish(first)
    bench.run()
    assert bench.pipeline.guidance[first] is None and bench.pipeline.guidance[second].previous_index == 0
    bench.now_ms += 10
    third = bench.send()
    bench.run()
    bench.finish(second)
    bench.run()
    assert bench.pipeline.guidance[third] is None
    assert [d.join.mode for d in bench.out] == ["guided", "guided"]


def test_a_new_activation_continues_nothing(bench):
    bench.settings = LoopSettings(join=JoinSettings("guided"))
    bench.one_chunk()
    bench.loop.open(2)
    for _ in range(WARM_UP + 1):
        bench.joining.delay.add(0.02)
    stamp = bench.send()
    bench.run()
    assert bench.pipeline.guidance[stamp] is None

"""The loop with two chunks in the making, on a pipeline whose stages finish when the test says so."""

import pytest
from scripted_loop import MS, Bench

from pi05_ros.errors import ObservationError
from pi05_ros.runtime.trigger import LoopSettings


@pytest.fixture
def bench():
    return Bench()


def test_the_next_observation_is_begun_while_the_last_is_denoised_and_results_come_in_order(bench):
    first = bench.send()
    assert bench.run() == [("begin", first), ("advance", first)]
    bench.now_ms += 5
    second = bench.send()
    assert bench.run() == [("begin", second)]  # it is denoised when the first is done
    bench.finish(first)
    bench.now_ms += 10
    third = bench.send()
    assert bench.run() == [("collect", first), ("advance", second), ("begin", third)]
    bench.finish(second)
    assert bench.run() == [("collect", second), ("advance", third)]
    bench.finish(third)
    bench.run()
    assert [d.chunk.stamp_ns for d in bench.out] == [first, second, third]
    assert [d.input_stamps_ns["cam"] for d in bench.out] == [first, second, third]
    assert [d.chunk.chunk_index for d in bench.out] == [0, 1, 2]


def test_a_chunk_begins_just_in_time_for_the_front_stream_with_the_newest_observation(bench):
    bench.one_chunk()
    bench.send()
    bench.run()
    bench.now_ms += 1
    early = bench.send()
    assert bench.run() == [] and bench.loop.due() == pytest.approx(0.007)  # 8 ms in front, 1 passed
    bench.now_ms += 7
    newest = bench.send()
    assert bench.run() == [("begin", newest)]
    assert bench.mailbox.dropped["cam"] == 1 and early != newest


def test_a_result_is_asked_for_when_it_is_expected(bench):
    bench.one_chunk()
    bench.send()
    bench.run()
    assert bench.loop.due() == pytest.approx(0.9 * 0.015)  # 8 ms in front, 10 x 0.7 ms behind
    bench.now_ms += 14.9
    assert bench.loop.due() == pytest.approx(0.0002)


def test_an_observation_that_grew_too_old_in_its_slot_is_dropped_for_the_newest_and_counted(bench):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    old = bench.send()
    bench.run()
    bench.now_ms += 101  # the first one takes far longer than expected
    newest = bench.send()
    bench.finish(first)
    assert bench.run() == [("collect", first), ("drop", old), ("begin", newest), ("advance", newest)]
    assert bench.loop.dropped == {"too old": 1} and bench.out[1][1].cause == "too old"
    bench.finish(newest)
    bench.run()
    assert [d.chunk.stamp_ns for d in (bench.out[0], bench.out[2])] == [first, newest]


def test_time_spent_computing_does_not_make_an_observation_too_old(bench):
    bench.pipeline.begin, begin = lambda *args, **kwargs: (slow(), begin(*args, **kwargs))[1], bench.pipeline.begin

    def slow():
        bench.now_ms += 500

    stamp = bench.send()
    assert bench.run() == [("begin", stamp), ("advance", stamp)]


def test_settings_are_read_when_a_chunk_begins(bench):
    first = bench.send()
    bench.run()
    bench.settings = LoopSettings(denoising_steps=3)
    bench.now_ms += 1
    second = bench.send()
    bench.run()
    bench.settings = LoopSettings(denoising_steps=7)  # the second has begun: it keeps its three
    bench.finish(first)
    bench.run()
    bench.finish(second)
    bench.run()
    assert [d.chunk.num_steps for d in bench.out] == [10, 3]


def test_deactivation_drops_what_waits_and_lets_out_what_is_denoised_with_its_old_epoch(bench):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    second = bench.send()
    bench.run()
    bench.loop.close()
    bench.loop.open(2)
    bench.finish(first)
    assert bench.run() == [("collect", first), ("drop", second)]
    assert [d.epoch for d in bench.out] == [1] and bench.loop.dropped == {"activation ended": 1}
    third = bench.send()
    bench.run()
    bench.finish(third)
    bench.run()
    assert (bench.out[1].epoch, bench.out[1].chunk.chunk_index) == (2, 0)


@pytest.mark.parametrize("where", ["begin", "advance", "collect"])
def test_a_failure_anywhere_drops_all_closes_the_gate_and_a_new_activation_works(bench, where):
    first = bench.send()
    bench.run()
    bench.now_ms += 1
    bench.pipeline.error[where] = RuntimeError("CUDA error: out of memory")
    bench.send()
    bench.run()
    if where != "begin":  # all were dropped
        bench.finish(first)
    bench.run()
    epoch, error = next(item for item in bench.out if isinstance(item, tuple))
    assert epoch == 1 and "out of memory" in str(error) and "Traceback" in error.__notes__[0]
    assert bench.pipeline.pending == [] and isinstance(bench.out[-1], tuple)  # nothing follows from a broken device
    bench.send()
    assert bench.loop.due() is None
    bench.loop.open(2)
    stamp = bench.send()
    bench.run()
    bench.finish(stamp)
    bench.run()
    assert bench.out[-1].chunk.stamp_ns == stamp


def test_work_that_fails_on_the_device_is_reported_and_does_not_end_the_thread(bench):
    bench.send()
    bench.run()
    bench.pipeline.pending[0].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert bench.loop.due() == 0.0
    bench.run()
    ((epoch, error),) = bench.out
    assert epoch == 1 and error.cause == "CUDA error" and bench.loop.due() is None


def test_how_long_the_worker_is_busy_is_known(bench):
    assert bench.loop.busy_s() == 0.0
    first = bench.send()
    bench.run()
    bench.now_ms += 40
    assert bench.loop.busy_s() == pytest.approx(0.04)
    bench.finish(first)
    bench.run()
    assert bench.loop.busy_s() == 0.0


def test_the_policy_is_let_go_after_the_device_is_idle(bench):
    bench.send()
    bench.run()
    bench.loop.forget_policy()
    assert bench.pipeline.closed and bench.pipeline.pending == [] and bench.loop.due() is None
    bench.loop.step()  # and nothing happens


def test_how_long_a_set_waited_for_the_worker_is_known(bench):
    bench.one_chunk()
    bench.settings = LoopSettings(max_rate_hz=10.0)
    bench.one_chunk()
    stamp = bench.send()
    bench.run()
    bench.now_ms += 100
    bench.run()
    bench.finish(stamp)
    bench.run()
    assert bench.out[-1].started_ns - bench.out[-1].complete_ns == 100 * MS


def test_an_observation_that_is_refused_is_not_tried_again(bench):
    first = bench.send()
    bench.pipeline.error["advance"] = ObservationError("actions", expected="numbers", received="NaN", way_out="None.")
    assert bench.run() == [("begin", first), ("advance", first), ("drop", first)]
    ((epoch, error),) = bench.out
    bench.now_ms += 5
    second = bench.send()
    assert epoch == 1 and error.subject == "actions" and bench.run() == [("begin", second), ("advance", second)]


def test_a_chunk_begun_while_a_new_activation_began_does_not_delay_its_first_one(bench):
    bench.settings = LoopSettings(execution_horizon=100)
    begin = bench.pipeline.begin

    def begin_late(*args, **kwargs):
        bench.pipeline.begin = begin
        bench.loop.open(2)
        return begin(*args, **kwargs)

    bench.pipeline.begin = begin_late
    assert ("drop", bench.send()) in bench.run()
    bench.now_ms += 5
    assert ("begin", bench.send()) in bench.run()

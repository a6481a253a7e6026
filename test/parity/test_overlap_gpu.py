"""Overlap on real streams: the bits of one chunk after the other, whatever runs beside it."""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["eager", "cuda"])
def stages(request):
    import torch

    from pi05_ros.backends import base
    from pi05_ros.config import tiny_config
    from pi05_ros.model.recipe import RecipeSource

    return base.build(request.param, RecipeSource(tiny_config()), torch.device("cuda"), "bfloat16")


@pytest.mark.parametrize(("boundary", "side_by_side"), [("prefix", False), ("prefix", True), ("vision", True)])
def test_chunks_in_overlap_have_the_bits_of_chunks_one_by_one(stages, boundary, side_by_side):
    from pi05_ros.benchmark.pipeline import measure

    for row in measure(stages, 3, 48, (1, 10, 3), 60, 11, boundary, side_by_side):
        assert row.identical, row


@pytest.mark.parametrize("stages", ["cuda"], indirect=True)  # eager's host waits for its device
def test_the_next_front_does_not_wait_for_a_busy_back(stages):
    import torch

    from pi05_ros.benchmark.workload import NOTHING, Workload
    from pi05_ros.runtime.pipelined import Pipeline
    from pi05_ros.runtime.streams import new_stream

    made, workload = [], Workload(stages, 3, 48, seed=1)
    expected = [workload.infer(NOTHING, 3, chunk_index=k).normalised for k in range(2)]
    pipeline = Pipeline(workload, make_stream=lambda *args: made.append(new_stream(*args)) or made[-1])
    with made[1]:
        torch.cuda._sleep(2_000_000_000)  # the back's stream is busy for a second
    first = pipeline.begin(NOTHING, 3, chunk_index=0)
    pipeline.advance(first)
    second = pipeline.begin(NOTHING, 3, chunk_index=1)
    second.front_done.wait()
    assert not first.finished()
    np.testing.assert_array_equal(pipeline.collect(first).normalised, expected[0])
    pipeline.advance(second)
    np.testing.assert_array_equal(pipeline.collect(second).normalised, expected[1])

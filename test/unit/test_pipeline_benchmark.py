"""The measurement of overlap: that it measures, finds differences and draws what it saw."""

import json

import numpy as np
import pytest
from PIL import Image

from pi05_ros.backends import base
from pi05_ros.benchmark import pipeline, timeline
from pi05_ros.benchmark.workload import Workload
from pi05_ros.config import tiny_config
from pi05_ros.model.recipe import RecipeSource
from pi05_ros.runtime.sequential import Sequential


@pytest.fixture(scope="module")
def stages():
    return base.build("eager", RecipeSource(tiny_config(action_horizon=5)))


@pytest.mark.parametrize("boundary", ["prefix", "vision"])
def test_both_ways_are_measured_and_have_the_same_bits(stages, boundary):
    (one, three) = pipeline.measure(stages, 1, 8, (1, 3), 8, seed=5, boundary=boundary, frame=(24, 32))
    assert (one.steps, three.steps) == (1, 3) and one.identical and three.identical
    for row in (one, three):
        assert row.front_ms > 0 and row.back_ms > 0 and row.images_ms > 0
        for flow in (row.sequential, row.pipelined):
            assert 0 < flow.period_ms <= flow.period_p99_ms and 0 < flow.latency_ms <= flow.latency_p99_ms
    assert json.dumps(one.as_data())


def test_figures_follow_from_periods_and_sides():
    flow = pipeline.Flow
    row = pipeline.Row(10, flow(16.0, 17.0, 16.0, 17.0), flow(10.0, 11.0, 18.0, 19.0), 0.3, 8.0, 7.0, True)
    assert row.ideal_ms == 8.0 and row.efficiency == pytest.approx(0.8)
    assert dict(zip(pipeline.COLUMNS, row.cells(), strict=True))["efficiency"] == "80 %"
    assert row.hidden == pytest.approx(6 / 7) and row.latency_ratio == pytest.approx(1.125)


def test_a_chunk_made_from_another_observation_is_found(stages):
    workload = Workload(stages, 1, 8, 5, (24, 32))
    right = pipeline.run_chunks(lambda: Sequential(workload), 1, 8)
    workload._inputs.reverse()
    assert pipeline.same(right, right) and not pipeline.same(right, pipeline.run_chunks(
        lambda: Sequential(workload), 1, 8))


def test_a_failure_ends_the_measurement_with_its_reason(stages):
    class Broken(Workload):
        def infer(self, *args, **kwargs):
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(Exception, match="GPU memory"):
        pipeline.run_chunks(lambda: Sequential(Broken(stages, 1, 8, 5, (24, 32))), 1, 3)


def test_the_timeline_of_a_few_chunks_becomes_a_trace_and_a_picture(stages, tmp_path):
    spans = timeline.last_chunks(pipeline.record(stages, 1, 8, 2, 6, seed=5, frame=(24, 32)), 3)
    assert {span.chunk for span in spans} == {3, 4, 5} and min(span.begin_us for span in spans) == 0
    for chunk in (3, 4, 5):
        mine = {span.stage: span for span in spans if span.chunk == chunk}
        order = ["images", "vision", "prefix", "transform", "expert", "inverse"]
        assert list(sorted(mine, key=lambda stage: mine[stage].begin_us)) == order
        assert mine["vision"].track == "front stream" and mine["expert"].track == "back stream"
    timeline.write_trace(spans, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(spans) == 18
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    timeline.write_picture(spans, tmp_path / "timeline.png", "three chunks")
    drawn = np.asarray(Image.open(tmp_path / "timeline.png").convert("RGB"))
    colours = {tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in timeline.COLOURS.values()}
    seen = {tuple(pixel) for pixel in np.unique(drawn.reshape(-1, 3), axis=0).tolist()}
    assert colours <= seen

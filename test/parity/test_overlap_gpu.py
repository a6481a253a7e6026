"""Overlap on real streams: the bits of one chunk after the other, whatever runs beside it."""

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["eager", "vision=cuda,prefix=cuda", "cuda"])
def stages(request):
    import torch

    from pi05_ros.backends import base
    from pi05_ros.config import tiny_config
    from pi05_ros.model.recipe import RecipeSource

    return base.build(request.param, RecipeSource(tiny_config()), torch.device("cuda"), "bfloat16")


@pytest.mark.parametrize("boundary", ["prefix", "vision"])
def test_chunks_in_overlap_have_the_bits_of_chunks_one_by_one(stages, boundary):
    from pi05_ros.benchmark.pipeline import measure

    for row in measure(stages, 3, 48, (1, 10, 3), 60, seed=11, boundary=boundary):
        assert row.identical, row


def test_front_and_back_run_at_the_same_time(stages):
    from pi05_ros.benchmark.pipeline import record

    spans = [span for span in record(stages, 3, 48, 10, 40, seed=1) if span.track != "host"]
    front = [s for s in spans if s.track == "front stream"]
    back = [s for s in spans if s.track == "back stream"]
    together = [(a, b) for a in front for b in back
                if a.chunk != b.chunk and a.begin_us < b.end_us and b.begin_us < a.end_us]
    assert together  # the order of work, not its speed: some stage ran beside another chunk's denoising

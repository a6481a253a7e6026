"""The pipeline: the bits of the sequential policy, the order of the work, and who waits for whom."""

import numpy as np
import pytest
import torch
from scripted_streams import LoggedStages, ScriptedDevice

from pi05_ros.backends.base import StageSet
from pi05_ros.errors import BackendError, ObservationError, WorkerError
from pi05_ros.runtime import policy as runtime_policy
from pi05_ros.runtime.feature_slots import FeatureSlot
from pi05_ros.runtime.pipelined import Pipeline
from pi05_ros.runtime.policy import Policy
from pi05_ros.runtime.sequential import Sequential
from pi05_ros.schema import CAMERAS, Guidance, Observation


@pytest.fixture(scope="module")
def plain():
    return Policy.load(robot="arm6", seed=3, action_horizon=8)


@pytest.fixture
def device():
    return ScriptedDevice()


@pytest.fixture
def policy(plain, device):
    """The same model behind stages with static memory, which log where they run."""
    logged, stages = LoggedStages(plain.stages.vision, device.log), plain.stages
    return Policy(StageSet(logged, logged, logged, logged, stages.config, stages.device, stages.names),
                  plain.transforms, seed=3)


def observation(number, prompt="pick", cameras=CAMERAS):
    rng = np.random.default_rng(number)
    images = {camera: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for camera in cameras}
    return Observation(images, rng.uniform(-0.1, 0.1, 7).astype(np.float32), prompt, stamp_ns=number)


def guided_by(chunks):
    return Guidance(chunks[-1].normalised[None], delay=2, end=6) if chunks else None


@pytest.mark.parametrize("boundary", ["prefix", "vision"])
@pytest.mark.parametrize("steps", [1, 3])
def test_overlapped_chunks_have_the_bits_of_sequential_ones(plain, policy, boundary, steps):
    pipeline, twin = Pipeline(policy, boundary), Sequential(plain)
    # Other prompts and cameras, so that features differ in size too.
    seen = [observation(0), observation(1, "put the red block into the bowl"), observation(2, cameras=CAMERAS[:2])]
    expected = []
    for n, one in enumerate(seen):
        pending = twin.begin(one, steps, chunk_index=n)
        twin.advance(pending, guided_by(expected))
        expected.append(twin.collect(pending))
    found, running = [], pipeline.begin(seen[0], steps, chunk_index=0)
    for n in range(1, len(seen) + 1):
        following = pipeline.begin(seen[n], steps, chunk_index=n) if n < len(seen) else None
        # After the next one's features overwrote the stages' static memory; the chunk before is known by now.
        pipeline.advance(running, guided_by(found))
        found.append(pipeline.collect(running))
        running = following
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.normalised, other.normalised)
        np.testing.assert_array_equal(one.actions, other.actions)
        assert (one.stamp_ns, one.prompt, one.chunk_index, one.num_steps) == (
            other.stamp_ns, other.prompt, other.chunk_index, steps)
    assert len({chunk.actions.tobytes() for chunk in found}) == 3
    assert [chunk.guidance is None for chunk in found] == [True, False, False]


@pytest.mark.parametrize(("boundary", "front", "back"), [
    ("prefix", ["images", "vision", "prefix"], ["expert"]), ("vision", ["images", "vision"], ["prefix", "expert"])])
def test_the_back_waits_on_the_device_and_the_host_only_for_the_result(policy, device, boundary, front, back):
    pipeline = Pipeline(policy, boundary, device)
    first = pipeline.begin(observation(0), 2, chunk_index=0)
    pipeline.advance(first)
    second = pipeline.begin(observation(1), 2, chunk_index=1)
    issued = [("front", stage) for stage in front]
    wait = ("back", "waits for", "front", first.front_done.number)
    assert device.log == [*issued, wait, *(("back", stage) for stage in back), *issued]
    assert not first.finished()
    device.front.finish()
    assert not first.finished()  # its features are there, its actions are not
    device.back.finish()
    assert first.finished() and not second.finished() and not second.advanced
    assert "host waits" not in {entry[0] for entry in device.log}
    assert pipeline.collect(first).stamp_ns == 0
    assert ("host waits", "back") in device.log


def test_a_third_chunk_has_no_slot_until_one_is_collected_or_dropped(policy):
    pipeline = Pipeline(policy)
    first = pipeline.begin(observation(0), 1, chunk_index=0)
    second = pipeline.begin(observation(1), 1, chunk_index=1)
    with pytest.raises(WorkerError, match="at most 2 chunks"):
        pipeline.begin(observation(2), 1, chunk_index=2)
    pipeline.drop(second)
    third = pipeline.begin(observation(2), 1, chunk_index=2)
    for pending in (first, third):
        pipeline.advance(pending)
        pipeline.collect(pending)
    pipeline.close()


@pytest.mark.parametrize("stage", ["prepare_images", "encode_images", "prefill"])
def test_a_stage_that_fails_leaves_no_slot_taken(policy, stage, monkeypatch):
    pipeline = Pipeline(policy)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(policy.stages.vision, stage, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                pipeline.begin(observation(0), 1, chunk_index=0)
    pending = pipeline.begin(observation(0), 1, chunk_index=0)
    pipeline.advance(pending)
    assert np.isfinite(pipeline.collect(pending).actions).all()


def test_actions_that_are_not_finite_are_refused_and_their_slot_is_free_again(policy):
    pipeline, noise = Pipeline(policy), np.full((8, 32), np.nan, np.float32)
    for n in range(3):
        pending = pipeline.begin(observation(0), 1, chunk_index=n, noise=noise)
        pipeline.advance(pending)
        with pytest.raises(ObservationError, match="finite"):
            pipeline.collect(pending)


def test_a_bad_observation_takes_no_slot(policy):
    pipeline = Pipeline(policy)
    for n in range(3):
        with pytest.raises(ObservationError):
            pipeline.begin(observation(0, cameras=()), 1, chunk_index=n)
        with pytest.raises(ObservationError, match="half a surrogate|UTF-8"):
            pipeline.begin(observation(0, prompt="\ud800"), 1, chunk_index=n)


def test_tokens_and_noise_are_made_when_the_frames_are_under_way(policy, device, monkeypatch):
    for where, name in ((policy.transforms, "encode"), (runtime_policy, "draw_noise")):
        made = getattr(where, name)

        def logged(*args, name=name, made=made):
            device.log.append(("host", name))
            return made(*args)

        monkeypatch.setattr(where, name, logged)
    policy.infer(observation(0), 1)
    assert [step for _, step in device.log] == ["images", "vision", "encode", "prefix", "draw_noise", "expert"]


def test_stage_times_tell_how_long_the_features_waited(policy):
    pipeline = Pipeline(policy)
    pending = pipeline.begin(observation(0), 1, chunk_index=0)
    pipeline.advance(pending)
    times = pipeline.collect(pending).stage_times_ms
    assert set(times) == {"transform", "images", "vision", "prefix", "waiting", "expert", "inverse", "total"}
    assert times["total"] >= times["prefix"] + times["expert"]


def test_a_backend_that_shares_buffers_between_its_stages_is_refused(policy):
    policy.stages.vision.overlaps = False
    with pytest.raises(BackendError, match="overlap to false"):
        Pipeline(policy)


def test_backends_of_their_own_on_both_sides_share_nothing(plain, device):
    sharing = [LoggedStages(plain.stages.vision, device.log) for _ in range(2)]
    for stages in sharing:
        stages.overlaps = False
    s = plain.stages
    chosen = StageSet(sharing[0], sharing[0], sharing[0], sharing[1], s.config, s.device, s.names)
    Pipeline(Policy(chosen, plain.transforms))


def test_a_slot_keeps_its_memory_and_grows_only_for_more(policy):
    slot = FeatureSlot()
    long, short = slot.keep(torch.ones(6, 4)), slot.keep(torch.full((2, 4), 2.0))
    assert short.data_ptr() == long.data_ptr() and short.tolist() == [[2.0] * 4] * 2
    assert slot.keep(torch.ones(7, 4)).shape == (7, 4)

import numpy as np
import pytest

from pi05_ros.errors import ConfigError
from pi05_ros.schema import ModelInputs
from pi05_ros.transforms.collate import collate

FRAME = np.full((1, 2, 3, 3), 7, np.uint8)


def inputs(*frames, value=0, slots=4):
    return ModelInputs(frames=frames, image_mask=np.array([[frame is not None for frame in frames]]),
                       tokens=np.full((1, slots), value), token_mask=np.ones((1, slots), bool),
                       state=np.full((1, 32), value, np.float32))


def test_collate_stacks_and_fills_in_absent_cameras():
    batch = collate([inputs(FRAME, FRAME, None), inputs(FRAME + 1, None, None, value=1)])
    assert batch.image_mask.tolist() == [[True, True, False], [True, False, False]]
    base, wrist, absent = batch.frames
    assert base is not None and base.shape == (2, 2, 3, 3) and (base[1] == 8).all()
    assert wrist is not None and (wrist[0] == 7).all() and (wrist[1] == 0).all() and absent is None
    assert batch.tokens.tolist() == [4 * [0], 4 * [1]] and batch.token_mask.all()
    assert batch.state.shape == (2, 32) and (batch.state[1] == 1).all()


def test_collate_takes_batches_too():
    pair = collate([inputs(FRAME, None), inputs(FRAME, None)])
    batch = collate([pair, inputs(FRAME, FRAME)])
    assert batch.image_mask.tolist() == [[True, False], [True, False], [True, True]]
    assert [frame is not None and frame.shape for frame in batch.frames] == 2 * [(3, 2, 3, 3)]


def test_collate_refuses_frames_of_different_size():
    with pytest.raises(ConfigError, match="camera 1.*one size"):
        collate([inputs(FRAME, FRAME), inputs(FRAME, FRAME[:, :1])])


def test_collate_refuses_nothing_and_what_does_not_match():
    with pytest.raises(ConfigError, match="at least one"):
        collate([])
    with pytest.raises(ConfigError, match="prompt slots"):
        collate([inputs(FRAME), inputs(FRAME, slots=5)])
    with pytest.raises(ConfigError, match="cameras"):
        collate([inputs(FRAME), inputs(FRAME, FRAME)])

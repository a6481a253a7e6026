"""Stage 0 on the GPU against the reference: `pil` bit for bit, `bilinear` to float32's rounding."""

import threading

import numpy as np
import pytest
import torch

from pi05_ros.backends import base
from pi05_ros.config import tiny_config
from pi05_ros.errors import BackendError, ConfigError, ObservationError
from pi05_ros.model import images
from pi05_ros.model.pinned import is_pinned, pinned_copy, pinned_memory
from pi05_ros.model.recipe import RecipeSource

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
RNG = np.random.default_rng()  # fresh in every run; a failure shows the sizes
EDGES = [(480, 640), (640, 480), (224, 224), (223, 225), (225, 224), (1, 1), (1, 200), (200, 1), (2, 3), (720, 1280),
         (1000, 225), (1080, 1920), None]


def preparation(resize="pil", size=224):
    from pi05_ros.backends.cuda.frames import FramePreparation

    return FramePreparation(torch.full((3, 3, size, size), torch.nan, device=DEVICE), resize)


def frame_of(size):
    return None if size is None else RNG.integers(0, 256, (1, *size, 3), np.uint8)


def check(ours, frames, resize, size=224):
    expected = images.prepare(frames, size, resize, DEVICE)
    shapes = [None if frame is None else frame.shape for frame in frames]
    if resize == "pil":
        assert torch.equal(ours, expected), shapes
    else:
        torch.testing.assert_close(ours, expected, rtol=0, atol=5e-7, msg=lambda text: f"{shapes}: {text}")


def random_size():
    height = RNG.integers(1, 900)
    return int(height), int(RNG.integers(max(1, height // 3), 3 * height + 1))


@pytest.mark.parametrize("resize", ["pil", "bilinear"])
def test_any_sizes_and_missing_cameras_equal_the_reference(resize):
    prepare = preparation(resize).prepare
    singles = [[size] for size in EDGES]
    sets = [[random_size() for _ in range(3)] for _ in range(40)]  # more sets than are kept
    mixed = [[random_size(), None, EDGES[i]] for i in range(len(EDGES))] + [[None, None, None]]
    for sizes in [*singles, *sets, *mixed, *singles]:
        frames = [frame_of(size) for size in sizes]
        check(prepare(frames), frames, resize)


@pytest.mark.parametrize("size", [28, 225])
def test_other_image_sizes(size):
    frames = [frame_of(s) for s in ((480, 640), (size, size), None)]
    check(preparation(size=size).prepare(frames), frames, "pil", size)


def test_steady_frames_allocate_nothing():
    prepare = preparation().prepare
    frames = [frame_of((480, 640)) for _ in range(3)]
    prepare(frames)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(5):
        prepare(frames)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


def test_turned_views_and_read_only_frames_equal_their_copies():
    whole = frame_of((480, 640))
    fixed = whole.copy()
    fixed.flags.writeable = False
    frames = [whole[:, ::-1, ::-1], whole[:, 3:-2, 1:-4], fixed]
    check(preparation().prepare(frames), frames, "pil")


def test_calls_behind_a_busy_stream_keep_their_frames():
    """In a thread with a stream of its own, and then on another: nothing may be overwritten before it is read."""
    ours, busy = preparation(), torch.randn(4096, 4096, device=DEVICE)
    sets = [[frame_of((480, 640)), frame_of(random_size())] for _ in range(6)]
    results = []
    torch.cuda.synchronize()

    def work(half):
        with torch.cuda.stream(torch.cuda.Stream()):
            for frames in half:
                for _ in range(10):
                    busy @ busy
                results.append(ours.prepare(frames).clone())

    for half in (sets[:3], sets[3:]):
        thread = threading.Thread(target=work, args=(half,))
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    for result, frames in zip(results, sets, strict=True):
        check(result, frames, "pil")


def test_frames_in_pinned_memory_go_up_from_there_and_are_kept_until_they_are_read():
    ours, busy = preparation(), torch.randn(4096, 4096, device=DEVICE)
    frames = [frame_of((480, 640)), frame_of(random_size()), frame_of((225, 224))]
    there = [pinned_copy(frame) for frame in frames]
    ours.prepare(frames)
    ours._staging.fill_(0)  # what still went through it would be black
    for _ in range(10):
        busy @ busy
    result = ours.prepare([there[0], frames[1], there[2]])
    assert not ours._staging[:frames[0].size].any() and not ours._staging[-frames[2].size:].any()
    del there  # the memory is free for the next who asks, unless it is kept
    for frame in frames:
        for _ in range(3):
            pinned_copy(np.zeros(frame.size, np.uint8))
    check(result, frames, "pil")


def test_a_frame_anywhere_in_pinned_memory_is_read_where_it_is():
    """As a message is received: its header in front, the pixels aligned or not."""
    ours, frame = preparation(), frame_of((480, 640))
    for begin in (61, 64):
        memory = pinned_memory(frame.size + 100)
        there = memory[begin:begin + frame.size].reshape(frame.shape)
        np.copyto(there, frame)
        assert is_pinned(there)
        check(ours.prepare([there]), [frame], "pil")


def test_refuses_what_the_transform_refuses_and_batches():
    prepare = preparation().prepare
    for frame in (np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4, 1), np.uint8), np.zeros((1, 4, 4, 3), np.float32)):
        with pytest.raises(ObservationError, match="expected uint8"):
            prepare([frame])
    with pytest.raises(ObservationError, match="1000x1"):
        prepare([np.zeros((1, 1, 1000, 3), np.uint8)])
    with pytest.raises(BackendError, match="batch of frames"):
        prepare([np.zeros((2, 4, 4, 3), np.uint8)])
    for count in (0, 4):
        with pytest.raises(BackendError, match="cameras"):
            prepare([None] * count)
    with pytest.raises(ConfigError, match="'pil' or 'bilinear'"):
        preparation("cubic")
    frames = [frame_of((30, 40))]
    check(prepare(frames), frames, "pil")


def test_the_vision_stage_reads_the_images_where_they_are():
    stages = base.build("images=cuda,vision=cuda", RecipeSource(tiny_config()), DEVICE, "bfloat16")
    frames = [frame_of((480, 640)), frame_of((100, 60))]
    pixels = stages.images.prepare_images(frames)
    tokens = stages.vision.encode_images(pixels).clone()
    other = images.prepare(frames, 224, "pil", DEVICE)
    stages.vision.encode_images(1 - other)
    assert not torch.equal(pixels, other)  # the buffer was given other images
    assert torch.equal(stages.vision.encode_images(other), tokens)

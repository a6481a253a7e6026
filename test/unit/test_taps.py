"""The tap tables of the GPU's resize against Pillow and PyTorch, applied here in numpy."""

import numpy as np
import pytest
import torch
from PIL import Image

from pi05_ros.backends.cuda.taps import PRECISION_BITS, axis_taps
from pi05_ros.model.images import bilinear
from pi05_ros.transforms.images import letterbox, resize_with_pad

CAMERAS = [(480, 640), (640, 480), (720, 1280), (1080, 1920), (256, 256), (224, 224), (223, 225), (225, 224),
           (224, 100), (1, 1), (1, 200), (200, 1), (2, 3), (1, 223), (224, 1), (97, 31), (31, 97),
           (1000, 225), (225, 1000)]
RNG = np.random.default_rng(7)
FRAMES = CAMERAS + [(int(h), int(w)) for h, w in RNG.integers(20, 700, (40, 2))]


def apply(pixels, axis, length, resize):
    """One pass, rounded to whole grey levels where the weights are integers."""
    pixels = np.moveaxis(pixels, axis, 0)
    taps = axis_taps(len(pixels), length, resize)
    sources = np.minimum(taps.first + np.arange(len(taps.weights))[:, None], len(pixels) - 1)
    total = sum(pixels[source] * weights[:, None, None] for source, weights in zip(sources, taps.weights, strict=True))
    if resize == "pil":
        total = total + (1 << PRECISION_BITS - 1) >> PRECISION_BITS
    return np.moveaxis(total, 0, axis)


def letterboxed(frame, size, resize):
    box = letterbox(*frame.shape[:2], size)
    out = np.zeros((size, size, 3), frame.dtype)
    out[box.top:box.top + box.height, box.left:box.left + box.width] = apply(
        apply(frame, 1, box.width, resize), 0, box.height, resize)
    return out


def frame_of(height, width):
    """Noise, or black and white only: what reaches the ends of the range."""
    noise = RNG.integers(0, 256, (height, width, 3), np.uint8)
    return noise if RNG.random() < 0.7 else np.where(noise < 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("extent, length", [(640, 224), (1, 224), (2, 1), (223, 224), (225, 224), (500, 1), (3, 3),
                                            (1920, 224), (7, 100), (999, 127)])
def test_one_pass_is_pillows(extent, length):
    for axis, shape in enumerate([(extent, 5), (5, extent)]):
        frame = frame_of(*shape)
        to = (5, length) if axis == 0 else (length, 5)
        expected = np.asarray(Image.fromarray(frame).resize(to, Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(apply(frame.astype(np.int64), axis, length, "pil"), expected)


@pytest.mark.parametrize("height, width", FRAMES)
def test_two_passes_are_openpis_resize(height, width):
    frame = frame_of(height, width)
    np.testing.assert_array_equal(letterboxed(frame.astype(np.int64), 224, "pil"), resize_with_pad(frame, 224))


@pytest.mark.parametrize("height, width", FRAMES)
def test_two_nearest_pixels_are_lerobots_resize(height, width):
    frame = frame_of(height, width)
    ours = letterboxed(frame.astype(np.float32) / np.float32(255), 224, "bilinear").transpose(2, 0, 1) * 2 - 1
    theirs = bilinear(frame[None], 224, torch.device("cpu"))[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-7)


@pytest.mark.parametrize("resize", ["pil", "bilinear"])
@pytest.mark.parametrize("extent", [1, 100, 224, 225, 640, 4000])
def test_weights_add_up_to_one_and_stay_in_the_frame(extent, resize):
    taps = axis_taps(extent, 224, resize)
    one = 2**PRECISION_BITS if resize == "pil" else 1
    assert abs(taps.weights.astype(np.float64).sum(axis=0) / one - 1).max() < 1e-5
    assert taps.first.min() >= 0 and taps.first.max() < extent and taps.weights.min() >= 0

"""PI05_SPEC section 8: PIL for openpi, torch's bilinear without antialias for lerobot."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.model.images import bilinear, prepare
from pi05_ros.transforms.images import Letterbox, check_frame, letterbox, resize_with_pad

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texture():
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)


@pytest.mark.parametrize("height, width, expected", [
    (480, 640, Letterbox(168, 224, 28, 0)),  # 28 rows above and below
    (640, 480, Letterbox(224, 168, 0, 28)),
    (256, 256, Letterbox(224, 224, 0, 0)),
    (720, 1280, Letterbox(126, 224, 49, 0)),
    (100, 199, Letterbox(112, 224, 56, 0)),  # 112.56 is cut, not rounded
    (99, 200, Letterbox(110, 224, 57, 0)),  # 110.88
    (225, 1000, Letterbox(50, 224, 87, 0)),
    (1, 3, Letterbox(74, 224, 75, 0)),  # 150 rows of padding, 75 each
    (31, 56, Letterbox(124, 224, 50, 0)),
])
def test_letterbox_keeps_the_aspect_ratio_and_centres(height, width, expected):
    assert letterbox(height, width, 224) == expected


def test_the_odd_row_of_padding_goes_below():
    box = letterbox(50, 100, 225)
    assert box == Letterbox(112, 225, 56, 0) and 225 - box.height - box.top == 57


def test_an_aspect_ratio_that_leaves_no_pixel_is_refused():
    with pytest.raises(ObservationError, match="1000x1"):
        letterbox(1, 1000, 224)


def test_640x480_gets_black_bars_above_and_below(texture):
    out = resize_with_pad(texture, 224)
    assert out.shape == (224, 224, 3) and out.dtype == np.uint8
    assert not out[:28].any() and not out[196:].any() and out[28].any() and out[195].any()


def test_a_frame_of_the_right_size_passes_unchanged():
    frame = np.zeros((224, 224, 3), np.uint8)
    assert resize_with_pad(frame, 224) is frame


def test_pil_agrees_with_torch_antialiased_to_a_grey_level_and_not_without(texture):
    ours = resize_with_pad(texture, 224)[28:196].astype(np.float64)
    pixels = torch.from_numpy(texture).permute(2, 0, 1)[None].float()

    def difference(antialias):
        theirs = F.interpolate(pixels, (168, 224), mode="bilinear", align_corners=False, antialias=antialias)
        return np.abs(ours - theirs[0].permute(1, 2, 0).numpy())

    assert difference(True).mean() < 0.35 and difference(True).max() < 1.6
    assert difference(False).mean() > 3.0


def test_a_turned_view_is_resized_like_its_copy(texture):
    turned = texture[::-1, ::-1]
    assert (resize_with_pad(turned, 224) == resize_with_pad(turned.copy(), 224)).all()


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8),
                                   np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_rejects_a_frame_that_is_not_uint8_rgb(frame):
    with pytest.raises(ObservationError, match="image 'base_0_rgb'"):
        check_frame("base_0_rgb", frame)


def grey(rows):
    """[[...]] to uint8 [1, h, w, 3]."""
    return np.repeat(np.array(rows, np.uint8)[None, :, :, None], 3, axis=3)


def test_bilinear_interpolates_between_pixel_centres_and_pads_with_minus_one():
    # 1x2 to 2x4 within 4x4: samples at -0.25, 0.25, 0.75, 1.25 of the source row, on [0, 1], then * 2 - 1
    out = bilinear(grey([[0, 255]]), 4, CPU)
    assert out.shape == (1, 3, 4, 4) and out.dtype == torch.float32
    row = [-1.0, -0.5, 0.5, 1.0]
    for channel in out[0]:
        np.testing.assert_allclose(channel, [4 * [-1.0], row, row, 4 * [-1.0]], atol=1e-6)


def test_bilinear_does_not_antialias():
    # 6 to 2 pixels: samples at source positions 1 and 4 exactly; an antialiased filter would mix their neighbours in
    out = bilinear(grey([[0, 255, 0, 0, 51, 0]] * 6), 2, CPU)
    np.testing.assert_allclose(out[0, 0], [[1.0, -0.6]] * 2, atol=1e-6)


def test_bilinear_leaves_a_frame_of_the_right_size():
    out = bilinear(grey([[0, 255], [51, 102]]), 2, CPU)
    np.testing.assert_allclose(out[0, 0], [[-1.0, 1.0], [-0.6, -0.2]], atol=1e-6)


def test_a_missing_camera_is_minus_one_beside_a_present_one():
    out = prepare([grey([[255, 255], [255, 255]]), None], 2, "pil", CPU)
    assert out.shape == (1, 2, 3, 2, 2)
    assert (out[:, 0] == 1).all() and (out[:, 1] == -1).all()


@pytest.mark.parametrize("resize", ["pil", "bilinear"])
def test_a_turned_view_is_prepared_like_its_copy(texture, resize):
    turned = texture[::-1, ::-1][None]
    assert torch.equal(prepare([turned], 224, resize, CPU), prepare([turned.copy()], 224, resize, CPU))


@pytest.mark.parametrize("resize", ["pil", "bilinear"])
def test_a_batch_is_prepared_frame_by_frame(texture, resize):
    frames = np.stack([texture, 255 - texture])
    alone = [prepare([frame[None]], 224, resize, CPU) for frame in frames]
    assert torch.equal(prepare([frames], 224, resize, CPU), torch.cat(alone))


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match="'pil' or 'bilinear'"):
        prepare([None], 224, "cubic", CPU)

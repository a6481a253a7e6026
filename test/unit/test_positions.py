"""Position ids and masks on their own (PI05_SPEC section 3), with four patches a camera to keep rows readable."""

import torch

from pi05_ros.model import positions


def pad_mask(cameras, tokens):
    cameras, tokens = (torch.tensor([mask], dtype=torch.bool) for mask in (cameras, tokens))
    return positions.prefix_pad_mask(cameras, tokens, 4)


def test_a_full_prefix_counts_from_zero():
    assert positions.prefix_positions(pad_mask([1, 1], [1, 1, 1])).tolist() == [list(range(11))]


def test_a_short_prompt_ends_where_its_tokens_end():
    mask = pad_mask([1], [1, 1])
    assert positions.prefix_positions(mask).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert positions.suffix_positions(mask, 3).tolist() == [[6, 7, 8]]


def test_padding_repeats_the_last_position_and_the_suffix_follows_the_last_valid_token():
    mask = pad_mask([1], [1, 1, 0, 0])
    assert positions.prefix_positions(mask).tolist() == [[0, 1, 2, 3, 4, 5, 5, 5]]
    assert positions.suffix_positions(mask, 3).tolist() == [[6, 7, 8]]


def test_a_masked_camera_does_not_advance_the_count():
    mask = pad_mask([1, 0], [1, 1])
    assert positions.prefix_positions(mask).tolist() == [[0, 1, 2, 3, 3, 3, 3, 3, 4, 5]]
    assert positions.suffix_positions(mask, 2).tolist() == [[6, 7]]


def test_a_masked_first_camera_stands_at_minus_one():
    assert positions.prefix_positions(pad_mask([0, 1], [1]))[0, :5].tolist() == [-1, -1, -1, -1, 0]


def test_prefix_tokens_see_exactly_the_valid_ones():
    visible = positions.prefix_attention_mask(pad_mask([1], [1, 0]))[0, 0] == 0
    assert visible[0].tolist() == [True] * 5 + [False]
    assert not visible[5].any()


def test_pi05_actions_see_all_actions_and_every_valid_prefix_token():
    flags = torch.tensor([1, 0, 0])
    visible = positions.suffix_attention_mask(pad_mask([1], [1, 0]), flags)[0, 0] == 0
    assert visible.tolist() == [[True] * 5 + [False] + [True] * 3] * 3


def test_the_pi0_state_token_does_not_see_the_actions():
    flags = torch.tensor([1, 1, 0])
    among = (positions.suffix_attention_mask(pad_mask([1], [1]), flags)[0, 0] == 0)[:, 5:]
    assert among.tolist() == [[True, False, False], [True, True, True], [True, True, True]]


def test_masked_logits_stay_finite_in_bfloat16():
    mask = positions.prefix_attention_mask(pad_mask([0], [1]))
    assert torch.isfinite((mask + 10.0).bfloat16()).all()


def test_rounded_rope_frequencies_drift_by_more_than_a_radian_at_position_768():
    """Trap T1: the switch must really do something."""
    exact = positions.rope_tables(torch.tensor([[768]]), 256, torch.float32, torch.float64)
    rounded = positions.rope_tables(torch.tensor([[768]]), 256, torch.bfloat16, torch.float64)
    angle = [torch.atan2(sin, cos) for cos, sin in (exact, rounded)]
    drift = torch.remainder(angle[0] - angle[1] + torch.pi, 2 * torch.pi) - torch.pi
    assert 1.0 < drift.abs().max() < 1.1


def test_rope_turns_pair_i_with_pair_i_plus_half():
    rope = positions.rope_tables(torch.tensor([[1]]), 4, torch.float32, torch.float32)
    turned = positions.rotate(torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]), rope)[0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor([torch.cos(torch.tensor(1.0)), 0, torch.sin(torch.tensor(1.0)), 0]))

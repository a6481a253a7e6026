import io

import numpy as np
import pytest
import sentencepiece

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.transforms.prompt import PromptTokenizer, prompt_parts, state_bins
from pi05_ros.transforms.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

STATE = np.array([-1.0, 0.0, 0.99, -1.01])


@pytest.fixture(scope="module")
def tokenizer():
    return PromptTokenizer(tiny_tokenizer(), 48)


def pieces(tokenizer, ids):
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    return [model.id_to_piece(int(i)) for i in ids]


def decoded(tokens):
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    return model.decode([int(i) for i in tokens.ids[tokens.mask][1:]])


@pytest.mark.parametrize("value, expected", [
    (-1.0, 0), (0.0, 128), (0.99, 254), (0.9921874, 254), (0.9921875, 255), (1.0, 255), (7.0, 255),
    (-1.0000001, -1), (-50.0, -1), (-0.9921875, 1), (-0.9921876, 0),
])
def test_state_bins_at_their_edges(value, expected):
    assert state_bins(np.array([value])) == [expected]


def test_rejects_a_nan_state_in_the_prompt(tokenizer):
    with pytest.raises(ObservationError, match="NaN"):
        tokenizer.tokenize("pick", np.array([0.0, np.nan]), "pi05")


def test_pi05_puts_the_state_into_the_template():
    assert prompt_parts(" pick_up\nthe Block ", STATE, "pi05") == (
        "Task: pick up the Block, State: 0 128 254 -1;\nAction: ",)


def test_lerobot_0_4_pads_the_state_to_32_first():
    (text,) = prompt_parts("pick", STATE, "pi05_padded_state")
    assert text == "Task: pick, State: 0 128 254 -1" + 28 * " 128" + ";\nAction: "


def test_pi0_appends_the_newline_as_a_part_of_its_own():
    assert prompt_parts("pick_up\nit ", STATE, "pi0") == ("pick up it", "\n")


def test_lerobot_pi0_joins_one_newline_and_cleans_nothing():
    assert prompt_parts(" pick_up it", STATE, "pi0_joined") == (" pick_up it\n",)
    assert prompt_parts("pick_up it\n", STATE, "pi0_joined") == ("pick_up it\n",)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="pi07"):
        prompt_parts("pick", STATE, "pi07")  # type: ignore[arg-type]


def test_tokens_begin_with_bos_and_are_padded_on_the_right(tokenizer):
    tokens = tokenizer.tokenize("pick up the red block", STATE, "pi05")
    used = int(tokens.mask.sum())
    assert tokens.ids.dtype == np.int64 and tokens.ids.shape == tokens.mask.shape == (48,)
    assert tokens.ids[0] == 2 and tokens.mask[:used].all() and not tokens.mask[used:].any()
    assert (tokens.ids[used:] == 0).all() and (tokens.ids[:used] != 0).all() and tokens.dropped == 0
    assert decoded(tokens) == "Task: pick up the red block, State: 0 128 254 -1;\nAction: "


def test_the_pi0_newline_is_the_last_token(tokenizer):
    tokens = tokenizer.tokenize("pick up the red block", STATE, "pi0")
    assert pieces(tokenizer, tokens.ids[tokens.mask])[-1] == "\n"
    assert decoded(tokens) == "pick up the red block\n"


def test_truncation_keeps_the_head_and_counts_what_is_lost(tokenizer):
    whole = PromptTokenizer(tiny_tokenizer(), None).tokenize("pick up the red block", STATE, "pi05")
    cut = PromptTokenizer(tiny_tokenizer(), 6).tokenize("pick up the red block", STATE, "pi05")
    assert whole.dropped == 0 and whole.mask.all()
    assert (cut.ids == whole.ids[:6]).all() and cut.mask.all() and cut.dropped == len(whole.ids) - 6


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ObservationError, match=r"'\\ud800' at character 3"):
        tokenizer.tokenize("go \ud800", np.zeros(2), "pi05")


def test_a_prompt_that_fits_exactly_loses_nothing(tokenizer):
    length = len(PromptTokenizer(tiny_tokenizer(), None).tokenize("pick", STATE, "pi05").ids)
    tokens = PromptTokenizer(tiny_tokenizer(), length).tokenize("pick", STATE, "pi05")
    assert tokens.dropped == 0 and tokens.mask.all()


def test_a_path_works_like_bytes(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_tokenizer())
    again = PromptTokenizer(path, 48).tokenize("pick", STATE, "pi05")
    assert (again.ids == tokenizer.tokenize("pick", STATE, "pi05").ids).all()


def test_a_hugging_face_tokenizer_json_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="tokenizer.model") as error:
        PromptTokenizer(path)
    assert "Hugging Face" in error.value.received and str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a model" * 20])
def test_bytes_that_are_no_model_are_refused(content):
    with pytest.raises(ConfigError, match="a SentencePiece model"):
        PromptTokenizer(content)


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        PromptTokenizer(tmp_path / "none.model")


def test_max_token_len_below_one_is_refused():
    with pytest.raises(ConfigError, match="max_token_len"):
        PromptTokenizer(tiny_tokenizer(), 0)


def test_a_model_with_other_bos_and_padding_ids_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["pick up the red block"] * 5), model_writer=model,
                                             vocab_size=20, model_type="char", hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(ConfigError, match="BOS id 2 and padding id 0, received 1 and -1"):
        PromptTokenizer(model.getvalue())


# ---------------------------------------------------------------- the tiny tokenizer


def test_the_tiny_tokenizer_is_the_same_every_time():
    again = tiny_tokenizer.__wrapped__()
    assert again == tiny_tokenizer() and PromptTokenizer(again).vocab_size == VOCAB_SIZE


def test_the_tiny_tokenizer_is_silent(capfd):
    tiny_tokenizer.__wrapped__()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["Zürich, 東京\n\n  x", "-12 300 255", ";\nAction: ", "<s></s>"])
def test_the_tiny_tokenizer_loses_no_text(text):
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    assert model.decode(model.encode(text)) == text


def test_every_state_number_takes_at_most_two_tokens():
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    assert max(len(model.encode(f" {number}")) for number in range(-1, 256)) == 2


def test_prompts_with_14_state_numbers_fit_into_the_tiny_model(tokenizer):
    widest = np.full(14, 0.9)  # 243: two tokens each
    assert tokenizer.tokenize("put the towel into the basket and close it", widest, "pi05").dropped == 0

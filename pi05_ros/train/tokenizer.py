"""A SentencePiece model of the task's own words, with one piece for each number of the discretised state."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable

import numpy as np
import sentencepiece

from pi05_ros.errors import ConfigError
from pi05_ros.transforms.prompt import BOS_ID, PAD_ID, STATE_BIN_EDGES, clean

VOCAB_SIZE = 1024
_SPACE = "\u2581"  # what SentencePiece writes for a space
STATE_PIECES = tuple(f"{_SPACE}{number}" for number in range(-1, len(STATE_BIN_EDGES)))
_TEMPLATE = ("\n", "Task:", f",{_SPACE}State:", f";\nAction:{_SPACE}")


def train_tokenizer(prompts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """The same bytes for the same prompts: BPE with byte fallback; pad 0, eos 1, bos 2, unk 3.

    A state number is always one token, so that the k-th number stands at the same place in every prompt of one
    instruction. `vocab_size` is the most: few words need fewer pieces.

    Raises:
        ConfigError: no prompts, or a vocabulary too small for bytes, states and letters.
    """
    lines = [f"Task: {text}" for text, _ in sorted(Counter(map(clean, prompts)).items()) if text]
    if not lines:
        raise ConfigError("prompts of the tokenizer", expected="at least one", received="none",
                          way_out="Record episodes with prompts.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, pad_id=PAD_ID, eos_id=1, bos_id=BOS_ID, unk_id=3,
            user_defined_symbols=[*_TEMPLATE, *STATE_PIECES], normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ConfigError("vocabulary of the tokenizer", expected="room for bytes, states and letters",
                          received=f"{vocab_size} pieces: {error}", way_out=f"Take {VOCAB_SIZE}.") from error
    return model.getvalue()


def state_token_ids(model: bytes) -> np.ndarray:
    """int64 [257]: the ids of the state numbers -1 to 255 in a model of `train_tokenizer`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return np.array([processor.piece_to_id(piece) for piece in STATE_PIECES], np.int64)

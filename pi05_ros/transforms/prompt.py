"""The instruction, and for pi0.5 the state, as PaliGemma tokens (PI05_SPEC section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from pi05_ros.errors import ConfigError, ObservationError
from pi05_ros.schema import ACTION_DIM, PromptFormat

BOS_ID, PAD_ID = 2, 0
STATE_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


@dataclass(frozen=True)
class PromptTokens:
    """ids int64 [L], mask bool [L] (False: padding, on the right), dropped: how many tokens did not fit."""

    ids: np.ndarray
    mask: np.ndarray
    dropped: int


class PromptTokenizer:
    """A SentencePiece model, BOS in front, padded or cut to `max_token_len` slots.

    Args:
        model: path of the `.model` file, or its bytes.
        max_token_len: prompt slots of the model: 200 for pi0.5, 48 for pi0; None neither pads nor cuts.

    Raises:
        ConfigError: not a SentencePiece model, or one with other BOS or padding ids.
    """

    def __init__(self, model: str | Path | bytes, max_token_len: int | None = 200) -> None:
        name = "tokenizer" if isinstance(model, bytes) else f"tokenizer '{model}'"
        if max_token_len is not None and max_token_len < 1:
            raise ConfigError("max_token_len", expected="at least 1", received=str(max_token_len),
                              way_out="200 for pi0.5, 48 for pi0.")
        self.max_token_len = max_token_len
        self._sentencepiece = _load(name, model)
        self.vocab_size: int = self._sentencepiece.vocab_size()
        ids = (self._sentencepiece.bos_id(), self._sentencepiece.pad_id())
        if ids != (BOS_ID, PAD_ID):
            raise ConfigError(name, expected=f"BOS id {BOS_ID} and padding id {PAD_ID}",
                              received=f"{ids[0]} and {ids[1]}",
                              way_out="Use PaliGemma's tokenizer (paligemma_tokenizer.model).")

    def tokenize(self, prompt: str, state: np.ndarray, prompt_format: PromptFormat) -> PromptTokens:
        """Tokens of an instruction and the normalised, unpadded state [d]. What does not fit is cut off at the end
        and counted in `dropped`.

        Raises:
            ObservationError: NaN or infinity in the state; half a surrogate pair in the prompt.
            ConfigError: unknown format.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ObservationError("prompt", expected="text that UTF-8 can express", cause="prompt",
                                   received=f"{error.object[error.start]!a} at character {error.start}",
                                   way_out="Correct what writes the prompt.") from error
        ids = [BOS_ID]
        for part in prompt_parts(prompt, state, prompt_format):
            ids += self._sentencepiece.encode(part)
        length = self.max_token_len or len(ids)
        kept = ids[:length]
        return PromptTokens(ids=np.array(kept + [PAD_ID] * (length - len(kept)), np.int64),
                            mask=np.arange(length) < len(kept), dropped=len(ids) - len(kept))


def prompt_parts(prompt: str, state: np.ndarray, prompt_format: PromptFormat) -> tuple[str, ...]:
    """The texts that are tokenised one by one and joined.

    `pi05` is openpi's pi0.5 and lerobot's from 0.5 on; `pi05_padded_state` lerobot's 0.4, which pads the state to 32
    first; `pi0` openpi's pi0 and pi05_libero; `pi0_joined` lerobot's pi0, which cleans nothing.
    """
    if prompt_format == "pi05_padded_state":
        state = np.pad(state, (0, ACTION_DIM - len(state)))
    if prompt_format in ("pi05", "pi05_padded_state"):
        numbers = " ".join(map(str, state_bins(state)))
        return (f"Task: {clean(prompt)}, State: {numbers};\nAction: ",)
    if prompt_format == "pi0":
        return clean(prompt), "\n"
    if prompt_format == "pi0_joined":
        return (prompt if prompt.endswith("\n") else prompt + "\n",)
    raise ConfigError("prompt_format", expected="pi05, pi05_padded_state, pi0 or pi0_joined",
                      received=repr(prompt_format), way_out="Correct the robot file or the checkpoint's conventions.")


def clean(prompt: str) -> str:
    """Outer whitespace away, underscores and newlines to spaces; the case stays."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: np.ndarray) -> np.ndarray:
    """Normalised state [d] to bins of width 1/128: -1 is 0, 0 is 128, from 0.9921875 on 255, and below -1 it is -1."""
    if not np.isfinite(state).all():
        raise ObservationError("state in the prompt", expected="finite numbers", received="NaN or infinity",
                               way_out="Check the robot's joint states.", cause="non-finite state")
    return np.digitize(state, STATE_BIN_EDGES) - 1


def _load(name: str, model: str | Path | bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
    except OSError as error:
        raise ConfigError(name, expected="a readable SentencePiece model", received=str(error.strerror or error),
                          way_out="Give the path of paligemma_tokenizer.model.") from error
    if content.lstrip()[:1] == b"{":
        raise ConfigError(name, expected="a SentencePiece .model file", received="JSON (a Hugging Face tokenizer.json)",
                          way_out="Take tokenizer.model of google/paligemma-3b-pt-224, or openpi's "
                                  "paligemma_tokenizer.model.")
    try:
        if not content:
            raise RuntimeError("an empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ConfigError(name, expected="a SentencePiece model", received="an empty file" if not content else
                          f"{len(content)} bytes of something else",
                          way_out="Give the path of paligemma_tokenizer.model.") from error

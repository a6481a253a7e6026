"""The tokenizer of the embedded tiny model: trained in memory, since PaliGemma's cannot be shipped."""

from __future__ import annotations

import io
from functools import lru_cache

import sentencepiece

VOCAB_SIZE = 512
_VERBS = ("pick up", "put down", "place", "move", "push", "pull", "open", "close", "lift", "turn", "fold", "stack")
_COLOURS = ("red", "green", "blue", "yellow", "black", "white")
_THINGS = ("block", "cube", "cup", "bowl", "plate", "drawer", "door", "towel", "bottle", "box", "lid", "ball")

# One piece each: the pi0.5 template, and a state number as its tens and its units (" 128" is " 12" + "8"). A number a
# piece would need 256 of the 252 pieces that bytes and control symbols leave.
_SPACE = "\u2581"  # what SentencePiece writes for a space
_PIECES = (
    "\n", "Task:", f",{_SPACE}State:", f";\nAction:{_SPACE}", f"{_SPACE}-1",
    *(f"{_SPACE}{tens}" for tens in range(26)), *(str(digit) for digit in range(10)),
)  # fmt: skip


@lru_cache(maxsize=1)
def tiny_tokenizer() -> bytes:
    """A byte-fallback BPE SentencePiece model of 512 pieces: pad 0, eos 1, bos 2, unk 3; the same bytes every time.

    A prompt of five words takes about 22 tokens with 7 state numbers, and 37 with 14.
    """
    prompts = (f"Task: {verb} the {colour} {thing} and the {other} into it"
               for verb in _VERBS for colour in _COLOURS for thing, other in zip(_THINGS, _THINGS[1:], strict=False))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=prompts, model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=list(_PIECES), normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()

"""A tokenizer made on the spot for any text: one id per byte, and as many number words as a vocabulary has room for.

What a randomly initialised model draws from it is text too, which a reward can tell apart.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIALS = ("<pad>", "<eos>")
# how the byte-level alphabet writes a space
_SPACE = "Ġ"
SMALLEST = 256 + len(_SPECIALS)


def make_byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids 0 … 255 are bytes, then ``<pad>`` and ``<eos>``, then " 0", " 1", " 2" and so on up to ``vocab_size`` ids.

    Text is encoded as bytes only. Saved and loaded like any other. Raises ValueError for fewer than 258 ids.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"vocab_size={vocab_size}: bytes and special tokens alone are {SMALLEST} ids")
    numbers = (f"{_SPACE}{number}" for number in range(vocab_size - SMALLEST))
    words = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIALS, *numbers)
    core = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    pad, eos = _SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos)

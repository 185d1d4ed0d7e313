"""What ends a response: ids that stop it, and strings found in its text. No tensors."""

from __future__ import annotations

from typing import Protocol

from rlalign.config import SamplingParams

_INCOMPLETE = "\ufffd"  # what tokenizers decode a split multi-byte character to


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


def decode_text(tokenizer: Decoder, token_ids: list[int]) -> str:
    """Text of a response, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def stop_ids(params: SamplingParams, eos: frozenset[int], vocab_size: int) -> frozenset[int]:
    """Ids that end a response under ``params``. Raises ValueError for ids outside the vocabulary."""
    for token_id in params.stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"stop_token_ids holds {token_id}: the vocabulary has ids 0 … {vocab_size - 1}")
    ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
    if params.min_tokens > 0 and len(ids) >= vocab_size:
        raise ValueError(f"min_tokens={params.min_tokens} bans all {vocab_size} ids: no token is left to draw")
    return ids


class StopStringWatcher:
    """Decodes one response token by token and finds the first stop string.

    Only the tokens since the last complete piece of text are decoded again, so the cost per token does not grow with
    the response. ``text`` is what has been decoded so far; after a hit it ends before the stop string.
    """

    def __init__(self, tokenizer: Decoder | None, stop: tuple[str, ...]) -> None:
        """Raises ValueError without a tokenizer, or for an empty stop string."""
        if tokenizer is None:
            raise ValueError(f"stop={stop!r}: stop strings need a tokenizer; without one use stop_token_ids")
        if "" in stop:
            raise ValueError(f"stop={stop!r}: the empty string would stop everything")
        self._tokenizer = tokenizer
        self._stop = stop
        self._token_ids: list[int] = []
        self._context = 0  # first token that is decoded again: some tokenizers join pieces by what precedes them
        self._read = 0  # tokens whose text is already in self.text
        self._searched = 0  # stop strings that end before this offset of the text were allowed to pass (min_tokens)
        self.text = ""
        self.found = False

    def fresh(self) -> StopStringWatcher:
        """A watcher of the same strings for another response."""
        return StopStringWatcher(self._tokenizer, self._stop)

    def feed(self, token_id: int, may_stop: bool = True) -> bool:
        """Take the next token; True if a stop string is now complete. ``may_stop`` False lets strings pass."""
        self._token_ids.append(token_id)
        before = decode_text(self._tokenizer, self._token_ids[self._context : self._read])
        after = decode_text(self._tokenizer, self._token_ids[self._context :])
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            self.text += after[len(before) :]
            self._context, self._read = self._read, len(self._token_ids)
        if may_stop:
            self._search()
        else:
            self._searched = len(self.text)
        return self.found

    def _search(self) -> None:
        """Cut the text before the earliest stop string that ends in its new part."""
        hits = []
        for string in self._stop:
            start = self.text.find(string, max(0, self._searched - len(string) + 1))
            if start >= 0:
                hits.append(start)
        self._searched = len(self.text)
        if hits:
            self.text = self.text[: min(hits)]
            self.found = True

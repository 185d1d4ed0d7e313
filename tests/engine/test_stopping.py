"""Stop ids and stop strings, on tokenizers small enough to read."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from rlalign.config import SamplingParams
from rlalign.engine.request import Draw, Request
from rlalign.engine.stopping import StopStringWatcher, stop_ids
from rlalign.modeling import eos_ids


class ByteTokenizer:
    """Id b is byte b: characters beyond ASCII take several tokens."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


class WordTokenizer:
    """Pieces whose text depends on what precedes them, as in SentencePiece: no space before the first word."""

    words = ("stop", "here", "now", "the", "end")

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(self.words[token_id] for token_id in token_ids)


def feed_all(watcher: StopStringWatcher, token_ids: list[int]) -> int:
    """Tokens taken until a stop string was found, or all of them."""
    for count, token_id in enumerate(token_ids, 1):
        if watcher.feed(token_id):
            return count
    return len(token_ids)


def test_a_stop_string_spread_over_tokens_is_found_at_its_last_one() -> None:
    watcher = StopStringWatcher(ByteTokenizer(), ("cde", "zz"))
    assert feed_all(watcher, list(b"abcdef")) == 5
    assert (watcher.found, watcher.text) == (True, "ab")


def test_the_earliest_of_several_strings_cuts_the_text() -> None:
    watcher = StopStringWatcher(ByteTokenizer(), ("d", "bcd"))
    feed_all(watcher, list(b"abcd"))
    assert watcher.text == "a"


def test_characters_of_several_bytes_wait_until_they_are_whole() -> None:
    watcher = StopStringWatcher(ByteTokenizer(), ("é",))
    data = list("a€é".encode())
    assert feed_all(watcher, data) == len(data)
    assert (watcher.found, watcher.text) == (True, "a€")


def test_pieces_that_depend_on_their_predecessor_keep_their_spaces() -> None:
    watcher = StopStringWatcher(WordTokenizer(), ("the end",))
    assert feed_all(watcher, [0, 2, 3, 4, 1]) == 4
    assert watcher.text == "stop now "


def test_incremental_text_is_the_whole_text() -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("aé€😀 x") for _ in range(60))
    watcher = StopStringWatcher(ByteTokenizer(), ("never",))
    assert feed_all(watcher, list(text.encode())) == len(text.encode())
    assert (watcher.found, watcher.text) == (False, text)


def test_only_a_few_tokens_are_decoded_again() -> None:
    sizes = []

    class Counting(ByteTokenizer):
        def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
            sizes.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    feed_all(StopStringWatcher(Counting(), ("never",)), list(b"x" * 100))
    assert max(sizes) <= 2


def test_strings_before_min_tokens_pass_and_later_ones_stop() -> None:
    params = SamplingParams(max_tokens=50, min_tokens=4, stop=("ab",))
    request = Request.first_of(
        "r", [1], params, arrival=0, max_length=100, watcher=StopStringWatcher(ByteTokenizer(), params.stop)
    )
    for token_id in b"abxxab":
        assert request.finish_reason is None
        request.append(Draw(token_id, 0.0), batch_size=1)
    assert (request.finish_reason, request.watcher.text) == ("stop", "abxx")


def test_siblings_watch_their_own_text() -> None:
    params = SamplingParams(n=2, stop=("ab",))
    first = Request.first_of(
        "r", [1], params, arrival=0, max_length=100, watcher=StopStringWatcher(ByteTokenizer(), params.stop)
    )
    (second,) = first.split_siblings()
    first.append(Draw(ord("a"), 0.0), 1)
    second.append(Draw(ord("b"), 0.0), 1)
    assert (first.finish_reason, second.finish_reason) == (None, None)


@pytest.mark.parametrize(("stop", "tokenizer"), [(("x",), None), (("",), ByteTokenizer())])
def test_stop_strings_that_cannot_be_followed_are_refused(stop: tuple[str, ...], tokenizer: object) -> None:
    with pytest.raises(ValueError, match="stop="):
        StopStringWatcher(tokenizer, stop)


def test_eos_ids_come_from_tokenizer_generation_config_and_config() -> None:
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=[3, 4]), config=SimpleNamespace(eos_token_id=5)
    )
    assert eos_ids(SimpleNamespace(eos_token_id=2), model) == {2, 3, 4, 5}
    assert eos_ids(None, SimpleNamespace(generation_config=None, config=SimpleNamespace(eos_token_id=None))) == set()


def test_stop_ids_follow_the_parameters() -> None:
    eos = frozenset({2})
    assert stop_ids(SamplingParams(stop_token_ids=(7,)), eos, 10) == {2, 7}
    assert stop_ids(SamplingParams(stop_token_ids=(7,), ignore_eos=True), eos, 10) == {7}
    with pytest.raises(ValueError, match="stop_token_ids holds 10: the vocabulary has ids 0 … 9"):
        stop_ids(SamplingParams(stop_token_ids=(10,)), eos, 10)
    with pytest.raises(ValueError, match="min_tokens=1 bans all 2 ids"):
        stop_ids(SamplingParams(stop_token_ids=(0, 1), min_tokens=1), eos, 2)


def test_stop_ids_are_banned_until_min_tokens() -> None:
    request = Request.first_of(
        "r", [1], SamplingParams(min_tokens=2), arrival=0, max_length=50, stop_ids=frozenset({2, 3})
    )
    banned = []
    for _ in range(3):
        banned.append(request.banned_ids)
        request.append(Draw(9, 0.0), 1)
    assert banned == [{2, 3}, {2, 3}, set()]

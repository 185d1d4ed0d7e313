"""Other prompts and other tokens in front of, and in, the same response."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlalign.cli.contents import contents, round_trips
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.score import ScoreSettings, UnsupportedSetting

WORDS = ["<s>", "a", "b", "ab", "<u>", "</u>", "<a>"]


class Merging:
    """Encodes "ab" as one token, so that the ids of "a", "b" do not come back."""

    bos_token_id = 0
    chat_template = "<u>…</u>"

    def decode(self, ids: list[int], **_options: Any) -> str:
        skip = _options.get("skip_special_tokens", False)
        return "".join(WORDS[i] for i in ids if not (skip and WORDS[i].startswith("<")))

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        ids = []
        while text:
            word = max((w for w in WORDS if text.startswith(w)), key=len)
            ids.append(WORDS.index(word))
            text = text[len(word) :]
        return {"input_ids": ids}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        return f"<u>{messages[0]['content']}</u>" + ("<a>" if add_generation_prompt else "")


def sequence(prompt: list[int], response: list[int]) -> DumpSequence:
    return DumpSequence("0", np.array(prompt), np.array(response), np.zeros(len(response), np.float32), source="d:1")


def changed(ids: list[int], answer: list[int], **settings: str) -> tuple[list[int], list[int]]:
    [found] = contents([sequence(ids, answer)], ScoreSettings(**settings), Merging(), SimpleNamespace())
    return found.prompt.tolist(), found.response.tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("without_first", [2, 1]),
        ("without_last", [1, 2]),
        ("with_bos", [0, 1, 2, 1]),
        ("reencoded", [3, 1]),
        ("chat_template", [4, 3, 1, 5, 6]),
        ("generation_prompt", [1, 2, 1, 6]),
    ],
)
def test_prompts(kind, expected):
    assert changed([1, 2, 1], [1], prompt=kind) == (expected, [1])


def test_a_generation_prompt_that_is_there_is_taken_away():
    assert changed([4, 1, 5, 6], [1], prompt="generation_prompt") == ([4, 1, 5], [1])


def test_neighbours_prompts():
    pair = [sequence([1], [1]), sequence([2], [2])]
    for kind in ("next", "previous"):
        found = contents(pair, ScoreSettings(prompt=kind), None, None)
        assert [c.prompt.tolist() for c in found] == [[2], [1]]


def test_a_response_of_another_length_can_not_be_compared():
    # "ab" becomes one token: the dump's two log-probs would belong to nobody
    with pytest.raises(UnsupportedSetting, match="changes no sequence here"):
        changed([1], [1, 2], tokens="reencoded")
    # two ids for the same text, as many as before
    assert changed([1], [3, 1, 2, 3], prompt="with_bos") == ([0, 1], [3, 1, 2, 3])


def test_round_trips():
    assert round_trips(sequence([1, 2], [3]), Merging()) == (False, True)
    assert round_trips(sequence([3], [1, 2]), Merging()) == (True, False)


@pytest.mark.parametrize("kind", ["reencoded", "chat_template", "generation_prompt"])
def test_without_a_tokenizer_it_is_said(kind):
    with pytest.raises(UnsupportedSetting, match="needs a tokenizer"):
        contents([sequence([1], [1])], ScoreSettings(prompt=kind), None, None)


def test_without_a_bos_id_it_is_said():
    with pytest.raises(UnsupportedSetting, match="bos_token_id"):
        contents([sequence([1], [1])], ScoreSettings(prompt="with_bos"), None, SimpleNamespace())


def test_a_template_that_is_there_is_taken_away():
    assert changed([4, 3, 1, 5, 6], [1], prompt="chat_template") == ([3, 1], [1])


def test_an_id_that_the_model_does_not_have_is_refused_once_it_turns_up() -> None:
    """The template's last token is id 6, of which a vocabulary of 6 has no row; the dump's own ids are within it."""
    small, one = SimpleNamespace(vocab_size=6), sequence([1, 2], [1])
    with pytest.raises(UnsupportedSetting, match="the tokenizer gives id 6, the model's vocabulary has 6"):
        contents([one], ScoreSettings(prompt="generation_prompt"), Merging(), small)
    assert contents([one], ScoreSettings(prompt="reencoded"), Merging(), small)[0].prompt.tolist() == [3]

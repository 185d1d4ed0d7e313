"""What is fed for a sequence of a dump: its own prompt and response, or one that another pipeline might have fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings, UnsupportedSetting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# stands for a message's text while a template is looked at
_MARK = "rlalign-text"


@dataclass(frozen=True, slots=True)
class Content:
    """prompt: int64 [P']. response: int64 [L], as long as the dump's."""

    prompt: np.ndarray
    response: np.ndarray


def contents(
    sequences: Sequence[DumpSequence],
    settings: ScoreSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any,
) -> list[Content]:
    """Prompt and response of every sequence under ``settings.prompt`` and ``settings.tokens``.

    A sequence for which the change is impossible (no token to drop, another number of tokens) keeps its own. Raises
    UnsupportedSetting where no sequence is changed at all, a tokenizer is missing, or it gives an id that the model's
    vocabulary doesn't have.
    """
    own = [Content(sequence.prompt_token_ids, sequence.token_ids) for sequence in sequences]
    prompts = _prompts(own, settings, tokenizer, config)
    responses = [content.response for content in own]
    if settings.tokens == "reencoded":
        encoded = [_reencoded(ids, _needed(tokenizer)) for ids in responses]
        pairs = zip(encoded, responses, strict=True)
        responses = [new if len(new) == len(old) else old for new, old in pairs]
    used = [Content(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    changed = any(
        not (np.array_equal(a.prompt, b.prompt) and np.array_equal(a.response, b.response))
        for a, b in zip(used, own, strict=True)
    )
    if not changed and (settings.prompt, settings.tokens) != ("as_dumped", "as_dumped"):
        raise UnsupportedSetting("changes no sequence here")
    if changed:
        _check_ids(used, getattr(config, "vocab_size", None))
    return used


def _check_ids(used: Sequence[Content], vocab_size: int | None) -> None:
    """A tokenizer may have ids that the model has no row for: they matter only once a text is encoded to one."""
    largest = max((int(ids.max()) for one in used for ids in (one.prompt, one.response) if len(ids)), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise UnsupportedSetting(f"the tokenizer gives id {largest}, the model's vocabulary has {vocab_size}")


def round_trips(sequence: DumpSequence, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether decoding and encoding gives prompt and response back."""
    parts = (sequence.prompt_token_ids, sequence.token_ids)
    return tuple(np.array_equal(_reencoded(ids, tokenizer), ids) for ids in parts)  # type: ignore[return-value]


def _prompts(
    own: Sequence[Content], settings: ScoreSettings, tokenizer: PreTrainedTokenizerBase | None, config: Any
) -> list[np.ndarray]:
    prompts = [content.prompt for content in own]
    if settings.prompt in ("next", "previous"):
        step = 1 if settings.prompt == "next" else -1
        return [prompts[(i + step) % len(prompts)] for i in range(len(prompts))]
    change = _changes(settings, tokenizer, config)
    return [change(prompt) for prompt in prompts]


def _changes(
    settings: ScoreSettings, tokenizer: PreTrainedTokenizerBase | None, config: Any
) -> Callable[[np.ndarray], np.ndarray]:
    kind = settings.prompt
    if kind == "as_dumped":
        return lambda ids: ids
    if kind == "without_first":
        return lambda ids: ids[1:] if len(ids) > 1 else ids
    if kind == "without_last":
        return lambda ids: ids[:-1] if len(ids) > 1 else ids
    if kind == "with_bos":
        bos = getattr(tokenizer, "bos_token_id", None)
        bos = getattr(config, "bos_token_id", None) if bos is None else bos
        if not isinstance(bos, int):
            raise UnsupportedSetting("neither tokenizer nor config has a bos_token_id")
        return lambda ids: np.concatenate([np.array([bos], np.int64), ids])
    found = _needed(tokenizer)
    if kind == "reencoded":
        return lambda ids: _or(_reencoded(ids, found), ids)
    if not getattr(found, "chat_template", None):
        raise UnsupportedSetting("the tokenizer has no chat template")
    if kind == "generation_prompt":
        opening = _opening(found)
        return lambda ids: _toggled(ids, opening)
    return lambda ids: _or(_templated(ids, found), ids)


def _reencoded(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _templated(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The prompt's text as one user message in the tokenizer's chat template; of a prompt that is one, its text."""
    around = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = around.partition(_MARK)
    whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if before + after and len(whole) > len(before + after) and whole.startswith(before) and whole.endswith(after):
        text = whole.removeprefix(before).removesuffix(after)
    else:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def _opening(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """What the chat template puts after the messages, for the model to go on from; int64, not empty."""
    messages = [{"role": "user", "content": "x"}]
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=wanted)
        for wanted in (False, True)
    ]
    if not texts[1].startswith(texts[0]) or texts[0] == texts[1]:
        raise UnsupportedSetting("the chat template has no generation prompt of its own")
    return np.array(tokenizer(texts[1][len(texts[0]) :], add_special_tokens=False)["input_ids"], np.int64)


def _toggled(ids: np.ndarray, ending: np.ndarray) -> np.ndarray:
    has = len(ids) > len(ending) and np.array_equal(ids[-len(ending) :], ending)
    return ids[: -len(ending)] if has else np.concatenate([ids, ending])


def _or(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return new if len(new) else old


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UnsupportedSetting("needs a tokenizer, and the model's folder has none")
    return tokenizer

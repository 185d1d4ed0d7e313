"""Penalties, biases and bans that a dump names: read wherever they stand, and told where they matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.dumps import entry, only, write

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import detect_format, read_dump
from rlalign.verifier.dumps.distribution import Distribution
from rlalign.verifier.score import ScoreSettings

PENALTIES = {"repetition_penalty": 1.2, "logit_bias": {"5": -100}, "min_tokens": 4, "bad_words": ["x"]}
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
           "min_tokens": 0, "bad_words": [], "allowed_token_ids": None, "logits_processors": None}  # fmt: skip


def rows_naming(asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row of each place that a request's parameters are read from."""
    tokens = {"prompt_token_ids": [1], "token_ids": [2]}
    choice = {"token_ids": [2], "logprobs": {"token_logprobs": [-1.0]}}
    verl = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "response_mask": [[1]], "rollout_log_probs": [[-1.0]]}
    meta = {"output_token_logprobs": [[-1.0, 2, None]]}
    prime = {"token_ids": [1, 2], "loss_mask": [0, 1], "inference_logprobs": [0, -1.0]}
    return {
        "ours": {**tokens, "logprobs": [-1.0], "sampling": asked},
        "in the row": {**tokens, "logprobs": [-1.0], **asked},
        "vllm": {**tokens, "logprobs": [entry(2, -1.0)], "sampling_params": asked},
        "openai": {"request": {"prompt": [1], **asked}, "response": {"choices": [choice]}},
        "sglang": {"input_ids": [1], "meta_info": meta, "sampling_params": asked},
        "verl": {**verl, "meta_info": asked},
        "prime-rl": {**prime, "sampling": asked},
    }


@pytest.mark.parametrize(("place", "asked", "message"), [
    ("ours", {"temprature": 0.5}, "field 'sampling.temprature' is unknown; did you mean temperature?"),
    ("vllm", {"temp": 0.5}, "field 'sampling_params.temp' is unknown; did you mean temperature?"),
    ("vllm", {"topP": 0.5, "temperature": 1}, "field 'sampling_params.topP' is unknown; did you mean top_p?"),
    ("sglang", {"top-k": 5}, "field 'sampling_params.top-k' is unknown; did you mean top_k?"),
    ("prime-rl", {"minp": 0.1}, "field 'sampling.minp' is unknown; did you mean min_p?"),
])  # fmt: skip
def test_a_misspelt_filter_is_refused(tmp_path: Path, place: str, asked: dict[str, Any], message: str) -> None:
    path = write(tmp_path, rows_naming({})[place], rows_naming(asked)[place])
    with pytest.raises(ValueError) as error:
        list(read_dump(path))
    assert str(error.value) == f"{path}, line 2: {message}"


def test_names_of_engines_and_names_that_resemble_none_are_accepted(tmp_path: Path) -> None:
    """Of vLLM, SGLang, TRL, transformers and their relatives, and one that a server of one's own may have."""
    names = """max_tokens n best_of stop stop_token_ids seed logprobs prompt_logprobs min_tokens skip_special_tokens
    max_new_tokens top_logprobs top_logprobs_num typical_p top_a top_h top_n_sigma epsilon_cutoff eta_cutoff do_sample
    num_beams temperature_last dynatemp_range ignore_eos min_length max_length truncate_prompt_tokens output_kind
    extra_args regex json_schema no_repeat_ngram_size spaces_between_special_tokens n_samples step template""".split()
    asked = dict.fromkeys(names, 3) | {"temperature": 0.5, "temprature": None}
    for place in ("ours", "vllm", "sglang", "prime-rl"):
        assert only(write(tmp_path, rows_naming(asked)[place])).sampling == SamplingParams(temperature=0.5)


@pytest.mark.parametrize("place", rows_naming({}))
def test_what_scoring_cannot_apply_is_read_with_its_value(tmp_path: Path, place: str) -> None:
    first = only(write(tmp_path, rows_naming(NEUTRAL | PENALTIES)[place]))
    assert dict(first.unmodelled) == {
        "repetition_penalty": "1.2", "logit_bias": "{'5': -100}", "min_tokens": "4", "bad_words": "['x']",
    }  # fmt: skip
    second = only(write(tmp_path, rows_naming(NEUTRAL | {"logit_bias": {"5": 0}})[place]))
    assert second.unmodelled == ()


def test_the_note_of_them_counts_sequences_and_knows_raw_log_probs(tmp_path: Path) -> None:
    def notes(processed: bool | None, flag: bool | None = None) -> list[str]:
        said = {} if processed is None else {"processed": processed}
        rows = [{**rows_naming({name: value})["vllm"], **said} for name, value in asked]
        path = write(tmp_path, *rows)
        found = Distribution({}, flag, detect_format(path))
        for sequence in read_dump(path):
            found.decided(sequence, ScoreSettings())
        return found.notes

    asked = [("presence_penalty", 0.5), ("min_tokens", 3), ("presence_penalty", 0.5), ("presence_penalty", 0)]
    [told] = notes(True)
    assert told.endswith(": presence_penalty=0.5 in 2 sequences, min_tokens=3 in 1 sequence")
    assert notes(False) == notes(True, False) == []
    # nobody says what they are, and it matters though the temperature is 1
    told, named = notes(None)
    assert named == notes(True)[0]
    assert told.startswith("3 sequences don't say what their log-probs are; as vllm does by default")
    asked = asked[:1]
    assert notes(None)[0].startswith("1 sequence doesn't say what its log-probs are; as vllm does by default")
    asked = [("min_tokens", n) for n in range(1, 11)]
    assert notes(True)[0].endswith("min_tokens=8 in 1 sequence, 2 more")

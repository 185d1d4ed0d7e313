"""The engine's manners: how requests end, fail and are dropped, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import EOS, MODEL_LIMIT, VOCAB, flat, outcome, random_prompts, roomy
from transformers import PreTrainedTokenizerFast

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import Policy
from rlalign.modeling.inner_attention import Reference
from rlalign.records import derive_seed

PROMPTS = random_prompts(5, 4, low=4, high=20)


def one(engine: Engine, prompt: str | list[int], **params: object):
    [[completion]] = engine.generate([prompt], SamplingParams(**params))
    return completion


def test_a_completion_says_everything_about_itself(policy: Policy, tokenizer: PreTrainedTokenizerFast) -> None:
    completion = one(Engine(policy, tokenizer, roomy(), weights_version=3), "hello", max_tokens=6, seed=8)
    assert completion.prompt_ids.tolist() == tokenizer.encode("hello") == [ord(c) - 32 for c in "hello"]
    assert completion.token_ids.dtype == np.int64 and completion.logprobs.dtype == np.float32
    assert len(completion.token_ids) == len(completion.logprobs) == len(completion.batch_sizes) == 6
    assert (completion.finish_reason, completion.weights_version, completion.error) == ("length", 3, None)
    assert completion.seed == derive_seed(8, 0)
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert one(Engine(policy, None, roomy()), PROMPTS[0]).text is None


def test_seeds_decide_and_none_means_zero(policy: Policy) -> None:
    def tokens(seed: int | None) -> list[int]:
        return one(Engine(policy, None, roomy()), PROMPTS[0], max_tokens=20, seed=seed).token_ids.tolist()

    assert tokens(None) == tokens(0) != tokens(1)
    assert tokens(2**64 - 1) != tokens(2**63 - 1)


def test_a_stop_id_ends_a_response_and_is_kept(policy: Policy) -> None:
    free = one(Engine(policy, None, roomy()), PROMPTS[0], max_tokens=30).token_ids.tolist()
    stop_at = free[7]
    length = free.index(stop_at) + 1
    stopped = one(Engine(policy, None, roomy()), PROMPTS[0], max_tokens=30, stop_token_ids=(stop_at,))
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == (free[:length], "stop")


def test_eos_of_the_tokenizer_ends_a_response_unless_ignored(
    policy: Policy, tokenizer: PreTrainedTokenizerFast
) -> None:
    params = [SamplingParams(max_tokens=120, temperature=3.0, seed=seed, ignore_eos=seed >= 4) for seed in range(8)]
    completions = flat(Engine(policy, tokenizer, roomy()).generate([PROMPTS[0]] * 8, params))
    stopped = [c for c in completions[:4] if c.finish_reason == "stop"]
    assert stopped
    assert all(c.token_ids[-1] == EOS and EOS not in c.token_ids[:-1] for c in stopped)
    assert all(c.finish_reason == "length" and len(c.token_ids) == 120 for c in completions[4:])


def test_min_tokens_bans_what_would_stop(policy: Policy) -> None:
    stops = tuple(range(0, VOCAB, 2))
    params = SamplingParams(max_tokens=30, stop_token_ids=stops, min_tokens=6, n=8)
    completions = flat(Engine(policy, None, roomy()).generate([PROMPTS[0]], params))
    assert min(len(c.token_ids) for c in completions) == 7  # six odd ids, then the first one that may stop
    assert all((c.token_ids[:6] % 2 == 1).all() and c.finish_reason == "stop" for c in completions)


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens(policy: Policy, tokenizer: PreTrainedTokenizerFast) -> None:
    free = one(Engine(policy, tokenizer, roomy()), "abc", max_tokens=40, ignore_eos=True)
    string = free.text[10:13]
    stopped = one(Engine(policy, tokenizer, roomy()), "abc", max_tokens=40, ignore_eos=True, stop=("\n", string))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(string)]
    assert stopped.token_ids.tolist() == free.token_ids.tolist()[: len(stopped.token_ids)]
    assert tokenizer.decode(stopped.token_ids, skip_special_tokens=True) == stopped.text + string


def test_the_model_limit_ends_a_response(policy: Policy) -> None:
    prompt = [1] * (MODEL_LIMIT - 5)
    completion = one(Engine(policy, None, roomy()), prompt, max_tokens=50)
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    bounded = one(Engine(policy, None, roomy(max_model_len=20)), [1] * 15, max_tokens=50)
    assert (len(bounded.token_ids), bounded.finish_reason) == (5, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, VOCAB, 2], f"token id {VOCAB} is out of range: the vocabulary has ids 0 … {VOCAB - 1}"),
        ([-1], "token id -1 is out of range"),
        (
            [1] * MODEL_LIMIT,
            f"the prompt has {MODEL_LIMIT} tokens: prompt and response together may have {MODEL_LIMIT}",
        ),
    ],
)
def test_a_prompt_that_cannot_be_served_fails_alone(policy: Policy, prompt: list[int], message: str) -> None:
    params = SamplingParams(max_tokens=4, n=2)
    groups = Engine(policy, None, roomy()).generate([PROMPTS[0], prompt, PROMPTS[1]], params)
    assert [(c.sample_index, c.finish_reason, len(c.token_ids)) for c in groups[1]] == [
        (0, "error", 0),
        (1, "error", 0),
    ]
    assert message in groups[1][0].error
    well = Engine(policy, None, roomy()).generate(PROMPTS[:2], params)
    assert outcome(groups[0] + groups[2]) == outcome(flat(well))


def test_a_small_cache_never_shortens_a_response(policy: Policy) -> None:
    engine = Engine(policy, None, EngineConfig(page_size=4, num_pages=10))
    fits, too_long = engine.generate([[1] * 20] * 2, [SamplingParams(max_tokens=20), SamplingParams(max_tokens=21)])
    assert len(fits[0].token_ids) == 20
    assert too_long[0].finish_reason == "error"
    assert "prompt and max_tokens are 41 tokens, the cache holds 40 (num_pages=10, page_size=4)" in too_long[0].error


def test_a_cache_too_small_for_one_request_is_refused_at_once(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"num_pages=3 .* page_size=16 hold 48 .* max_model_len=100 needs num_pages=7"):
        Engine(policy, None, EngineConfig(page_size=16, num_pages=3, max_model_len=100))
    with pytest.raises(ValueError, match=f"max_model_len=999: the model has {MODEL_LIMIT} positions"):
        Engine(policy, None, roomy(max_model_len=999))


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_abort_returns_what_came_so_far(policy: Policy, num_steps: int) -> None:
    engine = Engine(policy, None, roomy())
    engine.add("a", PROMPTS[0], SamplingParams(max_tokens=30, n=2))
    engine.add("b", PROMPTS[1], SamplingParams(max_tokens=8))
    for _ in range(num_steps):
        engine.step()
    engine.abort("a")
    with pytest.raises(ValueError, match="'zz': no such unfinished request"):
        engine.abort("zz")
    completions = []
    while engine.has_unfinished:
        completions += engine.step()
    aborted = [c for c in completions if c.request_id == "a"]
    assert [(c.sample_index, len(c.token_ids), c.finish_reason) for c in aborted] == [
        (0, num_steps, "abort"),
        (1, num_steps, "abort"),
    ]
    alone = Engine(policy, None, roomy()).generate([PROMPTS[1]], SamplingParams(max_tokens=8))
    assert outcome([c for c in completions if c.request_id == "b"]) == outcome(alone[0])
    assert engine.stats["pages_used"] == 0


@pytest.mark.parametrize("prompts", ["one string", PROMPTS[0]], ids=["text", "token ids"])
def test_one_prompt_is_no_list_of_prompts(policy: Policy, prompts: str | list[int]) -> None:
    with pytest.raises(ValueError, match="a list of prompts is expected, not one"):
        Engine(policy, None, roomy()).generate(prompts, SamplingParams())


def test_step_streams_requests_that_arrive_late(policy: Policy) -> None:
    engine = Engine(policy, None, roomy())
    assert engine.step() == [] and not engine.has_unfinished
    completions = []
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt, SamplingParams(max_tokens=9))
        completions += engine.step() + engine.step()
    while engine.has_unfinished:
        completions += engine.step()
    assert [c.request_id for c in completions] == ["0", "1", "2", "3"]
    assert outcome(completions) == outcome(
        flat(Engine(policy, None, roomy()).generate(PROMPTS, SamplingParams(max_tokens=9)))
    )


def test_batch_sizes_count_the_sequences_of_each_forward(policy: Policy) -> None:
    lengths = [2, 5, 9]
    completions = flat(
        Engine(policy, None, roomy()).generate(PROMPTS[:3], [SamplingParams(max_tokens=length) for length in lengths])
    )
    assert [c.batch_sizes.tolist() for c in completions] == [[3] * 2, [3] * 2 + [2] * 3, [3] * 2 + [2] * 3 + [1] * 4]


def test_attention_gets_each_forwards_longest_lengths_from_the_host(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, seen = Reference.paged, set()

    def recording(self: Reference, *tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        given = settings["max_seqlen_q"], settings["max_seqlen_k"]
        assert given == (int(settings["cu_seqlens_q"].diff().max()), int(settings["kv_lens"].max()))
        assert all(type(bound) is int for bound in given)
        seen.add(given)
        return attend(self, *tensors, **settings)

    monkeypatch.setattr(Reference, "paged", recording)
    prompts = random_prompts(3, 5)
    Engine(policy, None, roomy(prefill_chunk=16)).generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    assert (1, max(map(len, prompts)) + 3) in seen and any(q == 16 for q, _ in seen)


def test_the_peak_of_the_cache_is_that_of_one_call(policy: Policy) -> None:
    engine = Engine(policy, None, EngineConfig(page_size=4, num_pages=100))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.generate([[number] * 12 for number in range(10)], params)
    assert engine.stats["cache_use_peak"] == 0.4  # 16 tokens are cached for each: the last one drawn is not
    assert engine.stats["cache_use"] == 0.0
    engine.generate([[1] * 12], params)
    assert engine.stats["cache_use_peak"] == 0.04


def test_misuse_is_refused_and_leaves_the_engine_usable(policy: Policy) -> None:
    engine = Engine(policy, None, roomy())
    with pytest.raises(ValueError, match="a list of prompts is expected"):
        engine.generate("text", SamplingParams())
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate([PROMPTS[0], "text"], SamplingParams())
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.generate(PROMPTS, SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match=f"stop_token_ids holds {VOCAB}"):
        engine.generate(PROMPTS, SamplingParams(stop_token_ids=(VOCAB,)))
    with pytest.raises(ValueError, match="3 sampling params for 4 prompts"):
        engine.generate(PROMPTS, [SamplingParams()] * 3)
    engine.add("a", PROMPTS[0], SamplingParams())
    with pytest.raises(ValueError, match="request_id='a' is unfinished"):
        engine.add("a", PROMPTS[0], SamplingParams())
    with pytest.raises(ValueError, match="1 requests are unfinished"):
        engine.generate(PROMPTS, SamplingParams())
    engine.abort("a")
    engine.step()
    assert len(flat(engine.generate(PROMPTS, SamplingParams()))) == 4


def test_new_weights_wait_for_the_last_request(own_policy: Callable[..., Policy]) -> None:
    policy = own_policy()
    engine = Engine(policy, None, roomy())
    engine.add("a", PROMPTS[0], SamplingParams())
    with pytest.raises(RuntimeError, match="1 requests are unfinished"):
        engine.update_weights(policy.named_weights(), 1)
    engine.abort("a")
    engine.step()
    engine.update_weights(policy.named_weights(), 1)
    assert engine.weights_version == 1


def test_damaged_weights_are_refused_before_anything_changes(own_policy: Callable[..., Policy]) -> None:
    engine = Engine(own_policy(), None, roomy())
    sha256 = engine.weights_hash()
    damaged = {name: tensor.clone() for name, tensor in engine.policy.named_weights().items()}
    name, tensor = next((n, t) for n, t in damaged.items() if t.dim() == 2)
    tensor.view(torch.int32)[1, 1] ^= 1  # one bit
    with pytest.raises(ValueError, match="weights version 7 arrived damaged"):
        engine.update_weights(damaged, 7, sha256)
    assert (engine.weights_version, engine.weights_hash()) == (0, sha256)
    engine.update_weights(damaged, 7)
    assert torch.equal(engine.policy.named_weights()[name], tensor)
    assert engine.weights_hash() != sha256


@pytest.mark.parametrize(("where", "value"), [("embed", "nan"), ("mlp.down", "nan"), ("input_layernorm", "inf")])
def test_nonfinite_weights_are_named_not_sampled(own_policy: Callable[..., Policy], where: str, value: str) -> None:
    policy = own_policy()
    weight = next(tensor for name, tensor in policy.named_weights().items() if where in name)
    weight.view(-1)[3] = float(value)
    engine = Engine(policy, None, roomy())
    message = "request '0', sample 0: the log-prob at response position 0 (position 3 of the sequence) is nan"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        engine.generate([[0, 1, 2]], SamplingParams(max_tokens=3))
    assert not engine.has_unfinished and engine.stats["pages_used"] == 0


def test_top_k_of_other_engines_is_refused_with_ours() -> None:
    with pytest.raises(ValueError, match=r"top_k=-1 is not supported; 0 switches it off"):
        SamplingParams(top_k=-1)

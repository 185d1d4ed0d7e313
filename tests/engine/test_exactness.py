"""The contract's axes through the real engine, bit for bit.

Two equalities chain. (1) Any schedule of the engine gives the tokens and log-probs of the base schedule (T1-T8, T11).
(2) The base schedule's log-probs are those of one packed forward over the whole sequences, which is how a trainer
computes them (T2, T5, T11, T12). Every test also asserts that what it is about really happened.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.engines import (
    MIXED_SAMPLING,
    bits,
    flat,
    mixed_params,
    outcome,
    packed_draws,
    packed_logprobs,
    random_prompts,
    roomy,
    run_poisoned,
    scatter_free_pages,
    tiny_policy,
)

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import Policy
from rlalign.records import Completion, derive_seed

PROMPTS = random_prompts(0, 12, high=36)
PARAMS = mixed_params(1, 12, max_tokens=12)


@pytest.fixture(scope="module")
def base(policy: Policy) -> list[tuple]:
    """What the base schedule gives for PROMPTS and PARAMS."""
    return outcome(flat(Engine(policy, None, roomy()).generate(PROMPTS, PARAMS)))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_logprobs_are_the_packed_forwards(family: str, dtype: torch.dtype) -> None:
    policy = tiny_policy(family, dtype)
    engine = Engine(policy, None, roomy(max_batch_tokens=64, prefill_chunk=11))
    completions = flat(engine.generate(PROMPTS, PARAMS))
    trained = packed_logprobs(policy, completions, PARAMS)
    assert [bits(c.logprobs) for c in completions] == [bits(values) for values in trained]
    assert max(max(c.batch_sizes) for c in completions) > 4
    assert engine.stats["mixed_steps"] > 0


def test_t1_alone_or_among_others(policy: Policy, base: list[tuple]) -> None:
    engine = Engine(policy, None, roomy())
    together = flat(engine.generate(PROMPTS, PARAMS))
    assert engine.stats["max_batch_size"] == len(PROMPTS)
    alone = [flat(Engine(policy, None, roomy()).generate([p], s))[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    assert {size for completion in alone for size in completion.batch_sizes} == {1}
    assert outcome(alone) == outcome(together) == base


def test_t2_order_of_requests(policy: Policy, base: list[tuple]) -> None:
    order = random.Random(3).sample(range(len(PROMPTS)), len(PROMPTS))
    results = Engine(policy, None, roomy()).generate([PROMPTS[i] for i in order], [PARAMS[i] for i in order])
    assert outcome(flat(results)) == [base[i] for i in order]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_t3_content_of_unused_slots(policy: Policy, base: list[tuple], value: float) -> None:
    config = roomy(num_pages=12, page_size=8, max_batch_tokens=50, prefill_chunk=13)
    engine = Engine(policy, None, config)
    assert outcome(run_poisoned(engine, PROMPTS, PARAMS, value)) == base
    assert engine.stats["preemptions"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_t3_content_of_other_rows(value: float) -> None:
    """In every forward, two sequences whose rows, keys and values are all broken run among the others."""
    ours = tiny_policy("llama")  # embeddings are not tied to the head: a broken one reaches its own sequence only
    clean = flat(Engine(ours, None, roomy()).generate(PROMPTS, PARAMS))
    used = {token for c in clean for token in (*c.prompt_ids.tolist(), *c.token_ids.tolist())}
    broken = min(set(range(ours.vocab_size)) - used)
    with torch.no_grad():
        ours.model.get_input_embeddings().weight[broken] = value

    engine = Engine(ours, None, roomy(prefill_chunk=4))
    names = [*map(str, range(6)), "broken a", *map(str, range(6, 12)), "broken b"]
    for name in names:
        if name.startswith("broken"):
            engine.add(name, [broken] * 200, SamplingParams())  # 50 forwards of prefill: it never comes to draw
        else:
            engine.add(name, PROMPTS[int(name)], PARAMS[int(name)])
    done: dict[int, Completion] = {}
    while len(done) < len(PROMPTS):
        completions = engine.step()
        assert all(min(c.batch_sizes) > 2 for c in completions)  # both were in it
        done.update({int(c.request_id): c for c in completions})
    assert outcome([done[number] for number in range(len(PROMPTS))]) == outcome(clean)
    seen = torch.cat([cache.flatten() for cache in engine._runner.v_caches])
    assert not seen.isfinite().all() or seen.abs().max() > 1e6  # and they were broken
    for name in ("broken a", "broken b"):
        engine.abort(name)


@pytest.mark.parametrize("seed", range(4))
def test_t5_chunk_boundaries(policy: Policy, base: list[tuple], seed: int) -> None:
    rng = random.Random(seed)
    chunk = [1, 16, 17, rng.randint(2, 40)][seed]
    engine = Engine(policy, None, roomy(prefill_chunk=chunk, max_batch_tokens=rng.randint(16, 60)))
    assert outcome(flat(engine.generate(PROMPTS, PARAMS))) == base
    assert engine.stats["mixed_steps"] > 0


@pytest.mark.parametrize("page_size", [1, 7, 16, 32, 64])
def test_t6_page_size_and_scattered_pages(policy: Policy, base: list[tuple], page_size: int) -> None:
    engine = Engine(policy, None, EngineConfig(page_size=page_size, num_pages=2000 // page_size))
    scatter_free_pages(engine, seed=page_size)
    assert outcome(flat(engine.generate(PROMPTS, PARAMS))) == base


def test_t7_prefix_cache_hit(policy: Policy, base: list[tuple]) -> None:
    engine = Engine(policy, None, roomy(page_size=4))
    for hits_expected in (False, True):
        before = engine.stats["prefix_hit_tokens"]
        assert outcome(flat(engine.generate(PROMPTS, PARAMS))) == base
        assert (engine.stats["prefix_hit_tokens"] > before) == hits_expected


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_t7_preempted_and_recomputed(policy: Policy, base: list[tuple], prefix_cache: bool) -> None:
    engine = Engine(policy, None, roomy(page_size=4, num_pages=14, prefix_cache=prefix_cache))
    assert outcome(flat(engine.generate(PROMPTS, PARAMS))) == base
    assert engine.stats["preemptions"] > 1


def test_t7_resumed_by_another_engine(policy: Policy, base: list[tuple]) -> None:
    """An engine dies in the middle; what was unfinished runs again elsewhere."""
    first = Engine(policy, None, roomy())
    for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        first.add(str(number), prompt, params)
    done = {int(c.request_id): c for _ in range(6) for c in first.step()}
    assert 0 < len(done) < len(PROMPTS)
    rest = [number for number in range(len(PROMPTS)) if number not in done]
    again = Engine(policy, None, roomy()).generate([PROMPTS[i] for i in rest], [PARAMS[i] for i in rest])
    done.update(zip(rest, flat(again), strict=True))
    assert outcome([done[number] for number in range(len(PROMPTS))]) == base


@pytest.mark.parametrize("seed", range(4))
def test_t8_any_schedule(policy: Policy, base: list[tuple], seed: int) -> None:
    rng = random.Random(100 + seed)
    page_size = rng.choice([1, 2, 5, 16, 48])
    config = EngineConfig(
        page_size=page_size,
        num_pages=-(-50 // page_size) * rng.randint(1, 8),
        max_batch_tokens=rng.choice([5, 16, 100, 1000]),
        max_num_seqs=rng.choice([1, 3, 50]),
        prefill_chunk=rng.choice([2, 9, 64]),
        prefix_cache=rng.random() < 0.5,
    )
    assert outcome(flat(Engine(policy, None, config).generate(PROMPTS, PARAMS))) == base


def test_t10_requests_spread_over_two_engines(policy: Policy, base: list[tuple]) -> None:
    halves = [Engine(policy, None, roomy()).generate(PROMPTS[start::2], PARAMS[start::2]) for start in (0, 1)]
    spread = [halves[number % 2][number // 2][0] for number in range(len(PROMPTS))]
    assert outcome(spread) == base


def test_t11_every_way_of_sampling_alone_and_mixed(policy: Policy) -> None:
    params = [SamplingParams(**kind, max_tokens=15, seed=9) for kind in MIXED_SAMPLING]
    prompts = [PROMPTS[0]] * len(params)
    mixed = flat(Engine(policy, None, roomy()).generate(prompts, params))
    alone = [flat(Engine(policy, None, roomy()).generate(prompts[:1], p))[0] for p in params]
    assert outcome(mixed) == outcome(alone)
    trained = packed_logprobs(policy, mixed, params)
    assert [bits(c.logprobs) for c in mixed] == [bits(values) for values in trained]
    assert len({tuple(c.token_ids) for c in mixed}) > 3  # the ways do differ


def test_t11_raw_logprobs_are_the_untruncated_ones_and_change_nothing(policy: Policy, base: list[tuple]) -> None:
    raw = [SamplingParams(**{**_fields(p), "raw_logprobs": number % 2 == 0}) for number, p in enumerate(PARAMS)]
    completions = flat(Engine(policy, None, roomy()).generate(PROMPTS, raw))
    assert outcome(completions) == base
    untruncated = packed_logprobs(policy, completions, [SamplingParams()] * len(completions))
    for number, (completion, values) in enumerate(zip(completions, untruncated, strict=True)):
        if number % 2 == 0:
            assert bits(completion.raw_logprobs) == bits(values)
        else:
            assert completion.raw_logprobs is None


def test_t12_after_weight_syncs(base: list[tuple]) -> None:
    ours = tiny_policy("qwen3")
    right = {name: tensor.clone() for name, tensor in ours.named_weights().items()}
    wrong = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in right.items()}
    engine = Engine(ours, None, roomy(page_size=4))
    sha256 = engine.weights_hash()
    engine.update_weights(wrong, 1)
    changed = flat(engine.generate(PROMPTS, PARAMS))
    assert outcome(changed) != base
    assert {c.weights_version for c in changed} == {1}
    engine.update_weights(right, 2, sha256)
    again = flat(engine.generate(PROMPTS, PARAMS))
    assert outcome(again) == base  # no page of version 1 was taken for one of version 2
    assert {c.weights_version for c in again} == {2}


@pytest.mark.parametrize(
    ("config", "preempts"),
    [(roomy(), False), (roomy(page_size=4, num_pages=16), True), (roomy(max_num_seqs=3), False)],
)
def test_samples_that_share_a_prefill_are_those_computed_alone(
    policy: Policy, config: EngineConfig, preempts: bool
) -> None:
    params = SamplingParams(n=5, max_tokens=12, seed=4, temperature=0.9)
    engine = Engine(policy, None, config)
    groups = engine.generate(PROMPTS[:3], params)
    assert (engine.stats["preemptions"] > 0) == preempts
    trained = packed_logprobs(policy, flat(groups), [params] * 15)
    assert [bits(c.logprobs) for c in flat(groups)] == [bits(values) for values in trained]
    assert [[c.sample_index for c in group] for group in groups] == [list(range(5))] * 3
    assert all(len({tuple(c.token_ids) for c in group}) == 5 for group in groups)
    first = flat(Engine(policy, None, roomy()).generate(PROMPTS[:3], SamplingParams(**{**_fields(params), "n": 1})))
    assert outcome(first) == outcome([group[0] for group in groups])


def test_every_token_is_drawn_with_its_samples_own_seed_and_position(policy: Policy) -> None:
    """Drawn again from a packed forward, with seeds hashed here: the first token after the fork as well."""
    params = SamplingParams(n=6, max_tokens=5, seed=2**63 + 11, temperature=1.5)
    [group] = Engine(policy, None, roomy()).generate(PROMPTS[:1], params)
    for sample_index, completion in enumerate(group):
        redrawn = packed_draws(policy, completion, params, seed=derive_seed(2**63 + 11, sample_index))
        assert completion.token_ids.tolist() == redrawn
    assert len({c.token_ids[0] for c in group}) > 1


def test_a_shared_prompt_is_computed_once(policy: Policy) -> None:
    engine = Engine(policy, None, roomy(prefix_cache=False))
    engine.generate([[5] * 37], SamplingParams(n=6, max_tokens=3))
    assert engine.stats["prefill_tokens"] == 37
    assert engine.stats["decode_tokens"] == 6 * 2


def test_native_differs_so_these_tests_can_fail(policy: Policy, base: list[tuple]) -> None:
    """The same requests on PyTorch's own operators: other bits, from the same engine."""
    native = flat(Engine(tiny_policy("qwen3", backend="native"), None, roomy()).generate(PROMPTS, PARAMS))
    assert [bits(c.logprobs) for c in native] != [logprobs for _, _, logprobs, _ in base]
    assert all(np.isfinite(c.logprobs).all() for c in native)


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}

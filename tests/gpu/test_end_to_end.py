"""End to end on a GPU: what an engine draws, a trainer scores with the same bits, under any schedule of either.

Models have Qwen3's shapes and random weights. 256 requests of up to 4,096 tokens, sampled in every way, go through
chunked prefill and preemption; a single wrong bit is noticed and found.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from support.engines import flat, outcome
from support.models import FAMILIES, tiny_model
from support_qwen import DEVICE, random_qwen, workload

from rlalign.actors.faults import flip_bit, flip_weight_bit, kv_page_fault, position_fault
from rlalign.actors.inspection import Inspector, packed, paged
from rlalign.actors.weight_sync import bundle_weights, unbundle_weights
from rlalign.algorithms.estimate import estimate_grpo
from rlalign.config import AlgorithmConfig, EngineConfig, SamplingParams, TrainerConfig
from rlalign.engine import Engine, sampler
from rlalign.modeling import Policy, align, audit
from rlalign.modeling.feeds import Feed, Forward
from rlalign.records import Completion, Prompt, Sample
from rlalign.trainer import Trainer, pack_samples
from rlalign.trainer.step import score
from rlalign.verifier.compare import Comparison, compare_samples
from rlalign.verifier.layers import check_layers
from rlalign.verifier.periodic import Excerpt, choose_excerpts
from rlalign.verifier.report import build_report

LONGEST = 4096
# pages for a third of the requests, so that prompts come in chunks and late ones are preempted
TIGHT = EngineConfig(page_size=128, num_pages=300, max_batch_tokens=4096, prefill_chunk=512)
OTHER = EngineConfig(
    page_size=16, num_pages=2500, max_batch_tokens=1500, max_num_seqs=48, prefill_chunk=333, prefix_cache=False,
    cuda_graphs=False,
)  # fmt: skip


def as_samples(completions: Sequence[Completion], params: Sequence[SamplingParams]) -> list[Sample]:
    return [
        Sample(0, Prompt(index, completion.prompt_ids, text="", ground_truth=""), completion, its_params)
        for index, (completion, its_params) in enumerate(zip(completions, params, strict=True))
    ]


@torch.no_grad()
def trained(policy: Policy, samples: Sequence[Sample], micro_batch_tokens: int = 16384) -> list[np.ndarray]:
    """Log-probs as a trainer computes them, from token ids alone."""
    found = [np.empty(0, np.float32) for _ in samples]
    for batch in pack_samples(
        samples, micro_batch_tokens=micro_batch_tokens, vocab_size=policy.vocab_size,
        max_positions=policy.max_positions, device=policy.device,
    ):  # fmt: skip
        batch.scatter(score(policy, batch).logprob, found)
    return found


def compared(policy: Policy, samples: Sequence[Sample], **packing: int) -> Comparison:
    return compare_samples(samples, trained(policy, samples, **packing))


@pytest.fixture(scope="module", params=[("0.6B", 2), ("0.6B", 28), ("1.7B", 28)], ids=lambda p: f"{p[0]}-{p[1]}-layers")
def policy(request: pytest.FixtureRequest) -> Iterator[Policy]:
    yield random_qwen(*request.param)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.timeout(900)
def test_engine_and_trainer_agree_under_any_schedule(policy):
    assert policy.backend == "triton"
    prompts, params = workload(256, LONGEST, policy.vocab_size)
    engine = Engine(policy, None, TIGHT)
    completions = flat(engine.generate(prompts, params))
    stats = engine.stats
    assert stats["preemptions"] > 0 and stats["mixed_steps"] > 0 and stats["max_batch_size"] > 32
    assert max(len(c.prompt_ids) + len(c.token_ids) for c in completions) > LONGEST * 0.9
    assert stats["graph_steps"] > 0
    del engine
    samples = as_samples(completions, params)
    for micro_batch_tokens in (16384, 5000):
        comparison = compared(policy, samples, micro_batch_tokens=micro_batch_tokens)
        assert comparison.num_tokens == sum(len(c.token_ids) for c in completions) > 5000
        assert comparison.equal, build_report(comparison, samples).verdict
    again = flat(Engine(policy, None, OTHER).generate(prompts, params))
    assert outcome(again) == outcome(completions)


@pytest.mark.timeout(600)
def test_a_wrong_bit_is_caught_and_located(policy):
    prompts, params = workload(24, 600, policy.vocab_size)
    engine = Engine(policy, None, EngineConfig(num_pages=300, prefix_cache=False))
    clean = as_samples(flat(engine.generate(prompts, params)), params)
    assert compared(policy, clean).equal
    with kv_page_fault(policy):
        faulty = as_samples(flat(engine.generate(prompts, params)), params)
    comparison = compared(policy, faulty)
    (wrong,) = np.unique(comparison.sample[comparison.mismatch])  # one sequence reads that page
    report = build_report(comparison, faulty)
    assert not report.equal and {token.key for token in report.worst} == {(0, int(wrong), 0)}
    with position_fault(policy):
        comparison = compared(policy, clean)
    # the second of fourteen prompt tokens: all behind it see it, in that sequence
    assert set(comparison.sample[comparison.mismatch]) == {0} and len(clean[0].completion.prompt_ids) == 14
    assert comparison.position[comparison.mismatch].min() == 0
    before = {name: weight.clone() for name, weight in policy.named_weights().items()}
    flip_weight_bit(policy)
    assert compared(policy, clean).mismatch_count > 0
    policy.load_weights(before)
    assert compared(policy, clean).equal


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Policy, Policy]]:
    """The rollout's policy and the trainer's: two layers, the same weights."""
    rollout, trainer = random_qwen("0.6B", 2), random_qwen("0.6B", 2)
    trainer.load_weights(rollout.named_weights())
    yield rollout, trainer
    gc.collect()
    torch.cuda.empty_cache()


SHORT = EngineConfig(num_pages=64, prefix_cache=False, cuda_graphs=False)


@pytest.mark.parametrize(
    "module", ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.norm"]
)
def test_a_flipped_bit_of_a_weight_is_caught_and_its_module_named(sides, module):
    rollout, trainer = sides
    weight = trainer.named_weights()[f"{module}.weight"]
    before = weight.clone()
    flip_weight_bit(trainer, f"{module}.weight")
    prompts, params = workload(12, 100, rollout.vocab_size)
    prompts[0][0] = int((weight != before).nonzero()[0, 0])  # of the embedding: the id whose row it is
    samples = as_samples(flat(Engine(rollout, None, SHORT).generate(prompts, params)), params)
    excerpts = choose_excerpts(samples, count=12, tokens=8, seed=0, step=1)
    try:
        comparison = compared(trainer, samples)
        layers = check_layers(Inspector(rollout, paged(SHORT)), Inspector(trainer, packed), excerpts)
    finally:
        weight.copy_(before)
    assert comparison.mismatch_count > 0
    assert layers.first is not None and layers.first.module == module
    if module == "model.embed_tokens":
        assert layers.where == ("0/0/0", 0)
    assert compared(trainer, samples).equal  # nothing else was wrong


def test_a_flipped_value_of_the_last_layers_cache_is_caught(sides):
    rollout, trainer = sides
    prompts, params = workload(12, 100, rollout.vocab_size)
    with kv_page_fault(rollout, layer=-1, of_value=True):
        samples = as_samples(flat(Engine(rollout, None, SHORT).generate(prompts, params)), params)
    comparison = compared(trainer, samples)
    assert len(np.unique(comparison.sample[comparison.mismatch])) == 1  # the sequence that reads that page
    assert comparison.position[comparison.mismatch].min() == 1  # the first token that a decode step draws


def damaged_value(policy: Policy, feeds: Sequence[Feed]) -> Iterator[Forward]:
    """One bit of the second sequence's newest value in the last layer's cache, before its third decoding step."""
    for step, forward in enumerate(paged(SHORT)(policy, feeds)):
        if step == 3:
            context, cache = forward.context, forward.context.v_caches[-1]
            page, offset = divmod(int(context.kv_lens[1]) - 2, cache.shape[1])
            slot = int(context.block_tables[1, page]), offset, 0
            flip_bit(cache, (*slot, int(cache[slot].abs().argmax())))
        yield forward


def shifted_position(policy: Policy, feeds: Sequence[Feed]) -> Iterator[Forward]:
    """The second sequence's sixth token is said to be its seventh."""
    for forward in packed(policy, feeds):
        forward.position_ids[int(forward.context.cu_seqlens[1]) + 5] += 1
        yield forward


@pytest.mark.parametrize(
    ("rollout_runs", "trainer_runs", "module", "row"),
    [
        (damaged_value, packed, "model.layers.1.self_attn", 20 + 2),
        (paged(SHORT), shifted_position, "model.rotary_emb", 5),
        (paged(SHORT), packed, None, None),
    ],
    ids=["value", "position", "none"],
)
def test_a_wrong_value_or_position_is_located(sides, rollout_runs, trainer_runs, module, row):
    ids = np.random.default_rng(0).integers(0, sides[0].vocab_size, (3, 32))
    excerpts = [Excerpt(str(i), part[:20], part[20:]) for i, part in enumerate(ids)]
    layers = check_layers(Inspector(sides[0], rollout_runs), Inspector(sides[1], trainer_runs), excerpts)
    assert (layers.first and layers.first.module) == module
    assert layers.where == (None if row is None else ("1", row))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact(family, dtype):
    model = align(tiny_model(family, dtype).to(DEVICE))
    assert model.rlalign_backend == "triton"
    assert audit(model).exact
    policy = Policy(model)
    prompts, params = workload(24, 200, policy.vocab_size)
    engine = Engine(policy, None, EngineConfig(num_pages=64, max_batch_tokens=96, prefill_chunk=40))
    assert engine.config.page_size == 128
    completions = flat(engine.generate(prompts, params))
    assert engine.stats["graph_steps"] > 0
    samples = as_samples(completions, params)
    comparison = compared(policy, samples, micro_batch_tokens=300)
    assert comparison.equal, build_report(comparison, samples).verdict
    other = EngineConfig(page_size=16, num_pages=40, max_num_seqs=5, prefix_cache=False, cuda_graphs=False)
    assert outcome(flat(Engine(policy, None, other).generate(prompts, params))) == outcome(completions)


def grpo_steps(checkpointing: bool) -> tuple[str, list[Comparison]]:
    """Two updates with the weights handed over in between; SHA-256 of the masters, and what was compared."""
    algorithm = AlgorithmConfig(group_size=4, prompts_per_step=4)
    settings = TrainerConfig(micro_batch_tokens=512, lr=1e-3, gradient_checkpointing=checkpointing)
    trainer = Trainer(random_qwen("0.6B", 2), settings, algorithm, total_steps=2)
    engine = Engine(random_qwen("0.6B", 2, seed=1), None, EngineConfig(num_pages=64))
    params, comparisons, hashes = SamplingParams(n=4, max_tokens=24, seed=3), [], []
    for step in range(2):
        weights, version, sha256 = trainer.weights()
        engine.update_weights(unbundle_weights(bundle_weights(weights, version, sha256)), version, sha256)
        assert engine.weights_hash() == sha256
        hashes.append(sha256)
        prompts = workload(4, 100, engine.policy.vocab_size)[0]
        samples = [
            Sample(step, Prompt(i, c.prompt_ids, text="", ground_truth=""), c, params, reward=float(c.token_ids[0] % 7))
            for i, group in enumerate(engine.generate(prompts, params))
            for c in group
        ]
        trainer.begin_batch()
        result = trainer.accumulate(samples, estimate_grpo(samples, algorithm).advantages)
        comparisons.append(compare_samples(samples, result.train_logprobs))
        assert trainer.apply_update()["grad_norm"] > 0
    assert len({*hashes, trainer.weights()[2]}) == 3  # every update changed weights
    return trainer.masters_sha256(), comparisons


@pytest.mark.timeout(600)
def test_training_agrees_and_is_deterministic():
    first, again = grpo_steps(checkpointing=False), grpo_steps(checkpointing=False)
    assert first[0] == again[0]
    for comparison in (*first[1], *grpo_steps(checkpointing=True)[1]):
        assert comparison.equal


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_decode_step_waits_for_the_gpu_once(monkeypatch, cuda_graphs):
    policy = random_qwen("0.6B", 2)
    engine = Engine(policy, None, EngineConfig(cuda_graphs=cuda_graphs))
    for index in range(5):
        engine.add(str(index), [1, 2, 3 + index], SamplingParams(max_tokens=32, seed=index))
    for _ in range(4):
        engine.step()
    waits, replayed = [], engine.stats["graph_steps"]
    real = sampler._to_host

    def to_host(output):
        waits.append(1)
        torch.cuda.set_sync_debug_mode("default")
        found = real(output)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(sampler, "_to_host", to_host)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 3
    assert engine.stats["graph_steps"] - replayed == (3 if cuda_graphs else 0)

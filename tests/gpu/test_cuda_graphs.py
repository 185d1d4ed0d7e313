"""Decode steps from CUDA graphs against the same steps launched one by one: the same tokens, the same 32 bits.

Contract axis T8, with what may go wrong in a graph only: batches that shrink through the buckets, lengths that outgrow
one, rows that pad one, pages that others leave, weights that change under it, work space that a larger call takes away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from support.engines import MIXED_SAMPLING, flat, outcome, run_poisoned
from support.models import FAMILIES, tiny_model
from support_qwen import DEVICE, random_qwen

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import Policy, align

GRAPHS = {"cuda_graphs": True, "num_pages": 400}


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    yield random_qwen("0.6B", 3)


def requests(count: int, *, longest: int = 300, filters: bool = False) -> tuple[list[list[int]], list[SamplingParams]]:
    """Responses of 3, 5, 7, … tokens, so that a batch passes through every bucket."""
    rng = random.Random(count)
    prompts = [[rng.randrange(151936) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    settings = [MIXED_SAMPLING[i % (6 if filters else 2)] for i in range(count)]
    return prompts, [SamplingParams(**s, max_tokens=3 + 2 * i, seed=i) for i, s in enumerate(settings)]


def eager(policy: Policy, prompts: list[list[int]], params: list[SamplingParams], **changes: object) -> list[tuple]:
    engine = Engine(policy, None, EngineConfig(**{**GRAPHS, "cuda_graphs": False, **changes}))
    found = outcome(flat(engine.generate(prompts, params)))
    assert engine.stats["graph_steps"] == 0
    return found


@pytest.mark.parametrize("filters", [False, True], ids=["plain", "filters"])
@pytest.mark.parametrize("page_size", [16, 128])
def test_replay_gives_the_eager_bits_as_a_batch_shrinks(policy, page_size, filters):
    prompts, params = requests(37, filters=filters)
    # room for all prompts in the first step
    changes = {"page_size": page_size, "num_pages": 60_000 // page_size, "max_batch_tokens": 16_384}
    clean = eager(policy, prompts, params, **changes)
    engine = Engine(policy, None, EngineConfig(cuda_graphs=True, **changes))
    assert outcome(flat(engine.generate(prompts, params))) == clean
    rows = {bucket.num_rows for bucket in engine._graphs._steps}
    assert {1, 2, 4, 8, 16, 32, 64} <= rows
    steps = engine.stats["graph_steps"]
    assert steps >= len(prompts) - len(rows)
    # the second time every decode step is replayed
    assert outcome(flat(engine.generate(prompts, params))) == clean
    assert engine.stats["graph_steps"] - steps > steps


def test_lengths_that_outgrow_a_bucket_and_work_space_that_is_taken_away(policy):
    """Over 1,024 and 2,048 keys; in between an eager call whose splits need far more work space."""
    rng = random.Random(7)
    lengths = (1000, 1020, 2040, 2046, 5, 300)
    prompts = [[rng.randrange(151936) for _ in range(n)] for n in lengths]
    params = [SamplingParams(max_tokens=30, seed=i) for i in range(len(prompts))]
    clean = eager(policy, prompts, params)
    engine = Engine(policy, None, EngineConfig(**GRAPHS))
    assert outcome(flat(engine.generate(prompts, params))) == clean
    assert len({bucket.max_length for bucket in engine._graphs._steps}) >= 2
    eager(policy, [[1] * 20_000] * 2, [SamplingParams(max_tokens=3)] * 2)
    junk = [torch.full((50_000_000,), torch.nan, device=DEVICE) for _ in range(4)]
    assert outcome(flat(engine.generate(prompts, params))) == clean
    del junk


def test_preempted_sequences_and_shared_prompts(policy):
    prompts, params = requests(24, longest=500)
    params = [SamplingParams(max_tokens=40 + p.max_tokens, n=1 + i % 4, seed=i) for i, p in enumerate(params)]
    clean = eager(policy, prompts, params)
    engine = Engine(policy, None, EngineConfig(cuda_graphs=True, page_size=128, num_pages=60))
    assert outcome(flat(engine.generate(prompts, params))) == clean
    stats = engine.stats
    assert stats["preemptions"] > 0 and stats["page_copies"] > 0 and stats["graph_steps"] > 0


def test_nothing_is_read_from_pages_that_nobody_holds_nor_from_the_spare_one(policy):
    prompts, params = requests(11)
    params = [SamplingParams(max_tokens=p.max_tokens, seed=p.seed) for p in params]
    clean = eager(policy, prompts, params)
    engine = Engine(policy, None, EngineConfig(**GRAPHS, prefix_cache=False))
    for cache in (*engine._runner.k_caches, *engine._runner.v_caches):
        cache[engine.config.num_pages] = torch.nan
    assert outcome(run_poisoned(engine, prompts, params, torch.nan)) == clean
    assert engine.stats["graph_steps"] > 0


def test_weights_are_synced_under_the_graphs():
    ours, other = random_qwen("0.6B", 2), random_qwen("0.6B", 2, seed=1)
    prompts, params = requests(6)
    engine = Engine(ours, None, EngineConfig(**GRAPHS, prefix_cache=False))  # it knows of no weights moved by hand
    before = outcome(flat(engine.generate(prompts, params)))
    made = dict(engine._graphs._steps)
    engine.update_weights({name: w.cpu() for name, w in other.named_weights().items()}, 1)
    steps = engine.stats["graph_steps"]
    after = outcome(flat(engine.generate(prompts, params)))
    assert after == eager(other, prompts, params) != before
    assert engine._graphs._steps == made and engine.stats["graph_steps"] > steps
    parameter = ours.model.model.layers[0].mlp.down_proj.weight
    parameter.data = parameter.data.clone().neg_()
    moved = outcome(flat(engine.generate(prompts, params)))
    assert moved == eager(ours, prompts, params) != after


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_captured(family):
    policy = Policy(align(tiny_model(family, torch.bfloat16).to(DEVICE)))
    prompts = [[1 + i, 2, 3] * (1 + 2 * i) for i in range(5)]
    params = [SamplingParams(max_tokens=8 + 3 * i, seed=i) for i in range(5)]
    engine = Engine(policy, None, EngineConfig(cuda_graphs=True, num_pages=64, page_size=16))
    assert outcome(flat(engine.generate(prompts, params))) == eager(policy, prompts, params, page_size=16, num_pages=64)
    assert engine.stats["graph_steps"] > 0


def test_native_operators_are_not_captured():
    policy = random_qwen("0.6B", 1, backend="native")
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs=true: the operators of backend 'native'"):
        Engine(policy, None, EngineConfig(**GRAPHS))
    engine = Engine(policy, None, EngineConfig(num_pages=16))
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    assert engine.stats["graph_steps"] == 0

from __future__ import annotations

import pytest
import torch
from support.engines import tiny_policy

from rlalign.actors.faults import flip_bit, flip_weight_bit, kv_page_fault, position_fault
from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import PackedContext


def differing_bits(before: torch.Tensor, after: torch.Tensor, kind: torch.dtype) -> list[int]:
    changed = (before.view(kind) ^ after.view(kind)).flatten().tolist()
    return [bin(value & 0xFFFFFFFF).count("1") for value in changed if value]


def test_flip_bit_changes_one_bit_and_stays_finite():
    for dtype, kind in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        values = torch.randn(4, 4).to(dtype)
        before = values.clone()
        flip_bit(values, (1, 2))
        assert differing_bits(before, values, kind) == [1] and values.isfinite().all()
        flip_bit(values, (1, 2))
        assert torch.equal(before.view(kind), values.view(kind))


@pytest.mark.parametrize("name", [None, "model.layers.0.self_attn.q_proj.weight"])
def test_one_bit_of_one_weight(name):
    policy = tiny_policy()
    before = {name: tensor.clone() for name, tensor in policy.named_weights().items()}
    where = flip_weight_bit(policy, name)
    changed = {
        name: bits
        for name, tensor in policy.named_weights().items()
        if (bits := differing_bits(before[name], tensor, torch.int32))
    }
    assert list(changed.values()) == [[1]] and where.startswith(next(iter(changed)))
    assert next(iter(changed)) == (name or "model.norm.weight")


@pytest.mark.parametrize("where", [{}, {"layer": -1, "of_value": True}])
def test_a_flipped_cache_bit_reaches_the_second_token_and_ends_with_its_block(where):
    policy = tiny_policy()
    prompts, params = [[1, 2, 3, 4, 5]], SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    [[clean]] = Engine(policy, None, EngineConfig(num_pages=8)).generate(prompts, params)
    with kv_page_fault(policy, **where):
        [[faulty]] = Engine(policy, None, EngineConfig(num_pages=8)).generate(prompts, params)
    assert faulty.logprobs[0] == clean.logprobs[0] and faulty.logprobs[1] != clean.logprobs[1]
    [[again]] = Engine(policy, None, EngineConfig(num_pages=8)).generate(prompts, params)
    assert again.logprobs.tolist() == clean.logprobs.tolist()


def test_a_flipped_cache_bit_is_one_that_a_sliding_window_shows():
    policy = tiny_policy("mistral")
    prompts, params = [list(range(40))], SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    [[clean]] = Engine(policy, None, EngineConfig(num_pages=8)).generate(prompts, params)
    with kv_page_fault(policy):
        [[faulty]] = Engine(policy, None, EngineConfig(num_pages=8)).generate(prompts, params)
    assert policy.model.config.sliding_window < 40
    assert faulty.logprobs[1] != clean.logprobs[1]


def test_a_shifted_position_reaches_one_forward():
    policy = tiny_policy()
    seen = []
    hidden = type(policy).hidden

    class Watched(type(policy)):
        def hidden(self, token_ids, position_ids, context):
            seen.append(position_ids.tolist())
            return hidden(self, token_ids, position_ids, context)

    policy.__class__ = Watched
    ids, positions = torch.arange(4), torch.arange(4)
    context = PackedContext(torch.tensor([0, 4], dtype=torch.int32))
    with position_fault(policy), torch.no_grad():
        policy.hidden(ids, positions, context)
        policy.hidden(ids, positions, context)
    assert seen == [[0, 2, 2, 3], [0, 1, 2, 3]]
    assert positions.tolist() == [0, 1, 2, 3]


def test_a_fault_that_never_happened_is_an_error():
    policy = tiny_policy()
    with pytest.raises(RuntimeError, match=r"kv_page was not planted: no forward read"), kv_page_fault(policy):
        # two prefills: the second forward writes the keys that it reads
        engine = Engine(policy, None, EngineConfig(num_pages=8, max_batch_tokens=3))
        engine.generate([[1, 2, 3], [4, 5, 6]], SamplingParams(max_tokens=1))
    assert engine.stats["steps"] == 2
    with pytest.raises(RuntimeError, match="position was not planted"), position_fault(policy):
        pass
    with pytest.raises(KeyError, match="its own"), kv_page_fault(policy):
        raise KeyError("its own")
    assert "hidden" not in vars(policy)
